"""The cache of decoded uint8 crops.

Decoding a JPEG costs a hundred times more than reading pixels, so `load_images` decodes once into a memory-mapped file
whose name is a hash of the source's content and of every option that changes a pixel.
"""

import copy
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import Dataset

from ..files import FULL
from ..progress import tqdm
from .options import ImageOptions, image_options
from .pixels import to_unit_range
from .sources import cache_folder, decoded_blocks, nothing_left, open_source, warn_of_left_out

logger = logging.getLogger(__name__)


def load_images(
    dataset_name: str | None = None, *, cache_dir: str | os.PathLike | None = None, progress: bool = True, **options
) -> "ImageDataset":
    """Decode a set of images once into a cache on disk and open it. Exactly one source must be given.

    Args:
        dataset_name (`str`, *optional*): short name or Hub id, see [`~hf_vaeplus.data.options.ImageOptions`].
        cache_dir (`str`, *optional*): parent of the cache; by default `$VAEPLUS_CACHE`, else `~/.cache/hf_vaeplus`.
        progress (`bool`): show a progress bar while decoding.
        options: the other fields of [`~hf_vaeplus.data.options.ImageOptions`]; `dataset_revision` and
            `max_train_samples` are called `revision` and `max_samples` here.
    Returns:
        [`ImageDataset`].
    Raises:
        ValueError: for no or several sources, an option out of range, an unknown split or column, a malformed or
            empty slice, no images, or a file that cannot be read.
        BadImage: (a `ValueError`) for a picture that cannot be used.
        FileNotFoundError: for a path that does not exist.
    """
    return open_cache(image_options(dataset_name, **options), cache_dir, progress)


def open_cache(
    options: ImageOptions, cache_dir: str | os.PathLike | None = None, progress: bool = True
) -> "ImageDataset":
    """The images of `options`, decoded first if the cache lacks them; arguments and errors of `load_images`."""
    whole_split, limits, part = _parse_split(options.split)
    holdout = None if part and options.holdout == 0 else options.holdout
    cache_dir = cache_folder(cache_dir)
    source, fingerprint = open_source(replace(options, split=whole_split), cache_dir)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the cache {cache_dir} cannot be made ({error.strerror}); name another folder as cache_dir"
        ) from error
    folder = cache_dir / fingerprint
    if _cached_info(folder) is None:
        with FileLock(cache_dir / f"{fingerprint}.lock"):  # the system frees it when its holder is killed
            if _cached_info(folder) is None:  # no other process built it meanwhile
                _build_cache(folder, source, options.max_train_samples, progress)
    info = _cached_info(folder)
    shape, left_out = tuple(info["shape"]), info.get("left_out", [])
    warn_of_left_out(source.name, [source.label(number) for number, _ in left_out])
    rows = _sliced(shape[0], limits, options.split)
    held_out = rows_held_out(rows, holdout, source.name)
    if len(held_out):
        rows = np.setdiff1d(rows, held_out)
    images = ImageDataset(
        folder / "images.bin",
        shape,
        source.name,
        _fingerprint_of(fingerprint, rows, shape[0]),
        options.random_flip,
        options.split,
        rows,
        [number for number, _ in left_out],
    )
    images.source = source
    if len(held_out):
        images.held_out = (held_out, _fingerprint_of(fingerprint, held_out, shape[0]))
    elif part:
        raise ValueError(
            f"split={options.split!r} holds nothing out of {len(rows):,} images; say how many with holdout"
        )
    return images.unseen() if part == "unseen" else images


