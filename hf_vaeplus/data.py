"""Image data: a cache of decoded uint8 crops, or a stream that can resume at any batch.

Decoding a JPEG costs a hundred times more than reading pixels, so `load_images` decodes once into a memory-mapped file
whose name is a hash of the source's content and of every option that changes a pixel. `stream_images` trains from the
source without that file.
"""

import contextlib
import errno
import gzip
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import struct
import tempfile
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from .image_processing_vaeplus import decode_image
from .rendered_faces import FACTOR_NAMES, factors_of, render_faces

# Hub id, centre crop and number of channels of the data sets that have a short name.
PRESETS = {
    "celeba": {"hub_id": "nielsr/CelebA-faces", "crop": 128, "num_channels": 3},
    "mnist": {"hub_id": "ylecun/mnist", "crop": None, "num_channels": 1},
}
EMBEDDED = ("digits", "rendered-faces")
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CACHE_VERSION = 1  # part of every cache key: raise it when the same options give other pixels
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an `OSError`: there is no room for the file
ON_BAD_IMAGE = ("raise", "skip")
MAX_UNPACKED = 2**30  # bytes of a gzipped idx file: a bomb unpacks to a thousand times its size
_BLOCK = 32  # rows decoded by one task of the thread pool, for the cache
_NAMED = 5  # pictures named in a warning that counts them

logger = logging.getLogger(__name__)


class BadImage(ValueError):
    """A picture that cannot be used: unreadable, missing, too small, or with more than 8 bits a channel."""


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


# Sources. `identity` goes into the cache key, `count` is the number of rows if it is known without reading them,
# `rows()` yields (label, content) pairs, and `decode` turns a list of them into uint8 of shape (n, H, W, C), or raises
# `BadImage`.


class _Source:
    count = None
    skips = False  # whether pictures that cannot be used are left out

    def __init__(self, name, resolution, crop, num_channels):
        self.name, self.resolution, self.num_channels = name, resolution, num_channels
        self.transform = {"resolution": resolution, "crop": crop, "num_channels": num_channels}

    def decode(self, rows):
        return np.stack([self.decode_row(*row) for row in rows])

    def decode_row(self, label, content):
        try:
            return decode_image(content, label, **self.transform)
        except ValueError as error:
            raise BadImage(str(error)) from error

    def decode_usable(self, rows):
        """A list of uint8 arrays `(H, W, C)`, with `None` for what is left out."""
        if not self.skips:
            return list(self.decode(rows))
        images = []
        for row in rows:
            try:
                images.extend(self.decode([row]))
            except BadImage:
                images.append(None)
        return images


class _Digits(_Source):
    count = 1797
    identity = {"digits": 1}

    def rows(self):
        from sklearn.datasets import load_digits

        for i, digit in enumerate(load_digits().images):  # 8x8, 0 to 16
            yield f"digit {i}", np.round(digit * (255 / 16)).astype(np.uint8)


class _RenderedFaces(_Source):
    def __init__(self, *args, num_factors, count):
        super().__init__(*args)
        self.num_factors, self.count = num_factors, count
        self.identity = {"rendered-faces": 1, "num_factors": num_factors}

    def rows(self):
        return ((f"face {i}", i) for i in range(self.count))

    def decode(self, rows):
        images = render_faces(factors_of([i for _, i in rows], self.num_factors), self.resolution)
        if self.num_channels == 1:
            images = np.stack([np.asarray(Image.fromarray(image).convert("L"))[..., None] for image in images])
        return images


class _Pictures(_Source):
    def __init__(self, *args, folder, files):
        super().__init__(*args)
        self.files = {file.relative_to(folder).as_posix(): file for file in files}
        self.identity = {"files": _content_hash(self.files)}
        self.count = len(files)

    def rows(self):
        return iter(self.files.items())


