"""What a folder shows: its pictures, tables and splits, what is left out of it, and files that patterns name."""

import logging
import os
import re
import tarfile
import zipfile
from functools import cache
from glob import escape, glob
from pathlib import Path, PurePosixPath

from PIL import Image

from ..image_processing_vaeplus import _FORMATS

# The names of splits in folders and files, as in `datasets.data_files`, whose import takes a second.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF_WORD = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_SPLIT_WORD = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(_SPLIT_OF_WORD)})(?=$|[-._ 0-9])")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")

# What Windows, macOS and network drives put beside a user's files, with thumbnails and deleted pictures in it.
_SYSTEM = {
    "#recycle", "#snapshot", "$recycle.bin", "@__thumb", "@eadir", "@recently-snapshot", "@recycle", "@tmp",
    "desktop.ini", "ehthumbs.db", "lost+found", "network trash folder", "recycler", "system volume information",
    "temporary items", "thumbs.db",
}  # fmt: skip
_HIDDEN, _LINKED_TWICE, _CYCLE = "hidden or of the system", "reached before through a link", "links that lead back"
_NAMED = 5  # of what is left out, in the line that counts it


logger = logging.getLogger(__name__)


class BadImage(ValueError):
    """A picture that cannot be used: unreadable, missing, too small, or with more than 8 bits a channel."""


def printable(name: str | os.PathLike) -> str:
    """A name that any stream of UTF-8 takes: bytes of a file name that are no UTF-8 become escapes."""
    return os.fspath(name).encode("utf-8", "backslashreplace").decode()