def rows_held_out(rows, holdout: float | int | None, name: str) -> np.ndarray:
    """The rows among `rows` that [`ImageOptions`] with this `holdout` hold out, in ascending order."""
    count = len(rows)
    if holdout is None:
        number = min(max(100, math.ceil(count / 20)), count // 5) if count >= 50 else 0
    else:
        number = round(holdout * count) if holdout < 1 else holdout
    if number != int(number) or number >= count or (holdout and not number):
        raise ValueError(
            f"holdout={holdout} must hold some of the {count:,} images of {name} out and not all; name a share below 1"
            " or a whole number"
        )
    chosen = np.random.default_rng([0, count]).permutation(count)[: int(number)]
    return np.sort(np.asarray(rows)[chosen])


def _fingerprint_of(fingerprint, rows, count):
    """Of some rows of the `count` in a cache."""
    if len(rows) == count:
        return fingerprint
    named = f"{rows.start}:{rows.stop}" if isinstance(rows, range) else rows.tolist()
    return hashlib.sha256(f"{fingerprint} {named}".encode()).hexdigest()[:32]


def _parse_split(split):
    """`"train[20000:]"` to `("train", (20000, None), None)`: name, limits of its slice, and "seen" or "unseen"."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+)?:(-?\d+)?\])?(?:\[(seen|unseen)\])?", split)
    if match is None:
        raise ValueError(
            f"split={split!r} is neither a name nor a name with a slice of whole numbers; write train, train[20000:],"
            " train[:20000], train[100:200] or train[unseen]"
        )
    return match[1], tuple(None if limit is None else int(limit) for limit in match.groups()[1:3]), match[4]


def _sliced(count, limits, split):
    """The rows of `count` that a slice names; a limit beyond them is a mistake and not cut off silently."""
    rows = range(*slice(*limits).indices(count))
    if not rows or any(limit is not None and abs(limit) > count for limit in limits):
        raise ValueError(f"split={split!r} must name some of the {count:,} images; choose limits from 0 to {count}")
    return rows


def _cached_info(folder):
    """What info.json says of a complete cache, its `shape` (N, H, W, C) and more; `None` for a damaged or no cache."""
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        return info if (folder / "images.bin").stat().st_size == math.prod(info["shape"]) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _build_cache(folder, source, max_samples, progress):
    """Write images.bin and info.json next to `folder`, then move them in place at once. The caller holds the lock."""
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a builder that was killed
        shutil.rmtree(leftover)
    if folder.exists():
        logger.warning("the image cache %s is damaged and will be built again", folder)
        shutil.rmtree(folder)
    building = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    building.mkdir()
    count, left_out = 0, []
    total = source.count if max_samples is None or source.count is None else min(source.count, max_samples)
    rows = itertools.islice(source.rows(), max_samples)
    try:
        with (
            open(building / "images.bin", "wb") as file,
            tqdm(total=total, desc=f"decoding {source.name}", unit="image", disable=not progress) as bar,
        ):
            for images, _, bad in decoded_blocks(source, rows):
                file.write(images.tobytes())
                count += len(images)
                left_out += bad
                bar.update(len(images) + len(bad))
        if count == 0:
            raise nothing_left(source.name, left_out)
        info = {"shape": (count, source.resolution, source.resolution, source.num_channels), "name": source.name}
        info |= {"left_out": left_out} if source.skips else {}
        (building / "info.json").write_text(
            json.dumps(info | source.transform | source.identity, indent=2), encoding="utf-8"
        )
        os.replace(building, folder)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            f"the cache {folder.parent} cannot be written ({error.strerror}); free some space, name another cache_dir"
            " or stream"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


class ImageDataset(Dataset):
    """Images of a cache, with their mirror images if `random_flip`: item i + N is the mirror image of item i.

    The item is thus a function of its index alone, whatever worker or run asks for it. With a `DataLoader` pass
    `collate_fn=keep_batch`, since the data set already returns a batch.

    Attributes:
        images (`np.memmap` of shape `(N, H, W, C)`, uint8): the cached images of the slice, read-only; of all images
            where some are held out.
        resolution, num_channels (`int`): H = W, and C.
        name (`str`): data set or folder; fingerprint (`str`): hash of the source's content and the options.
        split (`str`): as it was asked for; rows (`range`, or array where some are held out): those of the cache that
            it names, all by default.
        held_out: rows that are held out of these and their fingerprint, or `None`.
        left_out (list of `int`): numbers of the rows of the source that the cache lacks.
        source: what the images were decoded from, which knows names and labels; `None` in copies and in workers.
    """

    source = None
    held_out = None

    def __init__(self, path, shape, name, fingerprint, random_flip=False, split="train", rows=None, left_out=()):
        self.path, self.shape, self.name, self.fingerprint = Path(path), tuple(shape), name, fingerprint
        self.random_flip, self.split = random_flip, split
        self.rows = range(self.shape[0]) if rows is None else rows
        self.left_out = left_out
        self.resolution, self.num_channels = self.shape[1], self.shape[3]
        self._open()

    def _open(self):
        self.images = np.memmap(self.path, np.uint8, "r", shape=self.shape)
        if isinstance(self.rows, range):
            self.images = self.images[self.rows.start : self.rows.stop]

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("images", "source")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self):
        return len(self.rows) * (2 if self.random_flip else 1)

    def __getitem__(self, index):
        """`{"pixel_values": uint8 (C, H, W) in 0 to 255, "index": int}`; `IndexError` outside 0 to `len(self) - 1`."""
        return {"pixel_values": self.batch([index])["pixel_values"][0], "index": int(index)}

    def __getitems__(self, indices):
        """[`ImageDataset.batch`], by the name under which PyTorch's loaders look for it."""
        return self.batch(indices)

    def batch(self, indices):
        """`{"pixel_values": uint8 (B, C, H, W), channels last in memory, "index": int64 (B,)}`."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (0 <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"index out of range: got {indices.min()} to {indices.max()} for {len(self)} images")
        places = indices % len(self.rows)
        if not isinstance(self.rows, range):
            places = self.rows[places]
        batch = np.take(self.images.view(np.ndarray), places, axis=0)
        if self.random_flip:
            mirrored = indices >= len(self.rows)
            batch[mirrored] = batch[mirrored, :, ::-1]
        # Stored as NHWC, so that the permuted view is already channels last.
        return {"pixel_values": torch.from_numpy(batch).permute(0, 3, 1, 2), "index": torch.from_numpy(indices)}

    def unmirrored(self):
        """The same images without their mirror images: a view of this cache."""
        view = copy.copy(self)
        view.random_flip = False
        return view

    def unseen(self):
        """The images that are held out of these, without mirror images; `None` if there are none."""
        if self.held_out is None:
            return None
        view = self.unmirrored()
        (view.rows, view.fingerprint), view.held_out, view.source = self.held_out, None, self.source
        view._open()
        return view

    @property
    def numbers(self):
        """The row of each image, mirror images aside, in the whole split: int64 of shape `(N,)`."""
        return np.delete(np.arange(self.shape[0] + len(self.left_out)), self.left_out)[self.rows]

    def pixels(self, start, stop):
        """Items `start` to `stop` (or to the end) as the models see them: float32 `(B, C, H, W)` in [0, 1]."""
        return to_unit_range(self.batch(range(start, min(stop, len(self))))["pixel_values"])

    def in_order(self, batch_size):
        """Every image once, none mirrored, in batches as of `batch`; `index` is the row of the whole split."""
        numbers = self.numbers
        for start in range(0, len(self.rows), batch_size):
            batch = self.batch(range(start, min(start + batch_size, len(self.rows))))
            yield batch | {"index": torch.from_numpy(numbers[start : start + batch_size])}


def keep_batch(batch):
    """`collate_fn` for a `DataLoader` over an [`ImageDataset`]: the batch is already made."""
    return batch
