"""Reconstruction errors against numbers known by hand."""

import math

import pytest
import torch

from hf_vaeplus.metrics.reconstruction import psnr, squared_error


def test_known_errors():
    images = torch.full((3, 3, 4, 4), 0.5, dtype=torch.float64)  # 48 values each
    offsets = torch.tensor([0.0, 0.1, -0.5], dtype=torch.float64)
    error = squared_error(images + offsets[:, None, None, None], images)
    torch.testing.assert_close(error, torch.tensor([0.0, 0.48, 12.0], dtype=torch.float64))
    assert psnr(error, 48).tolist() == pytest.approx([math.inf, 20.0, 20 * math.log10(2)])


def test_equals_the_mean_squared_error_of_torch():
    images, guesses = torch.rand(2, 7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    per_value = squared_error(guesses, images).mean() / images[0].numel()
    torch.testing.assert_close(per_value, torch.nn.functional.mse_loss(guesses.double(), images.double()))


def test_worse_reconstructions_have_larger_errors_and_lower_ratios():
    source = torch.Generator().manual_seed(0)
    images = torch.rand(5, 1, 8, 8, generator=source)
    noise = torch.randn(images.shape, generator=source)
    errors = torch.stack([squared_error(images + scale * noise, images) for scale in (0.0, 0.01, 0.1, 1.0)])
    assert (errors.diff(dim=0) > 0).all()
    assert (psnr(errors.flatten(), 64).reshape(errors.shape).diff(dim=0) < 0).all()


def test_summed_in_float64():
    images = torch.zeros(1, 3, 128, 128)
    guesses = torch.full_like(images, 0.1)
    expected = images.numel() * float(guesses[0, 0, 0, 0]) ** 2
    assert squared_error(guesses, images).item() == pytest.approx(expected, rel=1e-12)
    # Half precision is read as it is, and summed as exactly.
    assert squared_error(guesses.half(), images.half()).dtype == torch.float64


@pytest.mark.parametrize(
    "reconstruction, images, match",
    [
        (torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4), "must have one shape"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), "must have one shape"),
        (torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "images must be floats"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 4, 4), "reconstruction must be floats"),
        (torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), -1.0), "got -1 to -1"),
        (torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), torch.nan), "without NaN"),
    ],
)
def test_other_images_are_refused(reconstruction, images, match):
    with pytest.raises(ValueError, match=match):
        squared_error(reconstruction, images)


def test_images_without_values_are_refused():
    with pytest.raises(ValueError, match="num_values"):
        psnr(torch.ones(2), 0)
