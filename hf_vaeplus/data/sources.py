"""Where images come from: embedded sets, folders of pictures, tables, MNIST's files, data sets on the Hub.

A source has an `identity` that goes into the cache key, a `count` of its rows if that is known without reading them,
`rows()` that yields (label, content) pairs, and `decode`, which turns a list of them into uint8 of shape (n, H, W, C)
or raises `BadImage`.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import logging
import math
import os
import re
import struct
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from types import SimpleNamespace

import numpy as np
from PIL import Image

from ..fields import from_home
from ..image_processing_vaeplus import decode_image
from .catalogue import EMBEDDED, NAMED_DATA_SETS
from .folders import (
    BadImage,
    LeftOut,
    archive_kind,
    files_of_patterns,
    labels_of_folders,
    list_files,
    named,
    of_split,
    pictures_of,
    printable,
    split_names,
    without_copies,
)
from .hashes import FileHashes
from .options import ImageOptions
from .rendered_faces import FACTOR_NAMES, factors_of, render_faces

CACHE_VERSION = 1  # part of every cache key: raise it when the same options give other pixels


MAX_UNPACKED = 2**30  # bytes of a gzipped idx file: a bomb unpacks to a thousand times its size


_IDX = re.compile(r"(train|t10k)-images[-.]idx3-ubyte")


_BLOCK = 32  # rows decoded by one task of the thread pool, for the cache


logger = logging.getLogger(__name__)


class _Source:
    count = None
    label_name = "label"  # of what a source that has no columns says of its rows
    skips = False  # whether pictures that cannot be used are left out

    def __init__(self, name, resolution, crop, num_channels):
        self.name, self.resolution, self.num_channels = name, resolution, num_channels
        self.transform = {"resolution": resolution, "crop": crop, "num_channels": num_channels}

    def label(self, number):
        """What a row is called, here and now: the same content may lie elsewhere under other names."""
        return f"row {number} of {self.name}"

    def file_names(self) -> list[str] | None:
        """The names of the rows, where these are files."""
        return None

    def labels(self, column: str | None = None) -> list | None:
        """What each row is an example of, where the source says so; of a table the values of a column.

        Raises:
            ValueError: no such column, or no table.
        """
        if column not in (None, self.label_name):
            raise ValueError(
                f"{self.name} has no columns, got label_column={column!r}; its own labels are called {self.label_name}"
            )
        return None

    def label_names(self, column: str) -> list[str] | None:
        """Names of the classes, attributes or factors that a column holds, where the source says so."""
        return None

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

    def labels(self, column=None):
        from sklearn.datasets import load_digits

        super().labels(column)
        return None if column is None else load_digits().target.tolist()


class _RenderedFaces(_Source):
    label_name = "factors"

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

    def labels(self, column=None):
        super().labels(column)
        return None if column is None else factors_of(range(self.count), self.num_factors).tolist()

    def label_names(self, column):
        return list(FACTOR_NAMES[: self.num_factors])


class _Pictures(_Source):
    def __init__(self, *args, files, hashes):
        super().__init__(*args)
        self.files, self.names, self.count = files, list(files), len(files)
        self.identity = {"files": hashes.of_all(files.values())}

    def rows(self):
        return ((self.label(i), file) for i, file in enumerate(self.files.values()))

    def label(self, number):
        return printable(self.names[number])

    def file_names(self):
        return list(map(printable, self.names))

    def labels(self, column=None):
        super().labels(column)
        return labels_of_folders(self.names)


class _Idx(_Source):
    """The format of the original MNIST: a header, then uint8 pixels row by row, gzipped or not."""

    def __init__(self, *args, file, hashes):
        super().__init__(*args)
        self.file, self.count = file, len(_idx(file, 3))
        self.identity = {"files": hashes.of_all([file])}

    def rows(self):
        return ((self.label(i), image) for i, image in enumerate(_idx(self.file, 3)))

    def label(self, number):
        return f"image {number} of {self.name}"

    def labels(self, column=None):
        super().labels(column)
        stem = self.file.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
        file = next(filter(Path.is_file, (self.file.with_name(stem + end) for end in ("", ".gz"))), None)
        if file is None:
            return None
        labels = _idx(file, 1).tolist()
        if len(labels) != self.count:
            raise ValueError(f"{file} holds {len(labels):,} labels for {self.count:,} images; download both again")
        return labels


def _idx(file: Path, num_dims: int) -> np.ndarray:
    """The uint8 array of `num_dims` axes in a file of the idx format, gzipped or not.

    Raises:
        ValueError: it is damaged, or would unpack to more than `MAX_UNPACKED`.
    """
    packed, kind = file.suffix == ".gz", {1: "labels", 3: "images"}[num_dims]
    try:
        with gzip.open(file) if packed else open(file, "rb") as opened:
            header = opened.read(4 + 4 * num_dims).ljust(4 + 4 * num_dims, b"\0")
            magic, *shape = struct.unpack(f">{1 + num_dims}I", header)
            size = math.prod(shape)
            if magic == 0x800 + num_dims and packed and size > MAX_UNPACKED:
                raise ValueError(f"{file} says that it unpacks to {size:,} bytes; unpack it if that is right")
            content = opened.read(min(size, MAX_UNPACKED if packed else file.stat().st_size) + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        magic = None
    if magic != 0x800 + num_dims or not 0 < math.prod(shape[1:]) < 2**31 or len(content) != size:
        raise ValueError(f"{file} is not a complete file of {kind} in idx{num_dims}-ubyte format; download it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


class _Table(_Source):
    """Rows of parquet or Arrow files (`files`) or of a Hub data set (`hub_id` at the commit `sha`), as a stream."""

    def __init__(self, *args, split, image_column, files=None, hub_id=None, sha=None, hashes=None):
        super().__init__(*args)
        self.split, self.image_column, self.files, self.hub_id, self.sha = split, image_column, files, hub_id, sha
        if files:
            self.identity = {"parquet": hashes.of_all(files), "image_column": image_column}
            self.count = sum(table.metadata.num_rows for table in map(_open_table, files))
        else:
            self.identity = {"hub": hub_id, "sha": sha, "split": split, "image_column": image_column}

    def labels(self, column=None):
        return None if column is None else list(self._values(column))

    def label_names(self, column):
        if self.files:
            import datasets

            try:
                features = datasets.Features.from_arrow_schema(_open_table(self.files[0]).schema_arrow)
            except Exception:  # a file may say anything of its columns
                return None
        else:
            features = self._stream_of_hub().features or {}
        return getattr(features.get(column), "names", None)

    def _values(self, column):
        return self._values_of_files(column) if self.files else self._values_of_hub(column)

    def rows(self):
        for i, value in enumerate(self._values(self.image_column)):
            label = self.label(i)
            if isinstance(value, dict):
                value = value.get("bytes") or value.get("path")
            if not isinstance(value, bytes | str | None):
                raise ValueError(f"{label} holds a {type(value).__name__}, expected a picture; name another column")
            yield label, value

    def _values_of_files(self, column):
        for file in self.files:
            table = _open_table(file)
            self._check_column(column, table.schema_arrow.names)
            try:
                for batch in table.iter_batches(_BLOCK, columns=[column]):
                    yield from batch.column(0).to_pylist()
            except Exception as error:  # damaged files make Arrow raise nearly anything
                raise ValueError(f"{file} is damaged ({error}); fetch it again") from error

    def _stream_of_hub(self):
        import datasets

        with _named(self.hub_id):
            splits = datasets.load_dataset(self.hub_id, revision=self.sha, streaming=True)
        if self.split not in splits:
            raise ValueError(f"no split {self.split!r} in {self.hub_id}, which has {sorted(splits)}; choose one")
        return splits[self.split]

    def _values_of_hub(self, column):
        table = self._stream_of_hub().decode(False)
        with _named(self.hub_id):
            columns = table.column_names or list(next(iter(table), {}))
        self._check_column(column, columns)
        with _named(self.hub_id):
            for row in table.select_columns([column]):
                yield row[column]

    def _check_column(self, column, columns):
        if column not in columns:
            raise ValueError(f"no column {column!r} in {self.name}, which has {columns}; choose one")

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


class _ArrowFile:
    """What a [`_Table`] uses of `ParquetFile`, for the files that `Dataset.save_to_disk` writes."""

    def __init__(self, file):
        self._file = file
        with self._opened() as batches:
            self.schema_arrow = batches.schema
            self.metadata = SimpleNamespace(num_rows=sum(map(len, batches)))

    def _opened(self):
        import pyarrow

        return pyarrow.ipc.open_stream(pyarrow.memory_map(os.fsencode(self._file)))

    def iter_batches(self, size, columns):
        with self._opened() as batches:
            for batch in batches:
                for start in range(0, len(batch), size):
                    yield batch.select(columns).slice(start, size)


def _open_table(file):
    import pyarrow.parquet

    is_arrow = file.suffix == ".arrow"
    try:
        # Bytes, because Arrow takes no text of a name that is no UTF-8.
        return _ArrowFile(file) if is_arrow else pyarrow.parquet.ParquetFile(pyarrow.OSFile(os.fsencode(file)))
    except Exception as error:  # as above
        if kind := archive_kind(file):
            raise ValueError(f"{file} is a {kind} archive, expected a parquet file; unpack it") from error
        kind = "Arrow" if is_arrow else "parquet"
        raise ValueError(f"{file} is no readable {kind} file ({error}); fetch it again") from error


def cache_folder(cache_dir: str | os.PathLike | None) -> Path:
    """Where decoded pixels and the hashes of files are kept: `cache_dir`, else `$VAEPLUS_CACHE`, else the home's."""
    folder = cache_dir or os.environ.get("VAEPLUS_CACHE")
    try:
        return Path(from_home(folder or "~/.cache/hf_vaeplus"))
    except ValueError as error:
        raise ValueError(f"the cache {error}, or name a folder with cache_dir or VAEPLUS_CACHE") from None


