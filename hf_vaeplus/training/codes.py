"""Codes and posteriors of a whole data set: computed once by a frozen stage and kept beside the image cache."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from ..data.cache import keep_batch
from ..data.pixels import to_unit_range
from ..files import build_once
from ..modeling_vaeplus import VAEPlusPreTrainedModel
from ..progress import tqdm
from ..provenance import hash_weights
from .launch import process_state


def load_frozen(model_class: type, path: str) -> VAEPlusPreTrainedModel:
    """A trained stage for use by a later one: weights complete, no gradients, evaluation mode, on this device.

    Raises:
        ValueError, OSError: as [`VAEPlusPreTrainedModel.from_pretrained`].
    """
    model = model_class.from_pretrained(path).requires_grad_(False).eval()
    return model.to(process_state().device, memory_format=torch.channels_last)


@torch.no_grad()
def encode_dataset(images, model: VAEPlusPreTrainedModel, encode: Callable) -> torch.Tensor:
    """What `encode` says of every image, in the order of the data set, computed once and kept in the cache.

    Args:
        images: a map-style data set of images.
        model: the network that `encode` uses: its weights and the images name the cached file.
        encode: pixels in [0, 1] of shape `(batch, C, H, W)` -> `(batch, dim)`.

    Returns:
        float32 `torch.Tensor` of shape `(len(images), dim)` on the CPU.
    """
    state, key = process_state(), hashlib.sha256(f"{images.fingerprint} {len(images)}".encode())
    hash_weights(key, model.state_dict())
    path = Path(images.path).parent.parent / "encoded" / f"{key.hexdigest()[:32]}.safetensors"

    def build(path: Path):
        loader = DataLoader(images, batch_size=256, collate_fn=keep_batch)
        parts = []
        for batch in tqdm(loader, desc="encoding"):
            pixels = to_unit_range(batch["pixel_values"].to(state.device))
            parts.append(encode(pixels).float().cpu())
        save_file({"rows": torch.cat(parts)}, path)

    def load(path: Path) -> torch.Tensor:
        rows = load_file(path).get("rows")
        if rows is None or rows.ndim != 2 or len(rows) != len(images):
            raise ValueError(f"expected one row for each of {len(images)} images")
        return rows

    return build_once(path, build, load)  # the others wait for its lock: for a barrier they could wait too long


class TensorRows(Dataset):
    """Rows of equally long tensors; a list of indices gives a batch."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> dict:
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def __getitems__(self, indices: list[int]) -> dict:
        return self[torch.as_tensor(indices)]


def resident_batches(rows: TensorRows, batches: Iterable[list[int]], device: torch.device) -> Iterator[dict]:
    """The batches of those indices, taken on the device from rows that lie there whole.

    Indices go there for many batches in one copy, which the host does not wait for.
    """
    tensors = {name: tensor.to(device) for name, tensor in rows.tensors.items()}
    batches = iter(batches)
    while block := list(itertools.islice(batches, 64)):
        indices = torch.tensor(block)
        if has_pinned_memory(device):
            indices = indices.pin_memory()
        for part in indices.to(device, non_blocking=True):
            yield {name: tensor[part] for name, tensor in tensors.items()}


def has_pinned_memory(device: torch.device) -> bool:
    """Whether copies between the host and this device can go on while the host does."""
    return device.type not in ("cpu", "mps")


class EncodedImages(Dataset):
    """Images with what was computed of them."""

    def __init__(self, images, encoded: dict[str, torch.Tensor]):
        self.images, self.rows = images, TensorRows(encoded)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {**self.images[index], **self.rows[index]}

    def __getitems__(self, indices: list[int]) -> dict:
        return {**self.images.__getitems__(indices), **self.rows.__getitems__(indices)}