class _Idx(_Source):
    """The format of the original MNIST: a header, then uint8 pixels row by row, gzipped or not."""

    def __init__(self, *args, file):
        super().__init__(*args)
        packed = file.suffix == ".gz"
        try:
            with gzip.open(file) if packed else open(file, "rb") as opened:
                magic, self.count, height, width = struct.unpack(">4I", opened.read(16).ljust(16, b"\0"))
                size = self.count * height * width
                if magic == 0x803 and packed and size > MAX_UNPACKED:
                    raise ValueError(f"{file} says that it unpacks to {size:,} bytes; unpack it if that is right")
                pixels = opened.read(min(size, MAX_UNPACKED if packed else file.stat().st_size) + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            magic = None
        if magic != 0x803 or not 0 < height * width < 2**31 or len(pixels) != size:
            raise ValueError(f"{file} is not a complete file of images in idx3-ubyte format; download it again")
        self.images = np.frombuffer(pixels, np.uint8).reshape(self.count, height, width)
        self.identity = {"files": _content_hash({file.name: file})}

    def rows(self):
        return ((f"image {i} of {self.name}", image) for i, image in enumerate(self.images))


class _Table(_Source):
    """Rows of parquet files (`files`) or of a Hub data set (`hub_id` at the commit `sha`), read as a stream."""

    def __init__(self, *args, split, image_column, files=None, hub_id=None, sha=None):
        super().__init__(*args)
        self.split, self.image_column, self.files, self.hub_id, self.sha = split, image_column, files, hub_id, sha
        if files:
            content = _content_hash({f"{i} {file.name}": file for i, file in enumerate(files)})
            self.identity = {"parquet": content, "image_column": image_column}
            self.count = sum(parquet.metadata.num_rows for parquet in map(_open_parquet, files))
        else:
            self.identity = {"hub": hub_id, "sha": sha, "split": split, "image_column": image_column}

    def rows(self):
        values = self._values_of_files() if self.files else self._values_of_hub()
        for i, value in enumerate(values):
            label = f"row {i} of {self.name}"
            if isinstance(value, dict):
                value = value.get("bytes") or value.get("path")
            if not isinstance(value, bytes | str | None):
                raise ValueError(f"{label} holds a {type(value).__name__}, expected a picture; name another column")
            yield label, value

    def _values_of_files(self):
        for file in self.files:
            parquet = _open_parquet(file)
            self._check_column(parquet.schema_arrow.names)
            try:
                for batch in parquet.iter_batches(_BLOCK, columns=[self.image_column]):
                    yield from batch.column(0).to_pylist()
            except Exception as error:  # damaged files make Arrow raise nearly anything
                raise ValueError(f"{file} is damaged ({error}); fetch it again") from error

    def _values_of_hub(self):
        import datasets

        with _named(self.hub_id):
            splits = datasets.load_dataset(self.hub_id, revision=self.sha, streaming=True)
        if self.split not in splits:
            raise ValueError(f"no split {self.split!r} in {self.hub_id}, which has {sorted(splits)}; choose one")
        table = splits[self.split].decode(False)
        with _named(self.hub_id):
            columns = table.column_names or list(next(iter(table), {}))
        self._check_column(columns)
        with _named(self.hub_id):
            for row in table.select_columns([self.image_column]):
                yield row[self.image_column]

    def _check_column(self, columns):
        if self.image_column not in columns:
            raise ValueError(f"no column {self.image_column!r} in {self.name}, which has {columns}; choose one")

    def decode_row(self, label, content):
        if not content:
            raise BadImage(f"{label} has no image, expected one in every row; remove the row")
        if isinstance(content, str):
            content = self._read_address(label, content)
        return super().decode_row(label, content)

    def _read_address(self, label, address):
        """A picture that is a file of the Hub data set itself. Rows come from strangers: nothing else is opened."""
        import fsspec

        own = f"hf://datasets/{self.hub_id}@{self.sha}/"
        container = re.sub("^zip://(?:(?!::).)+::", "", address)
        if self.files or not container.startswith(own) or "::" in container or ".." in container.split("/"):
            raise BadImage(
                f"{label} names {address[:100]!r}, which is not opened, expected the picture itself; store its bytes"
            )
        try:
            with fsspec.open(address, "rb") as file:
                return file.read()
        except OSError as error:
            raise ValueError(f"{label} names a file that cannot be read ({error}); restore it") from error


@contextlib.contextmanager
def _named(hub_id):
    """The errors of `datasets` seldom say which data set they are about."""
    try:
        yield
    except (FileNotFoundError, RuntimeError, ValueError) as error:  # RuntimeError: it would have to run code
        raise ValueError(f"{hub_id} cannot be read as a data set ({error}); look at its page on the Hub") from error


def _open_parquet(file):
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except Exception as error:  # as above
        raise ValueError(f"{file} is no readable parquet file ({error}); fetch it again") from error


def _content_hash(files):
    """SHA-256 over the names and bytes of `files`, a dict from name to path, in its order."""
    total = hashlib.sha256()
    for name, path in files.items():
        with open(path, "rb") as file:
            total.update(f"{name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _open_source(
    dataset_name=None,
    *,
    train_data_dir=None,
    train_data_files=None,
    split="train",
    revision=None,
    image_column="image",
    resolution=64,
    crop=None,
    num_channels=None,
    num_factors=8,
    max_samples=None,
    on_bad_image="raise",
):
    """Check the options and return (source, max_samples, fingerprint); `load_images` documents them."""
    preset = PRESETS.get(dataset_name, {})
    given = {"train_data_dir": train_data_dir, "train_data_files": train_data_files}
    if not (preset and (train_data_dir or train_data_files)):
        given["dataset_name"] = dataset_name
    given = [name for name, value in given.items() if value]
    if len(given) != 1:
        raise ValueError(
            "give exactly one of dataset_name, train_data_dir and train_data_files as the source of images, "
            f"got {' and '.join(given) or 'none'}"
        )
    num_channels = preset.get("num_channels", 3) if num_channels is None else num_channels
    crop = preset.get("crop") if crop is None else crop
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels must be 1 (grey) or 3 (RGB), got {num_channels}")
    for option, value in {"resolution": resolution, "crop": crop, "max_samples": max_samples}.items():
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"on_bad_image must be one of {', '.join(ON_BAD_IMAGE)}, got {on_bad_image!r}")
    if split != "train" and (train_data_files or dataset_name in EMBEDDED):
        raise ValueError(f"{given[0]} has no splits, got split={split!r}; leave split at its default")
    if revision is not None and (given != ["dataset_name"] or dataset_name in EMBEDDED):
        raise ValueError(f"only a Hub data set has a revision, got {revision!r} for {given[0]}; leave it out")

    args = (dataset_name or Path(train_data_dir or "parquet").name, resolution, crop, num_channels)
    if train_data_files:
        patterns = [train_data_files] if isinstance(train_data_files, str | os.PathLike) else train_data_files
        files = [Path(file) for pattern in patterns for file in sorted(glob(str(pattern), recursive=True))]
        if not files:
            raise FileNotFoundError(f"no file matches train_data_files={train_data_files!r}; check the path")
        source = _Table(*args, split=split, image_column=image_column, files=files)
    elif train_data_dir:
        source = _open_folder(Path(train_data_dir), args, split, image_column, max_samples)
    elif dataset_name == "digits":
        source = _Digits(*args)
    elif dataset_name == "rendered-faces":
        if crop is not None or not 1 <= num_factors <= len(FACTOR_NAMES):
            raise ValueError(
                f"rendered-faces takes no crop and 1 to {len(FACTOR_NAMES)} factors, "
                f"got crop={crop} and num_factors={num_factors}"
            )
        source = _RenderedFaces(*args, num_factors=num_factors, count=max_samples or 20_000)
    else:
        hub_id = preset.get("hub_id", dataset_name)
        sha = _hub_commit(hub_id, revision)
        source = _Table(*args, split=split, image_column=image_column, hub_id=hub_id, sha=sha)
    key = {"version": CACHE_VERSION, "max_samples": max_samples, **source.transform, **source.identity}
    if on_bad_image == "skip":
        source.skips, key["on_bad_image"] = True, on_bad_image
    return source, max_samples, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _open_folder(folder, args, split, image_column, max_samples):
    """A folder of pictures, of parquet files named after their split, or of MNIST's four idx files."""
    if not folder.is_dir():
        raise FileNotFoundError(f"train_data_dir={str(folder)!r} is not a folder; check the path")
    files = sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.as_posix())
    idx = {match[1]: file for file in files if (match := re.match(r"(train|t10k)-images[-.]idx3-ubyte", file.name))}
    if idx:
        file = idx.get({"train": "train", "test": "t10k"}.get(split))
        if file is None:
            raise ValueError(f"no split {split!r} in train_data_dir={str(folder)!r}; choose train or test")
        return _Idx(*args, file=file)
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    tables = [file for file in files if file.suffix == ".parquet"]
    if bool(pictures) == bool(tables):
        found = "both; name the parquet files with train_data_files" if tables else "neither; check the path"
        raise ValueError(f"train_data_dir={str(folder)!r} must hold pictures or parquet files, got {found}")
    if pictures:
        if split != "train":
            raise ValueError(f"a folder of pictures has no splits, got split={split!r}; name its subfolder")
        return _Pictures(*args, folder=folder, files=pictures[:max_samples])
    matching = [file for file in tables if re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", file.name)]
    if not matching:
        splits = sorted({re.split(r"[-.]", file.name)[0] for file in tables})
        raise ValueError(f"no split {split!r} in train_data_dir={str(folder)!r}, which has {splits}; choose one")
    return _Table(*args, split=split, image_column=image_column, files=matching)


def _hub_commit(hub_id, revision):
    """The commit that `revision` names now; a full commit hash needs no request."""
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().dataset_info(hub_id, revision=revision).sha
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(
            f"dataset_name={hub_id!r} at revision={revision!r} is not on the Hub ({type(error).__name__}); give "
            f"{', '.join((*EMBEDDED, *PRESETS))}, a data set id owner/name, or train_data_dir for local pictures"
        ) from error


def load_images(
    dataset_name=None,
    *,
    train_data_dir=None,
    train_data_files=None,
    split="train",
    revision=None,
    image_column="image",
    resolution=64,
    crop=None,
    num_channels=None,
    num_factors=8,
    max_samples=None,
    on_bad_image="raise",
    random_flip=False,
    cache_dir=None,
    progress=True,
):
    """Decode a set of images once into a cache on disk and open it. Exactly one source must be given.

    Args:
        dataset_name (`str`, *optional*): `"digits"` (1,797 real digits), `"rendered-faces"` (drawings from
            `num_factors` factors), `"celeba"`, `"mnist"`, or a Hub id. The name `"celeba"` or `"mnist"`
            beside a local source only sets the crop and the number of channels.
        train_data_dir (`str`, *optional*): folder of pictures, searched recursively and taken in the order of their
            paths, of parquet files whose names begin with `split`, or of MNIST's idx files (`"train"`, `"test"`).
        train_data_files (`str` or list of `str`, *optional*): paths or glob patterns of parquet files.
        split (`str`): split of a Hub data set or of a folder of parquet files. Of any source a slice can be taken, as
            in `datasets`: `"train[20000:]"`, `"train[:20000]"`, `"train[-500:]"`. All slices share one cache.
        revision (`str`, *optional*): branch, tag or commit of a Hub data set; with a full commit hash
            a cached set opens offline.
        image_column (`str`): column of pictures in a Hub data set or parquet files.
        resolution (`int`): height and width of the images in pixels.
        crop (`int`, *optional*): side in source pixels of a centre crop taken before resizing; by default 128 for
            CelebA, else the largest square.
        num_channels (`int`, *optional*): 1 (grey) or 3 (RGB); by default 1 for MNIST, else 3.
        num_factors (`int`): number of varying factors of `"rendered-faces"`.
        max_samples (`int`, *optional*): keep at most that many of the first images, before a slice is taken
            (`"rendered-faces"`: draw that many, by default 20,000).
        on_bad_image (`"raise" | "skip"`): what to do about a picture that cannot be used ([`BadImage`]): raise, or
            leave it out and count and name it in a warning of the log. Slices are then of the images that are left.
        random_flip (`bool`): append the mirror image of every image, after a slice is taken.
        cache_dir (`str`, *optional*): parent of the cache; by default `$VAEPLUS_CACHE`, else `~/.cache/hf_vaeplus`.
        progress (`bool`): show a progress bar while decoding.
    Returns:
        [`ImageDataset`].
    Raises:
        ValueError: for no or several sources, an option out of range, an unknown split or column, a malformed or
            empty slice, no images, or a file that cannot be read.
        BadImage: (a `ValueError`) for a picture that cannot be used.
        FileNotFoundError: for a path that does not exist.
    """
    whole_split, limits = _parse_split(split)
    source, max_samples, fingerprint = _open_source(
        dataset_name,
        train_data_dir=train_data_dir,
        train_data_files=train_data_files,
        split=whole_split,
        revision=revision,
        image_column=image_column,
        resolution=resolution,
        crop=crop,
        num_channels=num_channels,
        num_factors=num_factors,
        max_samples=max_samples,
        on_bad_image=on_bad_image,
    )
    cache_dir = Path(cache_dir or os.environ.get("VAEPLUS_CACHE") or Path.home() / ".cache" / "hf_vaeplus")
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
                _build_cache(folder, source, max_samples, progress)
    info = _cached_info(folder)
    shape, left_out = tuple(info["shape"]), info.get("left_out", [])
    _warn_of_left_out(source.name, [label for _, label in left_out])
    rows = _sliced(shape[0], limits, split)
    if len(rows) < shape[0]:
        fingerprint = hashlib.sha256(f"{fingerprint} {rows.start}:{rows.stop}".encode()).hexdigest()[:32]
    numbers = [number for number, _ in left_out]
    return ImageDataset(folder / "images.bin", shape, source.name, fingerprint, random_flip, split, rows, numbers)


def _warn_of_left_out(name, labels):
    if labels:
        more = f" and {len(labels) - _NAMED:,} more" if len(labels) > _NAMED else ""
        named = ", ".join(labels[:_NAMED])
        logger.warning("%s: left out %s that cannot be used: %s%s", name, _pictures(len(labels)), named, more)


def _pictures(count):
    return f"{count:,} picture" if count == 1 else f"{count:,} pictures"


def _nothing_left(name, labels):
    if labels:
        return ValueError(
            f"{name} holds no picture that can be used, all {len(labels):,} were left out; set on_bad_image to raise"
            " to see why"
        )
    return ValueError(f"{name} holds no images, expected at least one; check the source and the split")


def _parse_split(split):
    """`"train[20000:]"` to `("train", (20000, None))`: the name and the limits of its slice."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+)?:(-?\d+)?\])?", split)
    if match is None:
        raise ValueError(
            f"split={split!r} is neither a name nor a name with a slice of whole numbers; write train, train[20000:],"
            " train[:20000] or train[100:200]"
        )
    return match[1], tuple(None if limit is None else int(limit) for limit in match.groups()[1:])


def _sliced(count, limits, split):
    """The rows of `count` that a slice names; a limit beyond them is a mistake and not cut off silently."""
    rows = range(*slice(*limits).indices(count))
    if not rows or any(limit is not None and abs(limit) > count for limit in limits):
        raise ValueError(f"split={split!r} must name some of the {count:,} images; choose limits from 0 to {count}")
    return rows


def _cached_info(folder):
    """What info.json says of a complete cache, its `shape` (N, H, W, C) and more; `None` for a damaged or no cache."""
    try:
        info = json.loads((folder / "info.json").read_text())
        return info if (folder / "images.bin").stat().st_size == math.prod(info["shape"]) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _build_cache(folder, source, max_samples, progress):
    """Write images.bin and info.json next to `folder`, then move them in place at once. The caller holds the lock."""
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a builder that was killed
        shutil.rmtree(leftover)
    if folder.exists():
        warnings.warn(f"the image cache {folder} is damaged and will be built again", stacklevel=3)
        shutil.rmtree(folder)
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    count, left_out = 0, []
    total = source.count if max_samples is None or source.count is None else min(source.count, max_samples)
    rows = itertools.islice(source.rows(), max_samples)
    try:
        with (
            open(building / "images.bin", "wb") as file,
            tqdm(total=total, desc=f"decoding {source.name}", unit="image", disable=not progress) as bar,
        ):
            for images, _, bad in _decoded_blocks(source, rows):
                file.write(images.tobytes())
                count += len(images)
                left_out += bad
                bar.update(len(images) + len(bad))
        if count == 0:
            raise _nothing_left(source.name, left_out)
        info = {"shape": (count, source.resolution, source.resolution, source.num_channels), "name": source.name}
        info |= {"left_out": left_out} if source.skips else {}
        (building / "info.json").write_text(json.dumps(info | source.transform | source.identity, indent=2))
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


def _decoded_blocks(source, rows, size=_BLOCK):
    """Decode `rows` in threads, in order, few of them in memory.

    Yields:
        Of at most `size` rows: uint8 images of shape (n, H, W, C), their numbers among `rows`, and (number, label) of
        those that are left out.
    """

    def decode(first, block):
        decoded = source.decode_usable(block)
        usable = [place for place, image in enumerate(decoded) if image is not None]
        shape = (-1, source.resolution, source.resolution, source.num_channels)
        images = np.array([decoded[place] for place in usable], np.uint8).reshape(shape)
        bad = [(first + place, block[place][0]) for place, image in enumerate(decoded) if image is None]
        return images, [first + place for place in usable], bad

    num_threads = min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads) as pool:
        pending, first = deque(), 0
        while block := list(itertools.islice(rows, size)):
            pending.append(pool.submit(decode, first, block))
            first += len(block)
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class ImageDataset(Dataset):
    """Images of a cache, with their mirror images if `random_flip`: item i + N is the mirror image of item i.

    The item is thus a function of its index alone, whatever worker or run asks for it. With a `DataLoader` pass
    `collate_fn=keep_batch`, since `__getitems__` already returns a batch.

    Attributes:
        images (`np.memmap` of shape `(N, H, W, C)`, uint8): the cached images of the slice, read-only.
        resolution, num_channels (`int`): H = W, and C.
        name (`str`): data set or folder; fingerprint (`str`): hash of the source's content and the options.
        split (`str`): as it was asked for; rows (`range`): those of the cache that it names, all by default.
        left_out (list of `int`): numbers of the rows of the source that the cache lacks.
    """

    def __init__(self, path, shape, name, fingerprint, random_flip=False, split="train", rows=None, left_out=()):
        self.path, self.shape, self.name, self.fingerprint = Path(path), tuple(shape), name, fingerprint
        self.random_flip, self.split = random_flip, split
        self.rows = range(self.shape[0]) if rows is None else rows
        self.left_out = left_out
        self.resolution, self.num_channels = self.shape[1], self.shape[3]
        self._open()

    def _open(self):
        self.images = np.memmap(self.path, np.uint8, "r", shape=self.shape)[self.rows.start : self.rows.stop]

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "images"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self):
        return len(self.images) * (2 if self.random_flip else 1)

    def __getitem__(self, index):
        """`{"pixel_values": uint8 (C, H, W) in 0 to 255, "index": int}`; `IndexError` outside 0 to `len(self) - 1`."""
        return {"pixel_values": self.__getitems__([index])["pixel_values"][0], "index": int(index)}

    def __getitems__(self, indices):
        """`{"pixel_values": uint8 (B, C, H, W), channels last in memory, "index": int64 (B,)}`."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (0 <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"index out of range: got {indices.min()} to {indices.max()} for {len(self)} images")
        batch = np.take(self.images.view(np.ndarray), indices % len(self.images), axis=0)
        if self.random_flip:
            mirrored = indices >= len(self.images)
            batch[mirrored] = batch[mirrored, :, ::-1]
        # Stored as NHWC, so that the permuted view is already channels last.
        return {"pixel_values": torch.from_numpy(batch).permute(0, 3, 1, 2), "index": torch.from_numpy(indices)}

    def pixels(self, start, stop):
        """Items `start` to `stop` (or to the end) as the models see them: float32 `(B, C, H, W)` in [0, 1]."""
        return to_unit_range(self.__getitems__(range(start, min(stop, len(self))))["pixel_values"])

    def in_order(self, batch_size):
        """Every image once, none mirrored, in batches as of `__getitems__`; `index` is the row of the whole split."""
        numbers = np.delete(np.arange(self.shape[0] + len(self.left_out)), self.left_out)[self.rows]
        for start in range(0, len(self.images), batch_size):
            batch = self.__getitems__(range(start, min(start + batch_size, len(self.images))))
            yield batch | {"index": torch.from_numpy(numbers[start : start + batch_size])}


def keep_batch(batch):
    """`collate_fn` for a `DataLoader` over an [`ImageDataset`]: the batch is already made."""
    return batch


def stream_images(dataset_name=None, *, random_flip=False, seed=0, shuffle_buffer=1000, **source_options):
    """Train straight from a source, without a cache: the arguments and errors of `load_images`, and those below.

    Args:
        seed (`int`): seed of the shuffling and of the mirror images, at least 0.
        shuffle_buffer (`int`): number of encoded images that are shuffled among each other, at least 1 (no shuffling).
    Returns:
        [`ImageStream`].
    """
    if seed < 0 or shuffle_buffer < 1:
        raise ValueError(f"expected seed >= 0 and shuffle_buffer >= 1, got {seed} and {shuffle_buffer}")
    split = source_options.get("split", "train")
    if "[" in split:
        raise ValueError(f"a stream takes no slice of a split, got split={split!r}; name the split, or do not stream")
    source, max_samples, fingerprint = _open_source(dataset_name, **source_options)
    return ImageStream(source, max_samples, fingerprint, random_flip, seed, shuffle_buffer)


class _Sample(NamedTuple):
    label: str
    content: object
    mirrored: bool
    epoch: int


class _Ahead:
    """An iterator that can be looked into without moving on."""

    def __init__(self, items):
        self._items, self._seen = items, deque()

    def __iter__(self):
        return self

    def __next__(self):
        return self._seen.popleft() if self._seen else next(self._items)

    def peek(self):
        for place in itertools.count():
            if place == len(self._seen):
                self._seen.append(next(self._items))
            yield self._seen[place]


class ImageStream(IterableDataset):
    """Endless batches in the form of [`ImageDataset`], where `index` is the position in the stream.

    Pass e over the source is shuffled by (seed, e). Global batch t holds samples t * batch_size * world_size and on;
    rank r decodes and yields its rows r * batch_size to (r + 1) * batch_size. Iterating from batch t yields what an
    uninterrupted run yields there, since skipping reads the source without decoding. With a `DataLoader` pass
    `batch_size=None` and at most one worker: decoding uses threads, and `datasets` would split the rows among workers.

    In place of a picture that is left out comes the next one that can be used: all others keep their places.
    """

    def __init__(self, source, max_samples, fingerprint, random_flip, seed, shuffle_buffer):
        self.source, self.max_samples, self.fingerprint = source, max_samples, fingerprint
        self.random_flip, self.seed, self.shuffle_buffer = random_flip, seed, shuffle_buffer
        self.resolution, self.num_channels, self.name = source.resolution, source.num_channels, source.name
        self.first_batch, self._left_out = None, {}  # labels, in the order in which they were met

    def set_position(self, first_batch, batch_size, rank=0, world_size=1):
        """Choose where the next iteration starts, in batches since the start of training, and what this rank reads.

        Raises:
            ValueError: unless first_batch >= 0, batch_size >= 1 and 0 <= rank < world_size.
        """
        if first_batch < 0 or batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "expected first_batch >= 0, batch_size >= 1 and 0 <= rank < world_size, "
                f"got {first_batch}, {batch_size}, {rank} and {world_size}"
            )
        self.first_batch, self.batch_size, self.rank, self.world_size = first_batch, batch_size, rank, world_size

    def __iter__(self):
        if self.first_batch is None:
            raise ValueError("the stream has no position, expected a batch size; call set_position first")
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"a stream takes at most one DataLoader worker, got {worker.num_workers}; set num_workers=1"
            )
        position, samples = 0, _Ahead(self._samples())
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for batch in itertools.count(self.first_batch):
                start = (batch * self.world_size + self.rank) * self.batch_size
                rows = list(itertools.islice(samples, start - position, start - position + self.batch_size))
                position = start + self.batch_size
                images = list(pool.map(self._decoded, rows))
                for place in reversed(range(len(rows))):
                    if images[place] is None:
                        self._leave_out(rows[place].label)
                        if place + 1 < len(rows):
                            rows[place], images[place] = rows[place + 1], images[place + 1]
                        else:
                            rows[place], images[place] = self._next_usable(rows[place], samples)
                images, mirrored = np.stack(images), np.array([row.mirrored for row in rows])
                images[mirrored] = images[mirrored, :, ::-1]
                yield {
                    "pixel_values": torch.from_numpy(images).permute(0, 3, 1, 2),
                    "index": torch.arange(start, position),
                }

    def _decoded(self, row):
        return self.source.decode_usable([(row.label, row.content)])[0]

    def _next_usable(self, bad, samples):
        """The first sample to come, and its image, that can take the place of the sample `bad`."""
        for row in samples.peek():
            if row.epoch > bad.epoch + 1:  # a whole pass has been tried
                raise _nothing_left(self.name, self._left_out)
            image = self._decoded(row)
            if image is not None:
                return row, image
            self._leave_out(row.label)

    def _leave_out(self, label):
        if label not in self._left_out:
            self._left_out[label] = None
            if len(self._left_out).bit_count() == 1:  # a stream has no end: told at 1, 2, 4, 8, ...
                _warn_of_left_out(self.name, list(self._left_out))

    def in_order(self, batch_size):
        """Every image of one pass over the source, neither shuffled nor mirrored, as [`ImageDataset.in_order`]."""
        rows, left_out, is_empty = itertools.islice(self.source.rows(), self.max_samples), [], True
        for images, numbers, bad in _decoded_blocks(self.source, rows, batch_size):
            left_out += [label for _, label in bad]
            if numbers:
                is_empty = False
                yield {"pixel_values": torch.from_numpy(images).permute(0, 3, 1, 2), "index": torch.tensor(numbers)}
        if is_empty:
            raise _nothing_left(self.name, left_out)
        _warn_of_left_out(self.name, left_out)

    def _samples(self):
        """Endless [`_Sample`]s, each pass over the source shuffled through a buffer."""
        for epoch in itertools.count():
            rng = np.random.default_rng([self.seed, epoch])
            buffer, is_empty = [], True
            for row in itertools.islice(self.source.rows(), self.max_samples):
                is_empty = False
                buffer.append(_Sample(*row, self.random_flip and rng.random() < 0.5, epoch))
                if len(buffer) == self.shuffle_buffer:
                    # A random row moves to the end and leaves from there.
                    i = rng.integers(len(buffer))
                    buffer[i], buffer[-1] = buffer[-1], buffer[i]
                    yield buffer.pop()
            if is_empty:
                raise _nothing_left(self.name, [])
            rng.shuffle(buffer)
            yield from buffer