def open_source(options: ImageOptions, cache_dir: Path) -> tuple[_Source, str]:
    """The source that `options` name, and the fingerprint of its content and of all that changes its pixels.

    Raises:
        ValueError, FileNotFoundError: as `load_images`.
    """
    name, folder, split = options.dataset_name, options.train_data_dir, options.split
    given = {"train_data_dir": folder, "train_data_files": options.train_data_files}
    if not (name in NAMED_DATA_SETS and any(given.values())):
        given["dataset_name"] = name
    given = [option for option, value in given.items() if value]
    if len(given) != 1:
        raise ValueError(
            "give exactly one of dataset_name, train_data_dir and train_data_files as the source of images, "
            f"got {' and '.join(given) or 'none'}"
        )
    if split != "train" and (options.train_data_files or name in EMBEDDED):
        raise ValueError(f"{given[0]} has no splits, got split={split!r}; leave split at its default")
    if options.dataset_revision is not None and (given != ["dataset_name"] or name in EMBEDDED):
        raise ValueError(
            f"only a Hub data set has a revision, got {options.dataset_revision!r} for {given[0]}; leave it out"
        )

    shown = printable(Path(os.path.abspath(folder)).name) if folder else "parquet"
    shape = (name or shown, options.resolution, options.source_crop, options.source_channels)
    hashes = FileHashes(cache_dir)
    if options.train_data_files:
        patterns = options.train_data_files
        patterns = [patterns] if isinstance(patterns, str) else patterns
        left_out = LeftOut()
        files = files_of_patterns(patterns, left_out)
        if not files:
            raise FileNotFoundError(f"no file matches train_data_files={options.train_data_files!r}; check the path")
        if folders := [str(file) for file in files if file.is_dir()]:
            raise ValueError(f"train_data_files names the folder {folders[0]!r}; name it with train_data_dir")
        left_out.warn("parquet")
        source = _Table(*shape, split=split, image_column=options.image_column, files=files, hashes=hashes)
    elif folder:
        source = _open_folder(Path(folder), shape, options, hashes)
    elif name == "digits":
        source = _Digits(*shape)
    elif name == "rendered-faces":
        if options.crop is not None or not 1 <= options.num_factors <= len(FACTOR_NAMES):
            raise ValueError(
                f"rendered-faces takes no crop and 1 to {len(FACTOR_NAMES)} factors, "
                f"got crop={options.crop} and num_factors={options.num_factors}"
            )
        source = _RenderedFaces(*shape, num_factors=options.num_factors, count=options.max_train_samples or 20_000)
    else:
        hub_id = NAMED_DATA_SETS.get(name, {}).get("hub_id", name)
        sha = _hub_commit(hub_id, options.dataset_revision)
        source = _Table(*shape, split=split, image_column=options.image_column, hub_id=hub_id, sha=sha)
    key = {"version": CACHE_VERSION, "max_samples": options.max_train_samples, **source.transform, **source.identity}
    if options.on_bad_image == "skip":
        source.skips, key["on_bad_image"] = True, options.on_bad_image
    return source, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _open_folder(folder: Path, shape: tuple, options: ImageOptions, hashes: FileHashes):
    """A folder of pictures or parquet files, of MNIST's four idx files, or one that `save_to_disk` has written."""
    split, where = options.split, f"train_data_dir={printable(folder)!r}"
    if not folder.is_dir():
        if folder.is_file() and (kind := archive_kind(folder)):
            raise ValueError(f"{where} is a {kind} archive, expected a folder; unpack it and name the folder")
        if folder.suffix.lower() in (".parquet", ".arrow") and folder.is_file():
            raise ValueError(f"{where} is a file of a table, expected a folder; name it with train_data_files")
        raise FileNotFoundError(f"{where} is not a folder; check the path")
    table = dict(split=split, image_column=options.image_column, hashes=hashes)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _Table(*shape, files=_saved_files(folder, split, where), **table)
    files, left_out = list_files(folder, options.on_bad_image == "skip")
    idx = {match[1]: file for file in files.values() if (match := _IDX.match(file.name))}
    if idx:
        file = idx.get({"train": "train", "test": "t10k"}.get(split))
        if file is None:
            raise ValueError(f"no split {split!r} in {where}; choose train or test")
        return _Idx(*shape, file=file, hashes=hashes)
    pictures = pictures_of(files, left_out)
    tables = {name: file for name, file in files.items() if file.suffix.lower() == ".parquet"}
    if pictures:  # beside which `datasets` reads captions from such a table
        tables = {name: file for name, file in tables.items() if file.name != "metadata.parquet"}
    if pictures and tables:
        raise ValueError(
            f"{where} must hold pictures or parquet files, got both; name the parquet files with train_data_files"
        )
    if not pictures and not tables:
        for name, file in files.items():
            if kind := archive_kind(file):
                raise ValueError(
                    f"{where} must hold pictures or parquet files, got the {kind} archive {printable(name)!r}; unpack"
                    " it and name its folder"
                )
        left_out.warn(shape[0])
        raise ValueError(f"{where} must hold pictures or parquet files, got neither; check the path")
    if pictures:
        if split != "train" and not any(map(split_names, pictures)):
            raise ValueError(f"a folder of pictures has no splits, got split={split!r}; name its subfolder")
    else:
        left_out.pop("no pictures", None)
        for name in files.keys() - tables.keys():
            left_out.add("no parquet files", name)
    chosen = of_split(pictures or tables, split, left_out, where, is_table=not pictures)
    chosen = without_copies(chosen, left_out)
    left_out.warn(shape[0])
    if pictures:
        return _Pictures(
            *shape, files=dict(itertools.islice(chosen.items(), options.max_train_samples)), hashes=hashes
        )
    return _Table(*shape, files=list(chosen.values()), **table)


