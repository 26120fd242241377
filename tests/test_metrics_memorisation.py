"""The guard against copies: what held-out images score, what copies score, and when it cannot tell."""

import math

import pytest
import torch
from scipy.spatial import cKDTree
from scipy.stats import betabinom
from sklearn.datasets import load_digits

from hf_vaeplus.metrics.memorisation import MemorisationGuard


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    rows = torch.from_numpy(load_digits().data)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def test_nearest_distances_are_those_of_scipy(digits):
    training, others = digits[:900], digits[900:]
    expected, _ = cKDTree(training.numpy()).query(others.numpy())
    found = MemorisationGuard(training, others).nearest(others)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=0)


def test_four_points_by_hand():
    # Held-out distances 1, 2, 3, 4: a quarter of them is at most 1.
    guard = MemorisationGuard(torch.zeros(1, 1), torch.tensor([[1.0], [-2.0], [3.0], [4.0]]), quantile=0.25)
    assert guard.threshold == 1 and guard.copies == 0 and guard.reach == 1 and guard.sees
    found = guard.compare(torch.tensor([[0.0], [0.5], [-0.9], [1.0], [1.1]]))
    assert found["share"] == 0.8 and not found["flagged"]  # of five samples this says little
    assert found["limit"] == pytest.approx(0.25 + 5 * math.sqrt(0.25 * 0.75 * (1 / 5 + 1 / 4)))


@pytest.mark.parametrize("count", [20, 100, 140, 333])
def test_held_out_images_score_the_quantile(digits, count):
    black_and_white = (digits > 7).double()  # distances are roots of small whole numbers: many are equal
    for rows in (digits, black_and_white, draw(1797, 8)):
        guard = MemorisationGuard(rows[:1000], rows[1000 : 1000 + count])
        assert guard.compare(rows[1000 : 1000 + count])["share"] == pytest.approx(0.05, abs=1e-12)


def test_copies_score_everything_and_fresh_images_little(digits):
    black_and_white = (digits > 7).double()
    for rows in (digits, black_and_white):
        guard = MemorisationGuard(rows[:900], rows[900:1300])
        fresh, copies = guard.compare(rows[1300:]), guard.compare(rows[:400])
        assert fresh["share"] < 0.1 and not fresh["flagged"]
        assert copies["share"] > 0.95 and copies["flagged"]
        assert guard.compare(torch.cat([rows[:100], rows[1300:]]))["flagged"]  # a sixth are copies


def test_a_smoothed_bootstrap_is_flagged_until_its_noise_hides_the_copies():
    training, held_out = draw(2000, 16), draw(1000, 16, seed=1)
    guard, noise = MemorisationGuard(training, held_out), draw(1000, 16, seed=2)
    shares = [guard.compare(training[:1000] + width * noise)["share"] for width in (0.0, 0.1, 0.3, 0.5, 1.0)]
    assert shares == sorted(shares, reverse=True) and shares[2] > 0.9 and shares[-1] < 0.05


def test_the_share_is_random_as_a_beta_binomial_and_its_limit_far_out():
    """Whatever the law, the share of fresh images below the k-th of n held-out ones has one distribution."""
    training, count = draw(300, 3), 200
    shares = [
        MemorisationGuard(training, draw(count, 3, seed=seed)).compare(draw(count, 3, seed=1000 + seed))
        for seed in range(1, 100)
    ]
    law = betabinom(count, 10, count + 1 - 10)
    values = torch.tensor([each["share"] for each in shares]) * count
    assert abs(values.mean() - law.mean()) < 4 * law.std() / math.sqrt(len(values))
    assert float(values.std()) == pytest.approx(law.std(), rel=0.25)
    for images, (each,) in {1000: {0.1}, count: {shares[0]["limit"]}}.items():
        rank = images // 20
        assert betabinom(images, rank, images + 1 - rank).sf(each * images) < 2e-4


def test_it_says_when_held_out_images_are_training_images(digits):
    rows = digits[:600]
    blind = MemorisationGuard(rows, rows[:300])
    assert (blind.copies, blind.threshold, blind.sees) == (1, 0, False)
    assert not blind.compare(rows)["flagged"]
    some = MemorisationGuard(rows, torch.cat([rows[:10], digits[600:890]]))  # 10 of 300: fewer than 5%
    assert some.copies == pytest.approx(1 / 30) and some.reach == 1 and some.compare(rows)["flagged"]
    several = MemorisationGuard(rows, torch.cat([rows[:27], digits[600:873]]))  # 9%
    assert several.copies == pytest.approx(0.09) and several.reach == pytest.approx(0.05 / 0.09) and several.sees
    assert several.compare(rows)["share"] == pytest.approx(several.reach) and several.compare(rows)["flagged"]
    assert several.compare(digits[900:1200])["share"] < 0.05


def test_the_rounding_of_another_batch_is_no_distance():
    training = 100 + draw(500, 30).float()  # far from the origin, where float32 is coarse
    guard = MemorisationGuard(training, training[:50] + 2e-5 * draw(50, 30).float())
    assert guard.copies == 1 and not guard.sees


@pytest.mark.parametrize(
    "training, held_out, quantile, message",
    [
        ((0, 2), (4, 2), 0.05, "training must have shape .num_rows >= 1, dim., got .0, 2."),
        ((4, 2), (1, 2), 0.05, "held_out must have shape .num_rows >= 2, 2., got .1, 2."),
        ((4, 2), (4, 3), 0.05, "held_out must have shape .num_rows >= 2, 2., got .4, 3."),
        ((4, 2), (4, 2), 0.0, "quantile must lie in .0, 0.5., got 0.0"),
        ((4, 2), (4, 2), 0.6, "quantile must lie in .0, 0.5., got 0.6"),
    ],
)
def test_what_cannot_be_compared_is_refused(training, held_out, quantile, message):
    with pytest.raises(ValueError, match=message):
        MemorisationGuard(torch.zeros(training), torch.zeros(held_out), quantile)


def test_infinite_samples_are_refused():
    with pytest.raises(ValueError, match="rows must be finite"):
        MemorisationGuard(draw(5, 2), draw(5, 2, seed=1)).compare(draw(5, 2) / 0)
