"""Frechet and kernel distances against their textbook formulas, closed forms for Gaussians, and known faults."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vaeplus.metrics.frechet import frechet_distance
from hf_vaeplus.metrics.kernel import kernel_distance
from hf_vaeplus.metrics.running import RunningMoments

SETS = {"num_rows": st.integers(2, 30), "dim": st.integers(1, 8), "seed": st.integers(0, 2**31)}


def features(num_rows: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=source, dtype=torch.float64)
    return scale * torch.randn(num_rows, dim, generator=source, dtype=torch.float64) @ mixing + shift


def moments(rows: torch.Tensor) -> RunningMoments:
    result = RunningMoments(rows.shape[1])
    for batch in rows.split(7):
        result.update(batch)
    return result


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return frechet_distance(moments(x), moments(y))


def exact(rows: torch.Tensor, mean, covariance) -> torch.Tensor:
    """`rows`, moved so that their mean and covariance are these."""
    rows = rows - rows.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(rows.T.cov()), rows.T, upper=False).T
    return whitened @ torch.linalg.cholesky(covariance).T + torch.as_tensor(mean, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------- Frechet


@pytest.mark.parametrize("seed", range(5))
def test_frechet_equals_the_formula_with_a_matrix_square_root(seed):
    x, y = features(60, 9, seed), features(50, 9, seed + 100, scale=1.3, shift=0.5)
    cov_x, cov_y = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(cov_x + cov_y - 2 * root)
    assert distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_known_gaussians():
    base = features(40, 2, 0)
    # Diagonal covariances: |(3, 4)|^2 + (3 - 1)^2 + (2 - 5)^2.
    x = exact(base, [0.0, 0.0], torch.diag(torch.tensor([9.0, 4.0], dtype=torch.float64)))
    y = exact(base, [3.0, 4.0], torch.diag(torch.tensor([1.0, 25.0], dtype=torch.float64)))
    assert distance(x, y) == pytest.approx(38.0, rel=1e-12)
    # Not commuting: tr((AB)^(1/2)) = sqrt(tr(AB) + 2 sqrt(det(AB))) for 2 x 2; tr AB = 10, det AB = 3 * 4.
    a = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    b = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    expected = 4 + 5 - 2 * (10 + 2 * 12**0.5) ** 0.5
    assert distance(exact(base, [0.0, 0.0], a), exact(base, [0.0, 0.0], b)) == pytest.approx(expected, rel=1e-12)


def test_frechet_golden_number():
    x = torch.sin(torch.arange(40 * 3, dtype=torch.float64) ** 1.1).reshape(40, 3)
    y = torch.cos(torch.arange(30 * 3, dtype=torch.float64) ** 1.2).reshape(30, 3)
    assert distance(x, y) == pytest.approx(0.718639980990684, rel=1e-9)


@given(**SETS)
@settings(max_examples=60, deadline=None)
def test_frechet_is_symmetric_zero_for_itself_and_moves_with_the_mean(num_rows, dim, seed):
    x, y = features(num_rows, dim, seed), features(num_rows + 3, dim, seed + 1, scale=2.0)
    scale = float(x.square().sum() + y.square().sum())
    assert distance(x, y) == pytest.approx(distance(y, x), abs=1e-12 * scale)
    assert distance(x, x) == pytest.approx(0, abs=1e-12 * scale)
    shift = torch.linspace(1, 2, dim, dtype=torch.float64)
    assert distance(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)
    assert distance(x + shift, y + shift) == pytest.approx(distance(x, y), rel=1e-6, abs=1e-11 * scale)


def test_singular_covariances_leave_no_noise():
    x, y = features(5, 300, 0), features(7, 300, 1)  # ranks 4 and 6 of 300
    assert distance(x, x) <= 1e-9 and distance(x, x + 1) == pytest.approx(300, rel=1e-9)
    cross = torch.linalg.svdvals((x - x.mean(0)) @ (y - y.mean(0)).T).sum() / (4 * 6) ** 0.5
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * cross
    assert distance(x, y) == pytest.approx(float(expected), rel=1e-12)
    constant = torch.ones(4, 3)
    assert distance(constant, constant + 2) == 12


def test_direction_of_frechet():
    x, real = features(2000, 4, 0), features(2000, 4, 0)[torch.randperm(2000, generator=torch.Generator())[:1000]]
    noise = features(1000, 4, 5)
    steps = [distance(x, real + strength * noise) for strength in (0, 0.5, 1, 2)]
    assert steps == sorted(steps) and distance(x, real[:1].expand(1000, -1)) > 10 * steps[0]


def test_frechet_refuses_other_moments():
    with pytest.raises(ValueError, match="one dimension, got 3 and 4"):
        distance(torch.rand(5, 3), torch.rand(5, 4))
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        distance(torch.rand(5, 3), torch.rand(1, 3))


# -------------------------------------------------------------------------------------------------------------- kernel


def naive_mmd(x, y):
    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    count = len(x)
    within = sum(kernel(rows[i], rows[j]) for rows in (x, y) for i in range(count) for j in range(count) if i != j)
    between = sum(kernel(a, b) for a in x for b in y)
    return within / (count * (count - 1)) - 2 * between / count**2


@given(**SETS)
@settings(max_examples=20, deadline=None)
def test_kernel_distance_of_whole_sets_is_the_sum_over_pairs(num_rows, dim, seed):
    num_rows = min(num_rows, 8)
    x, y = features(num_rows, dim, seed), features(num_rows, dim, seed + 1)
    expected = naive_mmd(x, y)
    scale = float((x.square().mean(1).max() + y.square().mean(1).max() + 1) ** 3)
    mean, deviation = kernel_distance(x, y, num_subsets=3, subset_size=num_rows)
    assert mean == pytest.approx(expected, abs=1e-12 * scale) and deviation < 1e-12 * scale
    assert kernel_distance(y, x, num_subsets=1, subset_size=num_rows)[0] == pytest.approx(mean, abs=1e-12 * scale)


def test_kernel_distance_of_known_rows():
    # dim 1, x = {0, 1}, y = {2, 2}: k(x1, x2) = 1, k(y1, y2) = 125, k(x, y) = 1 and 27: 1 + 125 - 2 * 14.
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [2.0]])
    assert kernel_distance(x, y, num_subsets=4, subset_size=2) == (98.0, 0.0)


def test_mean_and_deviation_are_those_of_the_subsets():
    x, y = features(40, 3, 0), features(40, 3, 1)
    mean, deviation = kernel_distance(x, y, num_subsets=2, subset_size=10)  # of two: their middle and half distance
    first, none = kernel_distance(x, y, num_subsets=1, subset_size=10)
    assert abs(first - mean) == pytest.approx(deviation, rel=1e-9) and deviation > none == 0


def test_kernel_distance_is_unbiased():
    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(20_000, 3, generator=source), torch.randn(20_000, 3, generator=source)
    options = {"num_subsets": 2000, "subset_size": 10}
    mean, deviation = kernel_distance(x, y, **options)
    assert abs(mean) < 4 * deviation / 2000**0.5 < 0.1
    # The kernel compares raw moments of order 1, 2, 3, weighted 3 / d, 3 / d^2, 1 / d^3. For N(0, I) and N(1, I) they
    # differ by 1 everywhere, 1 everywhere, and 1 + d_ij + d_jk + d_ik: 3 * 3 / 3 + 3 * 9 / 9 + (48 + 72 + 6) / 27.
    mean, deviation = kernel_distance(x, y + 1, **options)
    assert mean == pytest.approx(32 / 3, abs=4 * deviation / 2000**0.5)


def test_direction_and_seed_of_kernel_distance():
    source = torch.Generator().manual_seed(1)
    x, y, noise = (torch.randn(500, 6, generator=source) for _ in range(3))
    options = {"num_subsets": 20, "subset_size": 200}
    steps = [kernel_distance(x, y + strength * noise, **options)[0] for strength in (0, 0.7, 1.5, 3)]
    assert steps == sorted(steps) and abs(steps[0]) < 0.1 * steps[1]
    assert kernel_distance(x, x[:1].expand(500, -1), **options)[0] > 10 * abs(steps[0])
    one, same, other = (kernel_distance(x, y, **options, seed=seed) for seed in (0, 0, 1))
    assert one == same != other


def test_kernel_golden_number():
    x = torch.sin(torch.arange(40 * 3, dtype=torch.float64) ** 1.1).reshape(40, 3)
    y = torch.cos(torch.arange(30 * 3, dtype=torch.float64) ** 1.2).reshape(30, 3)
    assert kernel_distance(x[:30], y, num_subsets=2, subset_size=30)[0] == pytest.approx(0.377832576562533, rel=1e-9)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.rand(9, 4), {}, "one dim"),
        (torch.rand(9), {}, "one dim"),
        (torch.rand(9, 3), {"subset_size": 10}, "subset_size from 2"),
        (torch.rand(9, 3), {"subset_size": 1}, "subset_size from 2"),
        (torch.rand(9, 3), {"num_subsets": 0}, "at least 1"),
        (torch.full((9, 3), torch.nan), {}, "finite"),
    ],
)
def test_kernel_distance_refuses(x, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(x, torch.rand(20, 3), **{"num_subsets": 2, "subset_size": 5} | options)