def _saved_files(folder: Path, split: str, where: str) -> list[Path]:
    """The Arrow files of a split in a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            folder = folder / split
        else:
            splits = [_saved_state(folder)["_split"] or "train"]
        if split not in splits:
            raise ValueError(f"no split {split!r} in {where}, which has {splits}; choose one")
        return [folder / PurePath(file["filename"]).name for file in _saved_state(folder)["_data_files"]]
    except (OSError, LookupError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{where} is a damaged folder of datasets.save_to_disk ({error}); save it again") from error


def _saved_state(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


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
            f"{', '.join((*EMBEDDED, *NAMED_DATA_SETS))}, a data set id owner/name, or train_data_dir for local"
            " pictures"
        ) from error


def decoded_blocks(source, rows, size=_BLOCK):
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


def warn_of_left_out(name, labels):
    if labels:
        message = "%s: left out %s that cannot be used: %s"
        logger.warning(message, name, count_pictures(len(labels)), named(labels))


def count_pictures(count):
    return f"{count:,} picture" if count == 1 else f"{count:,} pictures"


def nothing_left(name, labels):
    if labels:
        return ValueError(
            f"{name} holds no picture that can be used, all {len(labels):,} were left out; set on_bad_image to raise"
            " to see why"
        )
    return ValueError(f"{name} holds no images, expected at least one; check the source and the split")
