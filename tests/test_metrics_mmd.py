"""The MMD of WAE against loops, pythae's code and its own laws: no bias, the right direction, usable gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vaeplus.metrics import mmd
from hf_vaeplus.metrics.mmd import WAE_SCALES, imq_mmd


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(x: list[list[float]], y: list[list[float]], prior_variance: float, scales: list[float]) -> float:
    def k(a, b):
        widths = [scale * 2 * len(a) * prior_variance for scale in scales]
        return sum(width / (width + math.dist(a, b) ** 2) for width in widths)

    def within(rows):
        pairs = [k(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


# ---------------------------------------------------------------------------------------------------- the numbers


@given(
    num_x=st.integers(2, 7),
    num_y=st.integers(2, 7),
    dim=st.integers(1, 5),
    prior_variance=st.floats(0.1, 4),
    scales=st.lists(st.floats(0.1, 10), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_loops(num_x, num_y, dim, prior_variance, scales, seed):
    x, y = 2 * draw(num_x, dim, seed=seed), draw(num_y, dim, seed=seed + 1) + 0.5
    expected = by_loops(x.tolist(), y.tolist(), prior_variance, scales)
    assert imq_mmd(x, y, prior_variance, scales).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


# Values of `WAE_MMD.loss_function` of clementchadebec/benchmark_VAE (pythae) at commit 6419e215, on these tensors in
# float64. There the width is named by a standard deviation, kernel_bandwidth**2 = prior_variance, the scales are the
# same by default, and both sets must have one size.
@pytest.mark.parametrize("bandwidth, golden", [(1.0, 0.6205193230941743), (0.7, 0.7027555747775915)])
def test_equals_pythae(bandwidth, golden):
    i = torch.arange(60, dtype=torch.float64).reshape(12, 5)
    x, y = 1.5 * (1.7 * i).sin(), (0.9 * i * i).cos() + 0.4
    assert imq_mmd(x, y, prior_variance=bandwidth**2).item() == pytest.approx(golden, rel=1e-12)


def test_two_points_by_hand():
    # C = 2: k is 1/3 within x (distance 2), 1 within y, and 2/3 in all four pairs across (distance 1).
    x, y = torch.tensor([[-1.0], [1.0]]), torch.zeros(2, 1)
    assert imq_mmd(x, y, scales=[1.0]).item() == pytest.approx(1 / 3 + 1 - 4 / 3, abs=1e-15)


def test_blocks_do_not_change_the_value_nor_the_gradient(monkeypatch):
    x, y = draw(50, 3).requires_grad_(), draw(31, 3, seed=1) + 0.3
    results = []
    for values in (1, 100, 2**20):  # one row, a few with a last short block, all at once
        monkeypatch.setattr(mmd, "_BLOCK_VALUES", values)
        value = imq_mmd(x, y)
        results.append((value.detach(), *torch.autograd.grad(value, x)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_float32_latents_are_measured_in_float64_even_under_autocast():
    x, y = draw(40, 6).float(), draw(40, 6, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        value = imq_mmd(x, y)
    assert value.dtype == torch.float64 and value.shape == ()
    assert value == imq_mmd(x.double(), y.double())


def test_a_common_offset_costs_no_precision():
    x, y = draw(30, 4), draw(30, 4, seed=1)
    assert imq_mmd(x + 2.0**20, y + 2.0**20).item() == pytest.approx(imq_mmd(x, y).item(), rel=1e-6)


# ------------------------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("shift, num_x, num_y", [(0.0, 16, 16), (0.0, 9, 25), (1.0, 5, 12)])
def test_unbiased(shift, num_x, num_y):
    """The mean over many small draws is that of the law: 0 without a shift, else the value of one large draw."""
    dim, repeats = 4, 500
    xs, ys = draw(repeats, num_x, dim) + shift, draw(repeats, num_y, dim, seed=1)
    values = torch.stack([imq_mmd(x, y) for x, y in zip(xs, ys, strict=True)])
    expected = imq_mmd(draw(3000, dim, seed=2) + shift, draw(3000, dim, seed=3)) if shift else 0.0
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(repeats)
    assert shift or values.min() < 0


def test_symmetric_and_blind_to_the_order_of_rows():
    x, y = draw(20, 3), draw(30, 3, seed=1)
    torch.testing.assert_close(imq_mmd(y.flip(0), x.flip(0)), imq_mmd(x, y))


def test_grows_with_the_difference():
    prior = draw(400, 8, seed=1)
    shifted = [imq_mmd(draw(400, 8) + shift, prior).item() for shift in (0.0, 0.2, 0.5, 1.0, 3.0)]
    narrowed = [imq_mmd(scale * draw(400, 8), prior).item() for scale in (1.0, 0.7, 0.4, 0.0)]
    for values in (shifted, narrowed):
        assert abs(values[0]) < 0.01 and values == sorted(values)
    far = imq_mmd(torch.zeros(10, 8), torch.full((10, 8), 1e6)).item()
    assert far == pytest.approx(2 * len(WAE_SCALES))  # the bound, and none of it NaN


# -------------------------------------------------------------------------------------------------- as a penalty


def test_gradients():
    x, y = draw(5, 3).requires_grad_(), draw(7, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(imq_mmd, (x, y))


def test_descent_takes_a_wrong_posterior_to_the_prior():
    prior = draw(256, 4, seed=1)
    z = (0.3 * draw(64, 4) + 2).float().requires_grad_()
    optimizer = torch.optim.SGD([z], lr=30.0)
    for _ in range(150):
        optimizer.zero_grad()
        imq_mmd(z, prior).backward()
        assert z.grad.dtype == torch.float32
        optimizer.step()
    assert imq_mmd(z, prior).abs() < 0.1
    mean, std = z.detach().double().mean(0), z.detach().double().std(0)
    torch.testing.assert_close(mean, prior.mean(0), rtol=0, atol=0.2)  # from 2
    torch.testing.assert_close(std, prior.std(0), rtol=0, atol=0.3)  # from 0.7


def test_equal_rows_have_finite_gradients():
    x = torch.zeros(4, 3, requires_grad=True)
    imq_mmd(x, draw(4, 3)).backward()
    assert x.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("x, y", [((1, 3), (4, 3)), ((4, 3), (1, 3)), ((4, 3), (4, 2)), ((4,), (4,)), ((), (4, 3))])
def test_other_shapes_are_refused(x, y):
    with pytest.raises(ValueError, match="num >= 2"):
        imq_mmd(torch.zeros(x), torch.zeros(y))


@pytest.mark.parametrize("settings", [{"prior_variance": 0.0}, {"scales": []}, {"scales": [1.0, -1.0]}])
def test_kernels_without_a_width_are_refused(settings):
    with pytest.raises(ValueError, match="must be positive"):
        imq_mmd(torch.zeros(2, 3), torch.zeros(2, 3), **settings)
