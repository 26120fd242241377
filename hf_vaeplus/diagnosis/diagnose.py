"""`hf_vaeplus.diagnose`: from a model and images to measures, a verdict, a text, JSON and a figure."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image

from ..data.cache import ImageDataset, load_images
from ..training.randomness import derived_seed
from .figure import draw
from .measures import MIN_IMAGES, measure
from .models import Autoencoder, as_autoencoder, load_autoencoder
from .text import as_text
from .verdict import Verdict, judge

_CHOICE = 19  # purpose of `derived_seed`: which images


@dataclass
class Diagnosis:
    """What [`diagnose`] returns. Printed, it is a text for people.

    Args:
        verdict ([`~hf_vaeplus.diagnosis.verdict.Verdict`]): `regularization` ("over", "under", "balanced"),
            `confidence`, `reasons`, `prescriptions`, `findings`, `doubts` and `estimated_r`.
        measures (`dict`): all figures that it was made from; docs/diagnose.md explains them.
    """

    verdict: Verdict
    measures: dict

    def __str__(self) -> str:
        return as_text(self.verdict, self.measures)

    def to_dict(self) -> dict:
        """Verdict and measures as JSON can hold them."""
        return {"verdict": asdict(self.verdict), "measures": self.measures}

    def save_figure(self, path: str | os.PathLike) -> None:
        """Draw the diagnosis on one page, as PNG or what the name says."""
        draw(self.verdict, self.measures, path)


def diagnose(
    model,
    data,
    *,
    num_images: int = 5_000,
    resolution: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Diagnosis:
    """Is this autoencoder over-regularised, under-regularised or balanced, why, and what helps?

    Args:
        model: a stage or a pipeline of this package; a diffusers `AutoencoderKL`, `AutoencoderTiny`, `AutoencoderDC`
            or `VQModel`, or a pipeline that has one; the name of a folder or Hub repository that holds one of these;
            or a pair of callables `(encode, decode)`, of which `encode` returns codes, or means and log variances.
        data: images, best ones that the model was not trained on: a tensor `(n, channels, height, width)`, floats in
            [0, 1] or uint8; an array `(n, height, width, channels)` of the same; PIL images of one size; an
            [`~hf_vaeplus.data.cache.ImageDataset`]; or a folder. For callables also rows `(n, dim)` or any other
            tensor with one row for each sample.
        num_images (`int`): use at most so many, chosen at random; 2,000 to 5,000 make the estimates steady.
        resolution (`int`, *optional*): pixels a side, for a folder and a model that takes images of any size.
        seed (`int`): of all noise.
        batch_size (`int`): images at a time.

    Returns:
        [`Diagnosis`].

    Raises:
        TypeError: a model or data of another kind.
        ValueError: too few images, images that the model does not take, or values that are not finite.

    Example:
        >>> diagnosis = hf_vaeplus.diagnose("runs/faces/pipeline", "pictures")
        >>> print(diagnosis)
        >>> diagnosis.verdict.regularization, diagnosis.verdict.names
    """
    if num_images < MIN_IMAGES or batch_size < 1 or not 0 <= seed < 2**63:
        raise ValueError(
            f"num_images must be at least {MIN_IMAGES}, batch_size at least 1 and seed in [0, 2**63), got"
            f" {num_images}, {batch_size} and {seed}."
        )
    if isinstance(model, str | os.PathLike):
        model = load_autoencoder(os.fspath(model))
    model = as_autoencoder(model)
    images = _images(data, model, num_images, resolution, seed)
    if model.image_shape is not None and tuple(images.shape[1:]) != tuple(model.image_shape):
        raise ValueError(f"this model takes images of shape {model.image_shape}, got {tuple(images.shape[1:])}.")
    measures = measure(model, images, seed, batch_size)
    return Diagnosis(judge(measures), measures)


def _images(data, model: Autoencoder, num_images: int, resolution: int | None, seed: int) -> torch.Tensor:
    """Some of the images, in random order, as `measure` takes them."""

    def rows(count: int) -> np.ndarray:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(seed, _CHOICE)))
        return order[:num_images].numpy()

    if isinstance(data, str | os.PathLike):
        size, channels = resolution or 64, model.num_channels or 3
        if model.image_shape is not None:
            channels, size = model.image_shape[:2]
        data = load_images(train_data_dir=data, resolution=size, num_channels=channels)
    if isinstance(data, ImageDataset):
        data = data.unmirrored()
        return data.batch(rows(len(data)))["pixel_values"]
    if isinstance(data, Sequence) and len(data) and all(isinstance(each, Image.Image) for each in data):
        if len({(each.size, each.mode) for each in data}) > 1:
            raise ValueError("PIL images must have one size and one mode: name their folder instead.")
        data = np.stack([np.asarray(data[number]) for number in rows(len(data))])
        data = data[..., None] if data.ndim == 3 else data
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(np.ascontiguousarray(data))
        data = data.movedim(-1, 1) if data.ndim == 4 else data
    if not isinstance(data, torch.Tensor):
        raise TypeError(f"data must be a tensor, an array, images, a data set or a folder, got {type(data).__name__}.")
    if data.ndim < 2 or not (data.is_floating_point() or data.dtype == torch.uint8):
        raise ValueError(
            f"data must be uint8 or floats, one row for each sample, got {data.dtype} of shape {tuple(data.shape)}."
        )
    data = data[rows(len(data))].cpu()
    if data.is_floating_point():
        data = data.float()
        if not bool(data.isfinite().all()):
            raise ValueError("data must be finite, got NaN or infinity.")
        if model.image_shape is not None and data.ndim == 4 and not bool(((data >= 0) & (data <= 1)).all()):
            raise ValueError("images must lie in [0, 1] or be uint8: rescale them.")
    return data
