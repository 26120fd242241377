"""Pixels as they are stored and as the models see them."""

import torch


def to_unit_range(pixel_values):
    """Pixels as the models see them: uint8 0 to 255 becomes float32 in [0, 1], of any shape.

    Raises:
        ValueError: if `pixel_values` is not uint8.
    """
    if pixel_values.dtype != torch.uint8:
        raise ValueError(f"pixel_values must be uint8, got {pixel_values.dtype}; pass them as they are stored")
    return pixel_values.to(torch.float32).div_(255)


def to_uint8(images):
    """Inverse of `to_unit_range`: float images are clamped to [0, 1] and rounded to uint8 0 to 255, of any shape.

    Raises:
        ValueError: if `images` is not floating point or holds NaN.
    """
    if not images.is_floating_point() or images.isnan().any():
        raise ValueError(f"images must be floating point without NaN, got {images.dtype}; pass values in [0, 1]")
    return images.to(torch.float32).clamp(0, 1).mul(255).round().to(torch.uint8)
