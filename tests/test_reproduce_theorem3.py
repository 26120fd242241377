"""The mathematics behind `examples/reproduce/theorem3.py`, and the script itself at its smallest scale."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import importing_from, run_script

from hf_vaeplus import PenalizedAutoencoderConfig, PenalizedAutoencoderModel

SCRIPT = Path(__file__).parents[1] / "examples" / "reproduce" / "theorem3.py"
BALANCED = [0.1, 0.25, 0.4, 0.5]  # powers for which t -> h(t^2) is concave


@pytest.fixture(scope="module")
def theorem3():
    with importing_from(SCRIPT.parent):
        import theorem3
    return theorem3


def test_optima_in_closed_form(theorem3):
    variances, d, kappa = theorem3.factor_variances(3), 7, 10
    # Identity, orthonormal columns: every code is halved. sqrt: the square-root lasso, exact.
    energy, error = theorem3.global_optimum("orthonormal", d, kappa, variances, "power", 1)
    assert energy == pytest.approx(variances.sum() / (2 * d), rel=1e-6)
    assert error == pytest.approx(variances.sum() / (4 * d), rel=1e-2)
    for theta in ("orthonormal", "unit_columns"):
        energy, error = theorem3.global_optimum(theta, d, kappa, variances, "power", 0.5)
        assert energy == pytest.approx(np.sqrt(variances).sum() / d) and error == 0
    # Identity, unit columns, one factor: (s - m)^2 + m^2 / kappa is least at m = s kappa / (kappa + 1).
    energy, error = theorem3.global_optimum("unit_columns", d, kappa, np.ones(1), "power", 1)
    assert energy == pytest.approx(1 / (kappa + 1) / d, rel=1e-5)
    assert error == pytest.approx(1 / (kappa + 1) ** 2 / d, rel=1e-2)


@pytest.mark.parametrize("kind_value", [("power", p) for p in (1, 0.75, *BALANCED)] + [("log", 1e-2), ("log", 1e-4)])
def test_derived_optimum_is_below_every_reconstruction(theorem3, kind_value):
    variances, d, kappa = theorem3.factor_variances(2), 5, 4
    energy, _ = theorem3.global_optimum("orthonormal", d, kappa, variances, *kind_value)
    kept = np.random.default_rng(0).uniform(-0.5, 1.5, (20_000, 2)).clip(0, 1) * np.sqrt(variances)
    h = lambda u: theorem3.h(u, *kind_value)  # noqa: E731
    others = h(((np.sqrt(variances) - kept) ** 2).sum(1) / d) + (h(kept**2).sum(1) + 2 * h(0.0)) / d
    assert energy <= others.min() + 1e-9
    assert others.min() - energy < 0.02 * np.ptp(others)
    assert energy <= theorem3.balanced_energy(variances, d, kappa, *kind_value) + 1e-12


@pytest.mark.parametrize("theta", ["orthonormal", "unit_columns"])
@pytest.mark.parametrize("kind_value", [("power", p) for p in (1, 0.75, *BALANCED)])
def test_no_model_falls_below_the_derived_optimum(theorem3, theta, kind_value):
    # The inequalities of Mirsky, Schur, Rotfel'd and Jensen at work: random models, near the balanced one and far.
    d, kappa, r = 5, 8, 2
    inputs, variances = theorem3.linear_data(d, r), theorem3.factor_variances(r)
    energy, _ = theorem3.global_optimum(theta, d, kappa, variances, *kind_value)
    torch.manual_seed(0)
    fields = theorem3.penalty_fields(*kind_value)
    config = PenalizedAutoencoderConfig(
        input_shape=(d,), latent_dim=kappa, network="affine", constraint=theta, **fields
    )
    model = PenalizedAutoencoderModel(config).double()
    with torch.no_grad():
        for _ in range(100):
            model.decoder.weight.normal_()
            scale = torch.rand(kappa, 1).double() * (torch.rand(kappa, 1) < 0.6)
            model.encoder.weight.copy_(scale * torch.linalg.pinv(model.decoder.constrained_weight))
            assert model(inputs).loss >= energy - 1e-9


@pytest.mark.parametrize("power", BALANCED)
def test_balanced_is_optimal_where_h_of_the_square_is_concave(theorem3, power):
    variances = theorem3.factor_variances(4)
    energy, error = theorem3.global_optimum("orthonormal", 5, 6, variances, "power", power)
    assert error == 0 and energy == pytest.approx(theorem3.balanced_energy(variances, 5, 6, "power", power))


@pytest.mark.parametrize("kind_value", [("power", 1), ("power", 0.9), ("power", 0.6), ("log", 1), ("log", 1e-4)])
def test_balanced_is_not_optimal_otherwise(theorem3, kind_value):
    variances = theorem3.factor_variances(4)
    energy, error = theorem3.global_optimum("orthonormal", 5, 6, variances, *kind_value)
    assert error > 0 and energy < theorem3.balanced_energy(variances, 5, 6, *kind_value)


def test_error_of_the_log_falls_with_the_square_of_eps(theorem3):
    variances = theorem3.factor_variances(3)
    errors = [theorem3.global_optimum("orthonormal", 8, 8, variances, "log", eps)[1] for eps in (1e-4, 1e-5)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.2)


def test_linear_data_have_the_variances_they_claim(theorem3):
    inputs = theorem3.linear_data(6, 3).numpy()
    eigenvalues = np.linalg.eigvalsh(inputs.T @ inputs / len(inputs))[::-1]
    np.testing.assert_allclose(eigenvalues, [*theorem3.factor_variances(3), 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(inputs.mean(0), 0, atol=1e-12)


def test_smoke(tmp_path):
    code, _, errors = run_script(SCRIPT, "--scale", "smoke", "--output_dir", tmp_path)
    assert code == 0, errors
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    problem = "orthonormal-d6-kappa8-r2"
    identity, root, log = (cells[f"{problem}-{name}"] for name in ("power1", "power0.5", "log0.01"))
    assert identity["active_found"] == 8 and identity["unexplained_found"] == pytest.approx(0.25, abs=1e-3)
    assert root["active_found"] == 2 and root["unexplained_found"] < 1e-6
    assert log["unexplained_found"] > 1e-4
    for cell in cells.values():
        if cell["energy_optimum"] is not None:
            assert cell["energy_optimum"] - 1e-6 <= cell["energy_found"] <= cell["energy_optimum"] + 5e-3
    assert cells["unit_columns-d6-kappa8-r2-power0.5"]["active_found"] > 2  # ties: split rows cost the same
    assert (tmp_path / "theorem3.png").stat().st_size > 10_000
    assert "| √u | 2; 0.00%;" in (tmp_path / "table.md").read_text()
