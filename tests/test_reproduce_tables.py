"""The commands that reproduce tables and figures, at their smallest scale, as a reader would run them."""

import contextlib
import json
from pathlib import Path

import pytest
from helpers import run_script

SCRIPTS = Path(__file__).parents[1] / "examples" / "reproduce"


def run(name, output_dir, *options) -> tuple[int, str]:
    """Exit code and standard error of a script."""
    with contextlib.chdir(output_dir.parent):
        code, _, errors = run_script(SCRIPTS / f"{name}.py", "--scale", "smoke", "--output_dir", output_dir, *options)
    return code, errors


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Output folders by script; each script runs once."""
    root = tmp_path_factory.mktemp("reproduce")

    def output_of(name, *options):
        folder = root / name
        if not folder.exists():
            code, errors = run(name, folder, *options)
            assert code == 0, errors[-3000:]
        return folder, json.loads((folder / "results.json").read_text())["cells"]

    return output_of


def test_table1(finished):
    folder, cells = finished("table1")
    assert set(cells) == {f"{kind}-{kappa}-0" for kind in ("skips", "plain") for kappa in (4, 8)}
    for cell in cells.values():
        assert cell["nll"] <= cell["negative_elbo"]
    assert cells["skips-8-0"]["squared_error"] < cells["plain-8-0"]["squared_error"]
    assert (folder / "table1.png").is_file()


def test_table1_without_skips(finished):
    folder, cells = finished("table1_without_skips")
    assert len(cells) == 8 and (folder / "table.md").read_text().count("\n") == 10
    assert cells["gamma fixed at 1"]["gamma"] == 1
    assert cells["as in Table 1 (gamma analytic)"]["kl"] != cells["torch's start, gamma analytic"]["kl"]


def test_table2_figure1(finished):
    _, cells = finished("table2_figure1")
    learnable, fixed = cells["32-0-learnable"], cells["32-0-fixed"]
    assert fixed["gamma"] == pytest.approx(learnable["gamma"], rel=1e-6)
    assert len(learnable["gradients"]) == len(fixed["gradients"]) == 120  # one per step
    assert fixed["gradients"][0] == pytest.approx(learnable["gradients"][0] / fixed["gamma"], rel=0.01)  # ~ 1 / gamma
    assert abs(learnable["mmd_of_two_priors"]) < 0.1 < learnable["mmd"]


def test_table3_table4_figure2(finished):
    folder, cells = finished("table3_table4_figure2")
    assert cells["set-real"]["frechet"] < cells["set-downsample"]["frechet"] < cells["set-vae-sampled"]["frechet"]
    assert set(cells["set-vae-sampled"]["ndb"]) == {"4", "8"}
    grids = ("vaeplus-0", "vaeplus-unmatched-0", "vae-0", "wae-mmd-0", "mixture-10")
    assert all((folder / f"samples-{name}.png").is_file() for name in grids)
    matched, unmatched = cells["set-vaeplus-sampled-0"], cells["set-vaeplus-unmatched-sampled-0"]
    assert matched["frechet"] != unmatched["frechet"]
    assert "| VAE+ |" in (folder / "table.md").read_text()


def test_sharper(finished):
    models, _ = finished("table3_table4_figure2")
    _, cells = finished("sharper", "--models", models)
    assert {name.removesuffix("-sampled") for name in cells if name.endswith("-sampled")} == {
        "decoder mean", "spectrum", "residual", "texture", "energy"
    }  # fmt: skip


def test_a_finished_command_computes_nothing_again_and_other_settings_are_refused(finished):
    folder, cells = finished("table1")
    written = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    assert run("table1", folder)[0] == 0
    assert written == {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    (folder / "cells" / "plain-8-0.json").rename(folder / "cells" / "put-away")
    assert run("table1", folder, "--so_far")[0] == 0
    assert set(json.loads((folder / "results.json").read_text())["cells"]) == set(cells) - {"plain-8-0"}
    (folder / "settings.json").write_text("{}")
    code, errors = run("table1", folder)
    assert code == 2 and "choose another --output_dir" in errors and "Traceback" not in errors
