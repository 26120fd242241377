"""Theorems 1 and 2 as `examples/reproduce` measures them: the formulas they rest on, and their smoke runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import importing_from, run_script
from torch.distributions import MultivariateNormal
from torch.func import grad

EXAMPLES = Path(__file__).parents[1] / "examples" / "reproduce"
with importing_from(EXAMPLES):
    import theorem1
    import theorem2

GAMMA = 0.1


def run(script: str, output_dir: Path) -> tuple[dict, str]:
    """Cells and table of a smoke run."""
    code, _, errors = run_script(EXAMPLES / script, "--scale", "smoke", "--output_dir", output_dir)
    assert code == 0, errors
    assert (output_dir / script).with_suffix(".png").stat().st_size > 5000
    return json.loads((output_dir / "results.json").read_text())["cells"], (output_dir / "table.md").read_text()


# ----------------------------------------------------------------------------------------------------- Theorem 1


@pytest.fixture
def energy():
    mean, covariance, _, _ = theorem1.data_of_rank(6, 3)
    return theorem1.AffineEnergy(4, GAMMA, mean, covariance)


def points_with(mean, covariance):
    """2 d points whose mean and covariance are exactly these: mean +- sqrt(d) times columns of a square root."""
    eigenvalues, directions = torch.linalg.eigh(covariance)
    offsets = (directions * (len(mean) * eigenvalues.clamp(min=0)).sqrt()).T
    return torch.cat([mean + offsets, mean - offsets])


def test_the_energy_is_the_expected_loss_of_the_class(energy):
    """At random parameters, against `forward` over data of that mean and covariance and 200,000 draws of the noise."""
    with torch.no_grad():
        for name, value in energy.unflatten(theorem1.random_starts(energy, 3, seed=1)[1]).items():
            energy.get_parameter(name).copy_(value)
        inputs = points_with(energy.mean, energy.covariance).repeat(200_000 // 12, 1)
        noise = torch.randn(len(inputs), 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
        output = energy.vae(inputs, noise=noise)
        expected, squared_error = energy()
        assert expected.item() == pytest.approx(output.loss.item(), rel=0.01)
        assert squared_error.item() == pytest.approx(output.squared_error.item(), rel=0.01)
        assert squared_error > 0.5 and output.kl > 0.1  # both terms count
        shifted = energy.vae(inputs + 0.3, noise=noise).loss  # other data, another energy
    assert shifted.item() != pytest.approx(expected.item(), rel=0.01)


@pytest.mark.parametrize("gamma", [0.05, 0.7, 5.0])  # below, among and above the eigenvalues
def test_the_optimum_is_the_ppca_likelihood_and_is_attained(gamma):
    mean, covariance, eigenvalues, directions = theorem1.data_of_rank(6, 3)
    optimum = theorem1.ppca_energy(eigenvalues, 4, gamma)
    loadings = theorem1.optimal_loadings(eigenvalues, directions, 4, gamma)
    model = MultivariateNormal(mean, loadings @ loadings.T + gamma * torch.eye(6, dtype=torch.double))
    assert optimum == pytest.approx(-model.log_prob(points_with(mean, covariance)).mean().item(), rel=1e-10)
    energy = theorem1.AffineEnergy(4, gamma, mean, covariance)
    point = theorem1.conditional_point(energy, loadings)
    assert energy.at(point)[0].item() == pytest.approx(optimum, rel=1e-6)  # gamma is a float32 in the class
    assert theorem1.curvatures(energy, point)[0] > -1e-8
    active = eigenvalues > gamma  # every active dimension leaves an error of gamma, every other one its variance
    error = gamma * active.sum() + eigenvalues[~active].sum()
    assert energy.at(point)[1].item() == pytest.approx(error.item(), rel=1e-6)


def test_the_conditional_point_is_the_best_for_its_loadings(energy):
    loadings = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    gradient = energy.unflatten(grad(lambda p: energy.at(p)[0])(theorem1.conditional_point(energy, loadings)))
    for name in ("vae.logvar", "vae.encoder.weight", "vae.encoder.bias", "vae.decoder.bias"):
        assert gradient[name].abs().max() < 1e-10, name
    assert gradient["vae.decoder.weight"].abs().max() > 0.1


def test_flatten_undoes_unflatten(energy):
    points = theorem1.random_starts(energy, 3, seed=0)
    assert torch.equal(energy.flatten(energy.unflatten(points), 3), points)


def test_descend_minimises_and_tells_apart_what_it_cannot():
    """Rosenbrock's valley has one minimum; the double well keeps every start in its own half."""

    def valley(points):
        x, y = points.T
        value = (1 - x) ** 2 + 100 * (y - x**2) ** 2
        return value, torch.stack([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)], dim=1)

    starts = torch.tensor([[-1.2, 1.0], [2.0, -2.0], [0.0, 0.0]], dtype=torch.double)
    points, energies = theorem1.descend(valley, starts)
    torch.testing.assert_close(points, torch.ones_like(points), rtol=0, atol=1e-5)
    assert (energies.diff(dim=0) <= 0).all()

    def wells(points):  # the left one is higher: a local minimum that is not global
        value = ((points**2 - 1) ** 2 + 0.2 * points).sum(1)
        return value, 4 * points * (points**2 - 1) + 0.2

    points, energies = theorem1.descend(wells, torch.tensor([[-1.3], [1.3]], dtype=torch.double))
    assert points[0] < -0.9 and points[1] > 0.9 and energies[-1, 1] > energies[-1, 0] + 0.3