def named(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(map(printable, names[:_NAMED])) + more


class LeftOut(dict):
    """What is left out of a folder: from the reason to names, those of folders with a slash at the end."""

    def add(self, reason: str, name: str):
        self.setdefault(reason, []).append(name)

    def warn(self, folder_name: str):
        """Count and name all of it in one line of the log."""
        names = [name for each in self.values() for name in each]
        if names:
            kinds = {"folder" if name.endswith("/") else "file" for name in names}
            kinds = "files and folders" if len(kinds) == 2 else kinds.pop() + "s" * (len(names) > 1)
            reasons = "; ".join(f"{reason}: {named(sorted(each))}" for reason, each in self.items())
            logger.warning("%s: left out %s %s (%s)", folder_name, f"{len(names):,}", kinds, reasons)


def list_files(folder: Path, skip_unreadable: bool = False) -> tuple[dict[str, Path], LeftOut]:
    """The files in a folder and below, from their paths below it to them, in the order of these paths.

    Hidden files and those of the system are left out, and so is what is no file, such as a pipe. Linked folders are
    entered, unless the link leads to a folder that holds it. A link to nothing counts as a file.

    Raises:
        BadImage: a folder cannot be read, unless `skip_unreadable` leaves those below the first one out.
    """
    files, left_out = {}, LeftOut()

    def enter(path, prefix, way):
        try:
            with os.scandir(path) as opened:
                entries = list(opened)
        except OSError as error:
            if prefix and skip_unreadable:
                left_out.add("not readable", prefix)
                return
            raise BadImage(
                f"the folder {printable(path)} cannot be read ({error.strerror}); allow reading it or move it away"
            ) from error
        for entry in entries:
            linked, name = entry.is_symlink(), prefix + entry.name
            is_folder = os.path.isdir(entry.path) if linked else entry.is_dir()
            if _is_hidden(entry.name, is_folder):
                left_out.add(_HIDDEN, f"{name}/" if is_folder else name)
            elif is_folder:
                real = Path(os.path.realpath(entry.path) if linked else way[-1] / entry.name)
                if linked and any(each.is_relative_to(real) for each in way):
                    left_out.add(_CYCLE, f"{name}/")
                else:
                    enter(entry.path, f"{name}/", [*way, real])
            elif entry.is_file() if not linked else os.path.isfile(entry.path) or not os.path.exists(entry.path):
                files[name] = Path(entry.path)
            else:
                left_out.add("neither files nor folders", name)

    enter(folder, "", [Path(os.path.realpath(folder))])
    return dict(sorted(files.items())), left_out


def _is_hidden(name: str, is_folder: bool) -> bool:
    # `datasets` ignores folders such as __MACOSX and __pycache__ too; editors keep backups as a.jpg~.
    return name.startswith(".") or name.endswith("~") or name.lower() in _SYSTEM or is_folder and name.startswith("__")


def without_copies(files: dict[str, Path], left_out: LeftOut) -> dict[str, Path]:
    """Of files that links lead to more than once the first."""
    real_folder, seen, kept = cache(os.path.realpath), set(), {}
    for name, path in files.items():
        real = os.path.realpath(path) if path.is_symlink() else os.path.join(real_folder(path.parent), path.name)
        if real in seen:
            left_out.add(_LINKED_TWICE, name)
        else:
            seen.add(real)
            kept[name] = path
    return kept


# Pictures, tables and archives


@cache
def picture_suffixes() -> frozenset[str]:
    """Suffixes, in small letters, of the formats that pictures are decoded from."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS)


def is_picture(path: Path, name: str) -> bool:
    """Whether the name of a file says that it is a picture, or else its content."""
    if os.path.splitext(name)[1].lower() in picture_suffixes():
        return True
    try:
        with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]):
            return True
    except Exception:  # Pillow raises nearly anything
        return False


def pictures_of(files: dict[str, Path], left_out: LeftOut) -> dict[str, Path]:
    """The pictures among files; the others are noted in `left_out`."""
    pictures = {name: path for name, path in files.items() if is_picture(path, name)}
    for name in files.keys() - pictures.keys():
        left_out.add("no pictures", name)
    return pictures


def pictures_below(folder: Path) -> dict[str, Path]:
    """The pictures in a folder and below, each once, in the order of their paths; a warning names what is left out.

    Raises:
        BadImage: as [`list_files`].
    """
    files, left_out = list_files(folder)
    pictures = without_copies(pictures_of(files, left_out), left_out)
    left_out.warn(printable(folder))
    return pictures


def labels_of_folders(names: list[str]) -> list[str] | None:
    """The folder of each picture, as a label, without what all folders have in common; `None` if all lie in one.

    Args:
        names: paths of the pictures.
    """
    folders = [os.path.dirname(name) for name in names]
    real = {folder: os.path.abspath(folder) for folder in set(folders)}
    if len(set(real.values())) < 2:
        return None
    common = os.path.commonpath(real.values())
    labels = {folder: printable(os.path.relpath(path, common)) for folder, path in real.items()}
    return [labels[folder] for folder in folders]


def archive_kind(path: Path) -> str | None:
    """Which kind of archive a file is (`"zip"`, `"tar"`, ...), or `None`."""
    try:
        if zipfile.is_zipfile(path):
            return "zip"
        if tarfile.is_tarfile(path):
            return "tar"
    except OSError:
        return None
    suffix = path.suffix.lower()
    return suffix[1:] if suffix in (".7z", ".rar", ".zst") else None


# Splits


def split_names(name: str) -> tuple[str, ...]:
    """The names of the split that a file is in: that of `datasets`, and the word in its path. Empty without a split.

    The outermost folder that names a split decides, then the name of the file. Small and capital letters are equal.

    Args:
        name: path below the folder that holds the splits.
    """
    path = PurePosixPath(name)
    shard = _SHARD.match(path.name)  # data/unsupervised-00000-of-00007.parquet
    of_shard = (shard[1],) if shard else ()
    for part in path.parts:
        if match := _SPLIT_WORD.search(part.lower()):
            return _SPLIT_OF_WORD[match[1]], match[1], *of_shard
    return of_shard


def of_split(files: dict[str, Path], split: str, left_out: LeftOut, where: str, is_table: bool) -> dict[str, Path]:
    """The files of a split; those of others are noted in `left_out`.

    Files of no split are training files, unless other files are named as such: tables by their folder or file, but
    pictures by their folder, since a picture may well be called "steam train". A table is also in the split with which
    its name begins.

    Args:
        where: what errors call the folder.

    Raises:
        ValueError: there is no such split.
    """
    splits = {name: split_names(name) for name in files}
    folders = {name: split_names(str(PurePosixPath(name).parent)) for name in files}
    if is_table:
        begins = re.compile(rf"{re.escape(split)}(?![A-Za-z0-9])")
        for name in files:
            if not folders[name] and begins.match(PurePosixPath(name).name):
                splits[name] = (*splits[name], split)
    if not any("train" in names for names in (splits if is_table else folders).values()):
        splits = {name: names or ("train",) for name, names in splits.items()}
    chosen = {name: path for name, path in files.items() if split in splits[name]}
    if not chosen:
        found = sorted({names[0] for names in splits.values() if names})
        raise ValueError(f"no split {split!r} in {where}, which has {found}; choose one")
    for name in files:  # in their order
        if name in chosen:
            continue
        left_out.add(f"of the split {splits[name][0]}" if splits[name] else "of no split", name)
    return chosen


def files_of_patterns(patterns: list[str], left_out: LeftOut) -> list[Path]:
    """The files that paths and glob patterns name, each once, in the order of the patterns and then of the names.

    What exists is a path and no pattern, even with brackets or stars in its name; this holds for the folders at the
    beginning of a pattern too. Where the matches of a pattern lie in several splits, the training files are taken.
    """
    found = {}
    for pattern in patterns:
        parts = Path(pattern).parts
        cut = next(cut for cut in range(len(parts), -1, -1) if os.path.lexists(Path(*parts[:cut])))
        head, tail = Path(*parts[:cut]), parts[cut:]
        if not tail:
            matches = {"": head}
        else:
            names = sorted(glob(os.path.join(escape(str(head)), *tail), recursive=True))
            matches = {os.path.relpath(name, head): Path(name) for name in names if not os.path.isdir(name)}
            if any(split_names(name)[:1] in ((), ("train",)) for name in matches):
                matches = of_split(matches, "train", left_out, pattern, is_table=True)
        for path in matches.values():
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())
