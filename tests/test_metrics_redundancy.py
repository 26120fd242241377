"""The determined share on codes whose redundancy is known."""

import math

import pytest
import torch

from hf_vaeplus.metrics.redundancy import determined_share


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_codes_that_fill_their_space():
    assert determined_share(normal(600, 8)) < 0.05
    assert determined_share(normal(600, 1)) == 0.0


def test_a_surface_of_two_dimensions_in_eight():
    a, b = math.pi * (2 * torch.rand(2, 600, generator=torch.Generator().manual_seed(0)) - 1)
    codes = torch.stack([a, b, a.sin(), b.cos(), a * b, (a + b).sin(), a.square(), b.sin()], 1)
    assert determined_share(codes) > 0.75
    # Units and a silent dimension change nothing.
    scaled = codes * torch.logspace(-3, 3, 8) + 5
    scaled = torch.cat([scaled, torch.full((600, 1), 2.0)], 1)
    assert determined_share(scaled) == pytest.approx(determined_share(codes), abs=1e-3)


def test_more_given_dimensions_determine_more():
    codes = normal(600, 6) @ normal(6, 9, seed=1)  # 6 of 9 numbers determine all
    assert determined_share(codes, 0.34) < determined_share(codes, 0.5) < determined_share(codes, 0.8)
    assert determined_share(codes, 0.67) > 0.95


def test_noise_sets_the_limit():
    """With z_2 = z_1 + noise of equal variance no regression explains more than half."""
    first = normal(900, 1)
    share = determined_share(torch.cat([first, first + normal(900, 1, seed=1)], 1))
    assert share == pytest.approx(0.5, abs=0.1)


def test_wrong_shapes():
    with pytest.raises(ValueError, match="n >= 30"):
        determined_share(normal(20, 4))
