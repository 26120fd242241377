"""Precision, recall, density and coverage against the papers' formulas in loops, the authors' package and by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vaeplus.metrics import neighbours
from hf_vaeplus.metrics.prdc import NAMES, PRDC, standard_errors_below


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(found: dict) -> list[float]:
    return [found[name] for name in NAMES]


def by_loops(real: list[list[float]], fake: list[list[float]], k: int) -> list[float]:
    """Eqs. (1) to (3) of Naeem et al. (2020), with open balls."""

    def radii(rows):
        return [sorted(math.dist(a, b) for j, b in enumerate(rows) if j != i)[k - 1] for i, a in enumerate(rows)]

    of_real, of_fake = radii(real), radii(fake)
    inside = [[math.dist(a, b) < radius for b in fake] for a, radius in zip(real, of_real, strict=True)]
    recalled = [any(math.dist(a, b) < radius for b, radius in zip(fake, of_fake, strict=True)) for a in real]
    per_fake = [sum(column) for column in zip(*inside, strict=True)]
    precision = sum(count > 0 for count in per_fake) / len(fake)
    return [precision, sum(recalled) / len(real), sum(per_fake) / (k * len(fake)), sum(map(any, inside)) / len(real)]


# ---------------------------------------------------------------------------------------------------- the numbers


@given(
    num_real=st.integers(6, 12),
    num_fake=st.integers(6, 12),
    dim=st.integers(1, 4),
    k=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_loops(num_real, num_fake, dim, k, seed):
    real, fake = draw(num_real, dim, seed=seed), 0.7 * draw(num_fake, dim, seed=seed + 1) + 0.2
    assert numbers(PRDC(real, k).compare(fake)) == pytest.approx(by_loops(real.tolist(), fake.tolist(), k))


# Values of `compute_prdc` of the authors' package prdc 0.2 (clovaai/generative-evaluation-prdc), in float64.
@pytest.mark.parametrize(
    "k, golden", [(1, (0.55, 0.36, 0.725, 0.3)), (3, (0.95, 0.74, 0.8, 0.62)), (5, (1.0, 0.94, 1.355, 0.9))]
)
def test_equals_the_package_of_the_authors(k, golden):
    i = torch.arange(200, dtype=torch.float64).reshape(50, 4)
    real, fake = (1.7 * i * i).sin(), 0.8 * (0.9 * i * i).cos() + 0.2
    assert numbers(PRDC(real, k).compare(fake[:40])) == pytest.approx(golden, abs=1e-12)


def test_three_points_by_hand():
    # Balls of 0, 1 and 3 with k = 1: radii 1, 1, 2. The sample 0.5 lies in two of them, 4 in one, 9 and 9.5 in none.
    found = PRDC(torch.tensor([[0.0], [1.0], [3.0]]), 1).compare(torch.tensor([[0.5], [4.0], [9.0], [9.5]]))
    assert found["balls"].tolist() == [2, 1, 0, 0] and found["covered"].tolist() == [True] * 3
    assert found["recalled"].tolist() == [True, True, True]  # radii of the samples: 3.5, 3.5, 0.5, 0.5
    assert numbers(found) == [0.5, 1.0, 0.75, 1.0]


def test_a_copy_on_the_sphere_of_a_ball_is_outside_in_spite_of_rounding():
    real = draw(300, 20)
    for offset in (0.0, 1e4):  # which costs eight digits of |a|^2 + |b|^2 - 2 ab
        found = PRDC(real + offset, 5).compare((real + offset).flip(0))
        assert numbers(found) == [1, 1, 1, 1] and found["balls"].sum() == 5 * 300


def test_blocks_do_not_change_the_numbers(monkeypatch):
    real, fake, found = draw(50, 3), 0.8 * draw(31, 3, seed=1), []
    for values in (1, 100, 2**20):  # one row, a few with a last short block, all at once
        monkeypatch.setattr(neighbours, "_BLOCK_VALUES", values)
        found.append(numbers(PRDC(real).compare(fake)))
    assert found[0] == found[1] == found[2] and 0 < min(found[0])


def test_sets_of_one_law_score_what_theory_says():
    found = PRDC(draw(2000, 2), 5).compare(draw(2000, 2, seed=1))
    assert found["density"] == pytest.approx(1, abs=0.05)
    assert found["coverage"] == pytest.approx(1 - 2**-5, abs=0.015)  # Naeem et al., Section 3.2


def test_each_number_falls_for_its_own_fault():
    """Swapped roles are a mistake that has been published: collapse keeps precision, and spread keeps recall."""
    real, fresh = draw(500, 4), draw(500, 4, seed=1)
    one_mode, spread = fresh[:1] + 0.05 * draw(500, 4, seed=2), 3 * fresh
    good, collapsed, wide = (PRDC(real).compare(each) for each in (fresh, one_mode, spread))
    assert collapsed["precision"] > 0.95 and collapsed["recall"] < 0.05 and collapsed["coverage"] < 0.05
    assert wide["precision"] < 0.5 < wide["recall"] and wide["density"] < 0.5 * good["density"]
    assert wide["coverage"] < 0.7 < good["coverage"]


# --------------------------------------------------------------------------------------------- standard errors


def test_standard_errors_are_those_of_the_differences():
    real = {
        "balls": torch.tensor([0, 2, 4, 2]),
        "covered": torch.tensor([True] * 8),
        "recalled": torch.tensor([True, True, False, False]),
    }
    samples = {
        "balls": torch.tensor([0, 0, 0, 4]),
        "covered": torch.tensor([True] * 6 + [False] * 2),
        "recalled": torch.tensor([False, True, False, True]),
    }
    found = standard_errors_below(samples, real)
    assert found["precision"] == pytest.approx(0.5 / math.sqrt(2 * 3 / 16 / 4))
    assert found["density"] == pytest.approx(1 / math.sqrt(2 / 4 + 3 / 4))
    assert found["coverage"] == pytest.approx(0.25 / math.sqrt(3 / 16 / 8))
    assert found["recall"] == 0  # one lost, one won
    assert standard_errors_below(real, samples)["coverage"] == -found["coverage"]
    nothing = {**samples, "covered": torch.zeros(8, dtype=torch.bool)}
    assert standard_errors_below(nothing, real)["coverage"] == math.inf


@pytest.mark.parametrize("scales", [0.0, 0.5], ids=["normal", "heavy tails"])
def test_real_images_lie_within_five_standard_errors(scales):
    rows = draw(8000, 16) * (scales * draw(8000, 1, seed=1)).exp()
    for seed in range(10):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        balls = PRDC(rows[order[:300]])
        found = standard_errors_below(*(balls.compare(rows[order[start : start + 300]]) for start in (300, 600)))
        assert max(map(abs, found.values())) < 5


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "real, fake, k, message",
    [
        ((5, 2), (6, 2), 5, "reference must have shape .num_rows >= 6, dim., got .5, 2."),
        ((6, 2), (5, 2), 5, "samples must have shape .num_rows >= 6, 2., got .5, 2."),
        ((6, 2), (6, 3), 5, "samples must have shape .num_rows >= 6, 2., got .6, 3."),
        ((6,), (6,), 5, "reference must have shape"),
        ((6, 2), (6, 2), 0, "num_neighbours must be at least 1, got 0"),
    ],
)
def test_what_has_no_balls_is_refused(real, fake, k, message):
    with pytest.raises(ValueError, match=message):
        PRDC(torch.zeros(real), k).compare(torch.zeros(fake))


def test_infinite_features_are_refused():
    with pytest.raises(ValueError, match="samples must be finite"):
        PRDC(draw(10, 2)).compare(draw(10, 2) / 0)
