"""Moments that are gathered in batches against torch.mean and torch.cov of all rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vaeplus.metrics.running import RunningMoments


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gathered(batches, covariance: bool = True) -> RunningMoments:
    moments = RunningMoments(batches[0].shape[1], covariance)
    for batch in batches:
        moments.update(batch)
    return moments


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_any_split_gives_the_moments_of_all_rows(sizes, dim, seed):
    rows = 3 * draw(sum(sizes) + 1, dim, seed=seed) + 10
    moments, diagonal = (gathered(rows.split([*sizes, 1]), covariance) for covariance in (True, False))
    assert moments.count == diagonal.count == len(rows)
    for each in (moments, diagonal):
        torch.testing.assert_close(each.mean, rows.mean(0))
        torch.testing.assert_close(each.variance, rows.var(0))
    torch.testing.assert_close(moments.covariance, torch.cov(rows.T).reshape(dim, dim))


def test_two_rows_by_hand():
    moments = gathered([torch.tensor([[0, 1]]), torch.tensor([[2, 5]])])  # integers, one row at a time
    assert moments.mean.tolist() == [1, 3]
    assert moments.covariance.tolist() == [[2, 4], [4, 8]]
    assert moments.covariance.dtype == moments.mean.dtype == torch.float64


def test_a_mean_far_from_zero_costs_no_precision():
    rows = draw(1000, 3)
    far = gathered((rows + 2.0**26).split(100))  # raw squares would keep no digit: 2^52 against spreads of 1
    torch.testing.assert_close(far.covariance, torch.cov(rows.T), rtol=1e-6, atol=1e-6)


def test_float32_rows_are_summed_in_float64():
    rows = (draw(4096, 2) + 1000).float()
    torch.testing.assert_close(gathered(rows.split(64)).mean, rows.double().mean(0), rtol=1e-13, atol=0)


def test_moments_read_out_are_not_changed_by_later_rows():
    moments = gathered([draw(5, 2)])
    read = moments.mean, moments.covariance, moments.variance
    before = [each.clone() for each in read]
    moments.update(draw(5, 2, seed=1))
    for each, kept in zip(read, before, strict=True):
        assert torch.equal(each, kept)


@pytest.mark.parametrize("shape", [(4,), (0, 3), (2, 4), (2, 3, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"rows must have shape \(num_rows >= 1, 3\)"):
        RunningMoments(3).update(torch.zeros(shape))


def test_a_row_that_is_not_finite_is_refused_and_leaves_nothing_behind():
    moments = gathered([draw(5, 2)])
    before = moments.mean
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="must be finite"):
            moments.update(torch.tensor([[0.0, bad]]))
    assert moments.count == 5 and torch.equal(moments.mean, before)


def test_too_few_rows_are_refused():
    empty, single = RunningMoments(2), gathered([draw(1, 2)])
    single.mean  # noqa: B018 one row has a mean
    for read in (lambda: empty.mean, lambda: single.covariance, lambda: single.variance):
        with pytest.raises(ValueError, match=r"at least \d rows, got [01]"):
            read()
    with pytest.raises(ValueError, match="covariance=True"):
        gathered([draw(5, 2)], covariance=False).covariance  # noqa: B018
