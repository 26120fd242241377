"""The study of the size of a code: the densities against a closed form, and the command at its smallest scale."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from helpers import importing_from, run_script
from torch.distributions import MultivariateNormal

from hf_vaeplus.modeling_priors import VAEPlusFlowMatchingConfig, VAEPlusFlowMatchingModel

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(output_dir, *options) -> tuple[int, str]:
    """Exit code and standard error of the script."""
    with contextlib.chdir(output_dir.parent):
        code, _, errors = run_script(EXAMPLES / "code_size.py", "--output_dir", output_dir, *options)
    return code, errors


def test_a_fresh_flow_gains_nothing_over_the_gaussian():
    """Before its first step the prior is the Gaussian of the moments; the inactive dimensions are N(0, 1)."""
    with importing_from(EXAMPLES):
        from code_size import densities
    prior = VAEPlusFlowMatchingModel(
        VAEPlusFlowMatchingConfig(latent_dim=5, active_dims=[0, 2, 3], hidden_dim=8, num_blocks=1)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    mean, root = torch.randn(5, generator=generator), torch.randn(5, 5, generator=generator).double()
    covariance = root @ root.T + torch.eye(5)
    prior.set_input_moments(mean, covariance)
    z = torch.randn(12, 5, generator=generator)
    found = densities(prior, z)
    active = [0, 2, 3]
    normal = MultivariateNormal(mean[active].double(), covariance[active][:, active])
    expected = -float(normal.log_prob(z[:, active].double()).mean())
    rest = -float(torch.distributions.Normal(0, 1).log_prob(z[:, [1, 4]]).sum(1).mean())
    assert found["nll"]["Gaussian"] == pytest.approx(expected + rest, rel=1e-5)
    assert found["nll"]["prior"] == pytest.approx(expected + rest, rel=1e-2)  # the steps of the ODE
    assert found["nll_per_active_dimension"]["Gaussian"] == pytest.approx(expected / 3, rel=1e-5)
    assert found["gain"] == pytest.approx(found["nll"]["Gaussian"] - found["nll"]["prior"], abs=1e-6)
    assert found["is_exact"] and found["num_scored"] == 12


def test_the_command_and_what_it_does_a_second_time(tmp_path):
    folder = tmp_path / "sizes"
    code, errors = run(folder, "--scale", "smoke")
    assert code == 0, errors[-3000:]
    found = json.loads((folder / "code_size.json").read_text())
    assert found["command"] and found["commit"] and found["date"] and found["settings"]["seed"] == 0
    assert [row["size"] for row in found["rows"]] == [4, 8] and found["num_training"] == 160
    for row in found["rows"]:
        cells = {path.stem: json.loads(path.read_text()) for path in (folder / "cells").glob(f"{row['size']}-*.json")}
        pace = cells[f"{row['size']}-pace"]["seconds_per_step"]
        assert row["steps"]["autoencoder"] == max(1, round(found["settings"]["seconds"] / pace))
        assert row["steps"]["vae"] == row["steps"]["second_stage"] == 10
        gain = row["elbo"]["prior"] - row["elbo"]["N(0, I)"]
        assert gain == pytest.approx(row["densities"]["nll"]["N(0, I)"] - row["densities"]["nll"]["prior"], abs=1e-6)
        assert all(0 <= row["memorised"]["second_stage"][space]["share"] <= 1 for space in ("codes", "features"))
        assert (folder / str(row["size"]) / "pipeline" / "model_index.json").is_file()
    assert (folder / "code-size.png").is_file()
    assert sum(line.startswith("| 4 |") for line in (folder / "table.md").read_text().splitlines()) == 2

    written = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    assert len(written) == 10
    assert run(folder, "--scale", "smoke", "--sizes", 4)[0] == 0
    assert written == {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    code, errors = run(folder, "--scale", "smoke", "--seed", 1)
    assert code == 2 and "choose another --output_dir" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--train_data_dir is missing"),
        (["--scale", "smoke", "--sizes", 8, 0], "--sizes must be at least 1, got 0"),
        (["--scale", "smoke", "--seconds", 0], "--seconds must be positive, got 0.0"),
        (["--scale", "smoke", "--seconds", "nan"], "--seconds must be positive, got nan"),
        (["--scale", "smoke", "--features", "none.onnx"], "no file 'none.onnx'"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, options, message):
    code, errors = run(tmp_path / "sizes", *options)
    assert code == 2 and message in errors and "Traceback" not in errors
    assert not (tmp_path / "sizes").exists()
