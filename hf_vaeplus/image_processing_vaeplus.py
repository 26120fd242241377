"""Pictures as the models see them: decoding, cropping and resizing for training, evaluation and `transformers`.

Pillow does all of it; torchvision is not needed. This file imports nothing of the package, so that an exported Hub
repository can carry it alone.
"""

import contextlib
import io
import os
from numbers import Integral
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What files are opened as. Left to itself Pillow would also hand PostScript to an interpreter of programs.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Picture = Image.Image | np.ndarray | str | os.PathLike
# What the library itself puts into a processor's keyword arguments; anything else unknown is a misspelling.
_LIBRARY_KEYS = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}


def decode_image(
    content: bytes | Path | Image.Image | np.ndarray,
    label: str,
    resolution: int,
    crop: int | None,
    num_channels: int,
    keep_small: bool = False,
) -> np.ndarray:
    """Decode, crop and resize one picture. Transparency is dropped.

    Args:
        content (`bytes`, `Path`, `Image.Image` or `np.ndarray` of shape `(H, W)` or `(H, W, 3)`): file contents, file,
            picture, or pixels.
        label (`str`): what error messages call the picture.
        resolution (`int`): height and width of the result; box filter when shrinking, bicubic when enlarging.
        crop (`int` or `None`): side of the centre crop in source pixels, `None` for the largest square.
        num_channels (`int`): 1 (grey) or 3 (RGB).
        keep_small (`bool`): take a picture of `resolution` x `resolution` as it is where `crop` is larger: it is
            cropped already.
    Returns:
        `np.ndarray` of shape `(resolution, resolution, num_channels)`, uint8.
    Raises:
        ValueError: for an unreadable picture, more than 8 bits a channel, or a picture smaller than `crop`.
    """
    try:
        with contextlib.ExitStack() as opened:  # Pillow leaves a damaged file open
            if isinstance(content, np.ndarray):
                image = Image.fromarray(content)
            elif isinstance(content, Image.Image):
                image = content
            else:
                Image.init()
                known = [name for name in _FORMATS if name in Image.OPEN]  # older versions of Pillow lack some
                file = io.BytesIO(content) if isinstance(content, bytes) else opened.enter_context(open(content, "rb"))
                image = Image.open(file, formats=known)
            image = ImageOps.exif_transpose(image)
            image.load()
    except UnidentifiedImageError as error:
        formats = ", ".join(_FORMATS)
        raise ValueError(f"{label} is not a readable picture (none of {formats}); remove it or replace it") from error
    except Exception as error:  # damaged files make PIL raise nearly anything
        raise ValueError(f"{label} is not a readable picture ({error}); remove it or replace it") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{label} has pixel type {image.mode}, expected 8 bits a channel; convert it first")
    if keep_small and crop is not None and crop > resolution and image.size == (resolution, resolution):
        crop = None
    side = min(image.size) if crop is None else crop
    if side > min(image.size):
        raise ValueError(f"{label} is {image.width}x{image.height}, smaller than crop={crop}; choose a smaller crop")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image, mode = image.crop((left, top, left + side, top + side)), "L" if num_channels == 1 else "RGB"
    try:
        image = image.convert(mode)
    except ValueError as error:  # LAB, for one
        raise ValueError(
            f"{label} has pixel type {image.mode}, expected one that {mode} can show; convert it first"
        ) from error
    if side != resolution:
        box_or_cubic = Image.Resampling.BOX if side > resolution else Image.Resampling.BICUBIC
        image = image.resize((resolution, resolution), box_or_cubic)
    return np.asarray(image).reshape(resolution, resolution, num_channels)


