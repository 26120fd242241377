"""Named directions in the latent space: what `smile` or `thickness` is in z, learned from labelled images.

latents = pipe.encode(images).mean
directions = find_directions(latents, {"smile": smiles, "age": ages})
smiling = pipe.decode(latents + 2 * directions["smile"])  # two standard deviations more
save_directions(directions, pipe, folder)                 # `vaeplus demo folder` has a slider for each
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import write_whole
from .provenance import stage_fingerprints

if TYPE_CHECKING:
    from .pipeline_vaeplus import VAEPlusPipeline

FILE = "directions.safetensors"  # beside a pipeline
MAX_NAME = 40  # characters


def find_directions(
    latents: torch.Tensor, attributes: Mapping[str, Sequence[float] | np.ndarray | torch.Tensor]
) -> dict[str, torch.Tensor]:
    """How z changes with each attribute while the others stay: least squares of z on all attributes at once.

        z = intercept + sum_j attribute_j direction_j + rest,    attributes in standard deviations from their means

    Of a single attribute with two values it is the difference of the two means of z. Attributes that go together, such
    as beards and ties, are told apart if they are given together.

    Args:
        latents (`torch.Tensor` of shape `(n, latent_dim)`): posterior means of images.
        attributes: name -> a number for each image; 0 and 1, or any degree.

    Returns:
        name -> float32 `torch.Tensor` of shape `(latent_dim,)`: what to add to z for one standard deviation more.

    Raises:
        ValueError: other shapes, numbers that are not finite, fewer images than attributes and 2, an attribute that is
            the same for all images, or one that follows from the others.
    """
    if latents.ndim != 2 or not latents.isfinite().all():
        raise ValueError(f"latents must be finite and of shape (n, latent_dim), got shape {tuple(latents.shape)}.")
    if not attributes or len(latents) < len(attributes) + 2:
        raise ValueError(
            f"{len(attributes)} attributes of {len(latents)} images: give at least one, and two images more than"
            " attributes."
        )
    columns = {}
    for name, values in attributes.items():
        try:
            column = torch.as_tensor(np.asarray(values, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the attribute {name!r} must be numbers, one for each image: {error}.") from error
        if column.shape != (len(latents),) or not column.isfinite().all():
            raise ValueError(
                f"the attribute {name!r} must be {len(latents)} finite numbers, one for each image, got shape"
                f" {tuple(column.shape)}: leave out images without a label."
            )
        spread = column.std(correction=0)
        if not spread > 1e-9 * column.abs().max():
            raise ValueError(f"the attribute {name!r} is the same for all images: leave it out.")
        columns[name] = (column - column.mean()) / spread
    table = torch.stack(list(columns.values()), 1)
    if torch.linalg.matrix_rank(table, rtol=1e-6) < len(columns):
        raise ValueError(f"of the attributes {', '.join(columns)} one follows from the others: leave it out.")
    centred = latents.detach().cpu().double() - latents.detach().cpu().double().mean(0)
    found = torch.linalg.lstsq(table, centred, driver="gelsd").solution
    return {name: direction.float() for name, direction in zip(columns, found, strict=True)}


def save_directions(directions: Mapping[str, torch.Tensor], pipe: "VAEPlusPipeline", path: str | Path) -> Path:
    """Write directions for the weights of `pipe` to a file, or into the folder of a pipeline; the file's path.

    Raises:
        ValueError: no directions, one of another shape, or a name without a letter or longer than 40 characters.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    _check(directions, pipe, "directions")
    tensors = {name: direction.detach().cpu().float().contiguous() for name, direction in directions.items()}
    write_whole(path, lambda partial: save_file(tensors, partial, metadata=_weights(pipe)))
    return path


def load_directions(pipe: "VAEPlusPipeline", path: str | Path) -> dict[str, torch.Tensor]:
    """The directions in a file of [`save_directions`], those that change z most come first.

    Raises:
        ValueError: not such a file, or one for other weights.
        FileNotFoundError: there is no file.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: write one with hf_vaeplus.directions.save_directions.")
    try:
        with safe_open(path, "pt") as file:
            made_for = file.metadata() or {}
            directions = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} holds no directions ({error}): make it again.") from error
    _check(directions, pipe, str(path))
    if made_for != _weights(pipe):
        raise ValueError(f"{path} was made for other weights than those of this pipeline: make it again or remove it.")
    return dict(sorted(directions.items(), key=lambda entry: -float(entry[1].norm())))


def directions_beside(pipe: "VAEPlusPipeline") -> dict[str, torch.Tensor]:
    """The directions in the folder that a pipeline was loaded from; none where there is no such file.

    Raises:
        ValueError: as [`load_directions`].
    """
    path = Path(pipe.name_or_path or "", FILE)
    return load_directions(pipe, path) if pipe.name_or_path and path.is_file() else {}


def _weights(pipe: "VAEPlusPipeline") -> dict[str, str]:
    """Metadata of a file: one entry, because safetensors stores several in any order."""
    return {"made_for": json.dumps(stage_fingerprints({"autoencoder": pipe.autoencoder, "vae": pipe.vae}))}


def _check(directions: Mapping[str, torch.Tensor], pipe: "VAEPlusPipeline", what: str):
    pipe.need_vae("latent directions")
    shape = (pipe.vae.config.latent_dim,)
    if not directions:
        raise ValueError(f"{what} must hold at least one direction, got none.")
    for name, direction in directions.items():
        if not (name.isprintable() and 0 < len(name.strip()) <= MAX_NAME):
            raise ValueError(f"{what}: a name must have 1 to {MAX_NAME} printable characters, got {name[:80]!r}.")
        if direction.shape != shape or not (direction.is_floating_point() and direction.isfinite().all()):
            raise ValueError(
                f"{what}: {name!r} must be finite floats of shape {shape}, got {direction.dtype} of shape"
                f" {tuple(direction.shape)}."
            )