def test_theorem_1_smoke(tmp_path):
    cells, table = run("theorem1.py", tmp_path)
    for latent_dim, cell in ((3, cells["d4-kappa3-r2"]), (4, cells["d6-kappa4-r2"])):
        assert cell["fraction_at_optimum"] == 1 and cell["active_units"] == [2]
        assert cell["supports"] == cell["possible_supports"] == math.comb(latent_dim, 2)
        assert cell["worst_gap"][0] > 10 and cell["worst_gap"][-1] < 1e-4  # the starts were not the answer
        # Local minima: curved upwards but for the directions in which the data have no variance.
        assert cell["flat_directions"] == [cell["expected_flat_directions"]]
        assert cell["lowest_curvature"] > -1e-8 and cell["lowest_other_curvature"] > 0.01
        # Two of them are separated by a saddle with one way down on either side.
        assert cell["pass_gradient"] < 1e-10 and cell["pass_descents"] == 1 and cell["pass_height"] > 0.1
    assert cells["gamma-10"]["active_units"] == [0] and cells["gamma-0.01"]["active_units"] == [2]
    assert cells["gamma-0.01"]["squared_error"] == pytest.approx(2 * 0.01, rel=1e-3)
    assert "| 4, 3, 2 | 20 |" in table


# ----------------------------------------------------------------------------------------------------- Theorem 2


def test_the_lowest_curvature_is_that_of_the_loss():
    """The loss falls along the Hessian's lowest eigenvector only where the answer is negative: gamma decides."""
    inputs = theorem2.digits()[:50].double()
    assert theorem2.lowest_curvature(1, 8, True, inputs) < -0.05
    # Data without correlation to find: every direction costs energy, or nothing.
    assert theorem2.lowest_curvature(1, 8, True, inputs.mean(0).expand(50, -1)) > -1e-8


def test_theorem_2_smoke(tmp_path):
    cells, table = run("theorem2.py", tmp_path)
    for blocks in (1, 4):
        cases = cells[f"gradients-{blocks}"]["cases"]
        for case in ("all silent", "one silent", "skip, W_x = 0"):
            assert cases[case]["head of mu"] == cases[case]["head of log sigma^2"] == 0, case
            assert cases[case]["first layer"] < 1e-12 * cases[case]["all first layer"], case
        assert cases["one silent"]["all heads"] > 0.1  # the other units do learn
        # What the theorem leaves unsaid: its gradient is an expectation, and the biases of the heads must be zero.
        one_draw = cases["one draw of the noise"]
        assert one_draw["head of mu"] == 0 and one_draw["first layer"] > 0.1 * one_draw["all first layer"]
        assert cases["bias of mu's head 0.3"]["head of mu"] > 0.01
        skip = cases["skip, W_x random"]  # Eq. (5)
        assert min(skip["head of mu"], skip["head of log sigma^2"]) > 1
        curvature = cells[f"curvature-{blocks}"]
        assert curvature["skip, W_x near 0"] < curvature["no skip"] < 0
    runs = [cell for name, cell in cells.items() if name.startswith("escape")]
    assert len(runs) == 8 and all(math.isfinite(loss) for run in runs for loss in run["loss"])
    assert {run["arm"] for run in runs} == set(theorem2.ARMS)
    assert "| 9 | skip, W_x random |" in table