class VAEPlusImageProcessor(BaseImageProcessor):
    """Image processor of VAE+ models: the crop, the resizing and the range [0, 1] that they were trained on.

    Args:
        image_size (`int`): height and width of what the model sees.
        num_channels (`int`): 1 (grey) or 3 (RGB).
        crop (`int`, *optional*): side of the centre crop in source pixels; by default the largest square.

    Raises:
        TypeError: an unknown argument.
        ValueError: a number out of range.

    Example:
        >>> processor = VAEPlusImageProcessor(image_size=64)
        >>> pixel_values = processor(picture, return_tensors="pt").pixel_values  # (1, 3, 64, 64)
    """

    model_input_names = ["pixel_values"]

    def __init__(self, image_size: int = 64, num_channels: int = 3, crop: int | None = None, **kwargs):
        unknown = sorted(kwargs.keys() - _LIBRARY_KEYS)
        if unknown:
            raise TypeError(
                f"VAEPlusImageProcessor got the unknown argument {unknown[0]!r}: it takes image_size, num_channels and"
                " crop."
            )
        counts = image_size, num_channels, *([] if crop is None else [crop])
        if not all(isinstance(each, Integral) and each >= 1 for each in counts) or num_channels not in (1, 3):
            raise ValueError(
                "VAEPlusImageProcessor needs image_size and crop of at least 1 and num_channels of 1 or 3, got"
                f" {image_size}, {crop} and {num_channels}."
            )
        super().__init__(**kwargs)
        self.image_size, self.num_channels = int(image_size), int(num_channels)  # numpy's integers are no JSON
        self.crop = None if crop is None else int(crop)

    @classmethod
    def from_dict(cls, image_processor_dict: dict, **kwargs) -> "VAEPlusImageProcessor | tuple":
        """As that of the library, which reads every stored processor: unknown keys become attributes and are named.

        Raises:
            ValueError: a number out of range, or a key that names a method.
        """
        known = _LIBRARY_KEYS | {"image_size", "num_channels", "crop"}
        unknown = {name: value for name, value in image_processor_dict.items() if name not in known}
        for name in unknown:
            if hasattr(cls, name):
                raise ValueError(f"{cls.__name__} cannot keep the key {name!r}: remove it from the file.")
        if unknown:
            logger.warning_once(
                f"The stored {cls.__name__} has the unknown keys {sorted(unknown)}: they are kept as attributes and"
                " change nothing."
            )
        stored = {name: value for name, value in image_processor_dict.items() if name in known}
        found = super().from_dict(stored, **kwargs)
        vars(found[0] if isinstance(found, tuple) else found).update(unknown)
        return found

    def preprocess(
        self, images: Picture | list[Picture] | tuple[Picture, ...], return_tensors: str | None = None
    ) -> BatchFeature:
        """What calling the processor does.

        Args:
            images: a PIL image, the path of a file or a uint8 array of shape `(H, W)` or `(H, W, 3)`, of any size; one
                or a list of them.
            return_tensors (`"pt" | "np"`, *optional*): torch tensors, or numpy arrays as without it.

        Returns:
            `BatchFeature` with `pixel_values`, float32 of shape `(n, num_channels, image_size, image_size)` in [0, 1].

        Raises:
            TypeError: images of another type.
            ValueError: no images, or as [`decode_image`].
        """
        images = images if isinstance(images, list | tuple) else [images]
        if not images:
            raise ValueError("images is an empty list: pass at least one image.")
        pixels = np.stack([self.pixels(image, f"image {i}") for i, image in enumerate(images)])
        pixel_values = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def pixels(self, image: Picture, label: str) -> np.ndarray:
        """One picture as the model sees it: uint8 of shape `(image_size, image_size, num_channels)`.

        A picture of `image_size` x `image_size` that is smaller than the crop is taken as it is: it could not have
        been a training picture, and what the model draws has this size.

        Args:
            image: as in `preprocess`.
            label (`str`): what errors call it; a file is called by its path.

        Raises:
            TypeError, ValueError: as `preprocess`.
        """
        if isinstance(image, str | os.PathLike):
            image, label = Path(image), os.fspath(image)
        elif not isinstance(image, Image.Image | np.ndarray):
            raise TypeError(f"images must be PIL images, paths or uint8 arrays (H, W, 3), got {type(image).__name__}.")
        return decode_image(image, label, self.image_size, self.crop, self.num_channels, keep_small=True)


__all__ = ["VAEPlusImageProcessor", "decode_image"]
