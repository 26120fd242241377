"""How far reconstructions lie from their images, image by image."""

import torch


def squared_error(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Sum over pixels and channels of the squared differences, per image: float64 of shape `(batch,)`.

    This is the unit of the paper's "Rec. Err". It grows with the number of values: compare it at one image size.

    Args:
        reconstruction (`torch.Tensor` of shape `(batch, channels, height, width)`): floats; may leave [0, 1].
        images (same shape): floats in [0, 1].

    Raises:
        ValueError: shapes that differ (broadcasting would hide a mistake), integers, or images outside [0, 1].
    """
    if reconstruction.shape != images.shape or images.ndim != 4:
        raise ValueError(
            "reconstruction and images must have one shape (batch, channels, height, width), got"
            f" {tuple(reconstruction.shape)} and {tuple(images.shape)}."
        )
    for name, pixels in (("reconstruction", reconstruction), ("images", images)):
        if not pixels.is_floating_point():
            raise ValueError(f"{name} must be floats with pixels in [0, 1], got {pixels.dtype}: divide by 255 first.")
    if not bool(((images >= 0) & (images <= 1)).all()):
        low, high = images.aminmax()
        raise ValueError(f"images must lie in [0, 1] without NaN, got {low:.4g} to {high:.4g}: rescale them.")
    return (reconstruction.double() - images.double()).square().flatten(1).sum(1)


def psnr(squared_error: torch.Tensor, num_values: int) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, for pixels whose peak is 1: -10 log10(squared_error / num_values).

    Higher is better, and an error of 0 gives infinity. The logarithm makes the mean over images exceed the PSNR of
    their mean error: say which one a figure is.

    Args:
        squared_error (`torch.Tensor` of shape `(batch,)`): per image, as from [`squared_error`].
        num_values (`int`): channels * height * width, at least 1.

    Returns:
        `torch.Tensor` of shape `(batch,)`: float64.

    Raises:
        ValueError: no value per image.
    """
    if num_values < 1:
        raise ValueError(f"num_values must be channels * height * width of one image, got {num_values}.")
    return -10 * (squared_error.double() / num_values).log10()
