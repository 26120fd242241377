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


def refuse_images_that_teach_nothing(images):
    """Nothing can be learned from one image, from copies of one image, or from images of one colour each.

    Args:
        images: [`~hf_vaeplus.data.cache.ImageDataset`] or [`~hf_vaeplus.data.stream.ImageStream`]; it is read only
            until two images differ and one of them shows something.

    Raises:
        ValueError: for such images, or as reading them does.
    """
    first, count, differ, show_something = None, 0, False, False
    for batch in images.in_order(16):
        pixels = batch["pixel_values"]
        first = pixels[:1] if first is None else first
        count += len(pixels)
        differ = differ or bool((pixels != first).any())
        show_something = show_something or bool((pixels != pixels[..., :1, :1]).any())
        if differ and show_something:
            return
    if count == 1:
        raise ValueError(f"{images.name} holds one image, training needs at least two that differ; add images")
    if not differ:
        raise ValueError(f"the {count:,} images of {images.name} are all the same, training needs others; add images")
    raise ValueError(
        f"each of the {count:,} images of {images.name} has one colour everywhere, training needs pictures that show"
        " something; check the source and the crop"
    )


def to_uint8(images):
    """Inverse of `to_unit_range`: float images are clamped to [0, 1] and rounded to uint8 0 to 255, of any shape.

    Raises:
        ValueError: if `images` is not floating point or holds NaN.
    """
    if not images.is_floating_point() or images.isnan().any():
        raise ValueError(f"images must be floating point without NaN, got {images.dtype}; pass values in [0, 1]")
    return images.to(torch.float32).clamp(0, 1).mul(255).round().to(torch.uint8)
