"""`rendered-faces` is a smooth surface of exactly `num_factors` dimensions: that is what makes it a check of a VAE."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vaeplus.data import rendered_faces
from hf_vaeplus.data.rendered_faces import FACTOR_NAMES, factors_of, render_faces

ALL = len(FACTOR_NAMES)


def draw(factors, resolution=32):
    """Unrounded pixels as float64 of shape (n, pixels)."""
    return rendered_faces._draw(np.float32(factors), resolution).astype(np.float64).reshape(len(factors), -1)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=8), st.integers(1, ALL), st.integers(0, 2**31))
def test_factors_depend_on_seed_and_index_alone(indices, num_factors, seed):
    together = factors_of(indices, num_factors, seed)
    alone = np.concatenate([factors_of([i], num_factors, seed) for i in reversed(indices)])[::-1]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together, factors_of(indices, ALL, seed)[:, :num_factors])
    assert together.dtype == np.float32 and np.abs(together).max() <= 1
    assert not np.array_equal(together, factors_of(indices, num_factors, seed + 1))


def test_factors_are_uniform_and_uncorrelated():
    factors = factors_of(range(4000), ALL).astype(np.float64)
    np.testing.assert_allclose(factors.T @ factors / len(factors), np.eye(ALL) / 3, atol=0.03)  # 5 standard errors
    np.testing.assert_allclose(factors.mean(0), 0, atol=0.05)
    deciles = np.histogram(factors, bins=10, range=(-1, 1))[0] / factors.size
    np.testing.assert_allclose(deciles, 0.1, atol=0.006)


def test_the_sequence_of_factors_does_not_change_between_versions():
    # Trained checkpoints were measured on these pictures.
    expected = [[-0.9769065, -0.5169016], [-0.6204709, -0.49793956]]
    np.testing.assert_allclose(factors_of([0, 7], 2), expected, rtol=1e-6)


def test_a_picture_does_not_depend_on_its_batch():
    factors = factors_of(range(40), ALL)
    images = render_faces(factors, 64)
    assert images.shape == (40, 64, 64, 3) and images.dtype == np.uint8
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(render_faces(factors[order], 64), images[order])
    np.testing.assert_array_equal(render_faces(factors[17:18], 64)[0], images[17])


def test_absent_factors_stay_in_the_middle():
    factors = factors_of(range(3), 5)
    padded = np.zeros((3, ALL), np.float32)
    padded[:, :5] = factors
    np.testing.assert_array_equal(render_faces(factors, 48), render_faces(padded, 48))


@pytest.mark.parametrize("resolution", [32, 45, 256])
def test_any_resolution_shows_the_same_drawing(resolution):
    factors = factors_of(range(2), ALL)
    coarse = rendered_faces._draw(factors, resolution).mean((2, 3))
    np.testing.assert_allclose(coarse, rendered_faces._draw(factors, 64).mean((2, 3)), atol=2e-3)


def test_no_pixel_is_clipped():
    corners = np.random.default_rng(0).choice([-1, 1], size=(300, ALL))
    pixels = draw(corners)
    assert pixels.min() > 0 and pixels.max() < 1


def test_shapes_never_leave_the_window_they_are_drawn_in(monkeypatch):
    corners = np.random.default_rng(1).choice([-1, 1], size=(100, ALL))
    cropped = draw(corners)
    monkeypatch.setattr(rendered_faces._Canvas, "window", lambda self, *box: (slice(None), slice(None)))
    np.testing.assert_allclose(cropped, draw(corners), atol=1e-6)


@pytest.mark.parametrize("factor", range(ALL), ids=FACTOR_NAMES)
def test_pictures_are_smooth_in_every_factor(factor):
    # At a kink or a jump the central second difference does not shrink with the square of the step.
    base = 0.6 * factors_of(range(20), ALL)

    def difference(step):
        moved = {sign: base.copy() for sign in (-1, 1)}
        for sign in moved:
            moved[sign][:, factor] += sign * step
        forward, backward, middle = draw(moved[1]), draw(moved[-1]), draw(base)
        return np.linalg.norm(forward - middle), np.linalg.norm(forward - 2 * middle + backward)

    (first, second), (first_half, second_half) = difference(0.2), difference(0.1)
    assert first / first_half == pytest.approx(2, rel=0.1)
    assert second_half < 0.4 * second + 1e-4 * first


def test_every_factor_is_visible_and_none_dominates():
    base = factors_of(range(32), ALL)
    strength = []
    for factor in range(ALL):
        values = []
        for value in (-0.775, 0, 0.775):  # Gauss-Legendre points of [-1, 1]
            moved = base.copy()
            moved[:, factor] = value
            values.append(draw(moved, 64))
        mean = (5 * values[0] + 8 * values[1] + 5 * values[2]) / 18
        parts = [np.square(value - mean).sum(1).mean() for value in values]
        strength.append((5 * parts[0] + 8 * parts[1] + 5 * parts[2]) / 18)
    # Variance in squared pixel values summed over a picture; rounding to uint8 makes 64 * 64 * 3 / 12 / 255^2 = 0.016.
    assert min(strength) > 100 * 0.016
    assert max(strength) < 8 * min(strength)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_jacobian_has_full_rank(index):
    base, step = 0.9 * factors_of([index], ALL), 0.05
    pixels = draw(np.concatenate([base + step * np.eye(ALL), base - step * np.eye(ALL)]), 64)
    jacobian = (pixels[:ALL] - pixels[ALL:]) / (2 * step)
    jacobian /= np.linalg.norm(jacobian, axis=1, keepdims=True)
    # Of unit columns: 1 if all effects were orthogonal, 0 if one factor could imitate the others.
    assert np.linalg.svd(jacobian, compute_uv=False)[-1] > 0.15


def test_distant_factors_give_distinct_pictures():
    factors = factors_of(range(300), ALL)
    pixels = draw(factors)
    gram = pixels @ pixels.T
    squared_distance = gram.diagonal()[:, None] - 2 * gram + gram.diagonal()
    assert squared_distance[~np.eye(300, dtype=bool)].min() > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: factors_of([0], 0), "num_factors must be between 1 and 16, got 0"),
        (lambda: factors_of([0], 17), "num_factors must be between 1 and 16, got 17"),
        (lambda: factors_of([-1], 2), "must be at least 0, got seed 0 and indices"),
        (lambda: factors_of([1], 2, seed=-3), "must be at least 0, got seed -3"),
        (lambda: render_faces(np.zeros(4), 64), r"shape \(n, num_factors\), got \(4,\)"),
        (lambda: render_faces(np.full((1, 2), 1.5), 64), r"must lie in \[-1, 1\]"),
        (lambda: render_faces(np.full((1, 2), np.nan), 64), r"must lie in \[-1, 1\]"),
        (lambda: render_faces(np.zeros((1, 2)), 16), "between 32 and 256 pixels, got 16"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
