"""The sliced Wasserstein distance against torch-fidelity's MIND, SciPy's transport, and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance

from hf_vaeplus.metrics.frechet import frechet_distance
from hf_vaeplus.metrics.running import RunningMoments
from hf_vaeplus.metrics.sliced import sliced_wasserstein, sliced_wasserstein_of_halves


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frechet(x: torch.Tensor, y: torch.Tensor) -> float:
    moments = [RunningMoments(x.shape[1]) for _ in range(2)]
    for each, rows in zip(moments, (x, y), strict=True):
        each.update(rows)
    return frechet_distance(*moments)


# Of `mind_features_to_metric` of toshas/torch-fidelity at commit 5e211a95, rng_seed=2020, which computes in float32.
def test_equals_mind_of_torch_fidelity():
    i = torch.arange(160, dtype=torch.float64).reshape(40, 4)
    x, y = (1.7 * i * i).sin(), 0.8 * (0.9 * i * i).cos() + 0.2
    assert sliced_wasserstein(x, y, num_projections=1_000, seed=2020) == pytest.approx(1.5455140, rel=1e-6)


@given(num_x=st.integers(1, 7), num_y=st.integers(1, 7), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_in_one_dimension_it_is_scipys_optimal_transport(num_x, num_y, seed):
    x, y = draw(num_x, 1, seed=seed), 2 * draw(num_y, 1, seed=seed + 1) + 1
    # Each row as often as makes the sets equally large: then the plan is an assignment.
    many_x, many_y = x.repeat_interleave(num_y, 0).numpy(), y.repeat_interleave(num_x, 0).numpy()
    cost = (many_x - many_y.T) ** 2
    expected = cost[linear_sum_assignment(cost)].mean()
    assert sliced_wasserstein(x, y, num_projections=3) == pytest.approx(3 * expected, rel=1e-10)


def test_where_all_distances_are_0_or_1_it_is_scipys_wasserstein_distance():
    x, y = np.random.default_rng(0).integers(2, size=(2, 50, 1))
    expected = wasserstein_distance(x[:, 0], y[:37, 0])
    found = sliced_wasserstein(torch.from_numpy(x), torch.from_numpy(y[:37]))
    assert expected > 0.02 and found == pytest.approx(3 * expected, rel=1e-10)


@pytest.mark.parametrize("shift, scale", [(0.0, 1.5), (0.5, 1.0), (0.3, 0.6)])
def test_gaussians_have_their_closed_form(shift, scale):
    """W2^2 of N(m, s^2) and N(0, 1) is m^2 + (s - 1)^2; along u the mean of N(m, s^2 I) is u.m."""
    a, b = (torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None] for n in (4001, 3000))
    expected = shift**2 + (scale - 1) ** 2
    assert sliced_wasserstein(a, scale * b + shift, 2) == pytest.approx(3 * expected, rel=3e-3)
    x, y = draw(3_000, 6), scale * draw(3_000, 6, seed=1) + shift
    assert sliced_wasserstein(x, y) == pytest.approx(3 * 6 * expected, rel=0.12)  # |m|^2 = 6 shift^2


def test_a_correlated_gaussian_has_its_closed_form():
    """Along u the standard deviation of N(0, S) is sqrt(u.S u), averaged here over directions of its own."""
    factor = draw(4, 4, seed=3)
    u = torch.nn.functional.normalize(draw(100_000, 4, seed=4))
    expected = 3 * 4 * ((u @ factor).norm(dim=1) - 1).square().mean()
    found = sliced_wasserstein(draw(3_000, 4), draw(3_000, 4, seed=1) @ factor.T)
    assert found == pytest.approx(float(expected), rel=0.1)


def test_equal_moments_do_not_deceive_it():
    """Two bells at -3 and 3 against one Gaussian of their mean and covariance: Frechet sees nothing."""
    modes = draw(2000, 3) + 3 * torch.where(torch.arange(2000) % 2 == 0, -1.0, 1.0)[:, None]
    factor = torch.linalg.cholesky(modes.T.cov())
    noise, other = draw(2000, 3, seed=1), draw(2000, 3, seed=2)
    noise = (noise - noise.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(noise.T.cov())).T
    noise = noise @ factor.T + modes.mean(0)
    real = other + 3 * torch.where(torch.arange(2000) % 2 == 0, -1.0, 1.0)[:, None]
    assert frechet(modes, noise) < 1e-9 < frechet(modes, real)
    assert sliced_wasserstein(modes, noise) > 10 * sliced_wasserstein(modes, real)


def test_symmetric_zero_for_itself_and_blind_to_order_and_a_common_offset():
    x, y = draw(30, 5), draw(45, 5, seed=1)
    distance = sliced_wasserstein(x, y)
    assert sliced_wasserstein(y.flip(0), x) == pytest.approx(distance, rel=1e-12)
    assert sliced_wasserstein(x + 2.0**20, y + 2.0**20) == pytest.approx(distance, rel=1e-6)
    assert sliced_wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-25)
    assert sliced_wasserstein(x, x.repeat(3, 1)) == pytest.approx(0, abs=1e-25)  # the same law


def test_halves_vary_as_two_sets_of_one_law_do():
    halves = sliced_wasserstein_of_halves(draw(400, 5))
    others = torch.tensor([sliced_wasserstein(*draw(2, 200, 5, seed=seed), 100) for seed in range(20)])
    error = math.sqrt((halves.var() + others.var()) / 20)
    assert len(halves) == 20 and abs(halves.mean() - others.mean()) < 4 * error
    assert halves.std() > 0 and torch.equal(sliced_wasserstein_of_halves(draw(400, 5)), halves)


@pytest.mark.parametrize(
    "x, y, count, message",
    [
        ((4, 3), (4, 2), 10, "y must have shape .num_rows >= 1, 3., got .4, 2."),
        ((0, 3), (4, 3), 10, "x must have shape"),
        ((4,), (4, 3), 10, "x must have shape"),
        ((4, 3), (4, 3), 0, "num_projections must be at least 1, got 0"),
    ],
)
def test_other_shapes_are_refused(x, y, count, message):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(torch.zeros(x), torch.zeros(y), count)


def test_infinite_features_are_refused():
    with pytest.raises(ValueError, match="y must be finite"):
        sliced_wasserstein(draw(3, 2), draw(3, 2).log())
