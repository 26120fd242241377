"""Files written whole or not at all, made once by many processes, and locks on folders."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def sole_run(output_dir: Path) -> Iterator[None]:
    """Hold the folder of a run; the system lets go of it when the process ends, however it ends.

    Raises:
        FileExistsError: another process holds it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FileExistsError(
            f"another process is training in {output_dir}: wait for it, or choose another --output_dir."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def sole_use(cache_dir: Path, purpose: str) -> Iterator[None]:
    """Hold a lock in a cache, of which processes with this purpose know, and wait for it as long as it takes.

    Raises:
        OSError: the cache cannot be made.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the cache {cache_dir} cannot be made ({error.strerror}); name another folder as cache_dir"
        ) from error
    with FileLock(cache_dir / f"{hashlib.sha256(purpose.encode()).hexdigest()[:32]}.lock"):
        yield


def write_whole(path: Path, write: Callable[[Path], object]):
    """Replace a file by what `write(partial)` writes, whole or not at all: `partial` has the suffix of `path`."""
    partial = path.with_name(f".partial.{os.getpid()}.{path.name}")
    try:
        write(partial)
        flush_to_disk(partial)
        os.replace(partial, path)
    except BaseException:  # a full disk, Ctrl-C
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str):
    """Replace a file by `text`, whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content):
    """Replace a file by `content` as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def build_once(path: Path, build: Callable[[Path], object], load: Callable[[Path], object]):
    """A file of the cache beside the images: made by one process while the others wait, and again if it is damaged.

    Args:
        path: the file, in safetensors; its name says what is in it.
        build: writes it, under another name.
        load: reads it, and raises ValueError if it holds something else.

    Returns:
        What `load(path)` returns.

    Raises:
        OSError: it cannot be written.
    """

    def loaded():
        try:
            return load(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError) as error:
            logger.warning("%s is damaged (%s) and will be made again", path, error)
            return None

    if (found := loaded()) is not None:
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # the system frees it when its holder is killed
        if (found := loaded()) is not None:  # another process made it meanwhile
            return found
        for leftover in path.parent.glob(f".partial.*.{path.name}"):  # of a process that was killed
            leftover.unlink()
        try:
            write_whole(path, build)
        except (OSError, SafetensorError) as error:  # the latter is how safetensors says that the disk is full
            raise OSError(
                f"the cache {path.parent} cannot be written ({error}): free some space or name another cache_dir."
            ) from error
        return load(path)


@contextlib.contextmanager
def room_for(path: Path, partial: Path) -> Iterator[None]:
    """`partial` is no folder when this is entered, nor after a full disk, of which the error speaks of `path`."""
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is how safetensors says that the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{path} cannot be written ({error}): free some space, then resume from the newest checkpoint."
        ) from error


def follow_umask(weights: Path):
    """Give a file of weights the permissions of any other new file: safetensors lets its owner alone read it."""
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    weights.chmod(0o666 & ~umask)


def flush_to_disk(written: Path):
    """Take care that a file, or a folder with all that it holds, is on the disk and readable as the umask says."""
    for path in [*written.rglob("*"), written]:
        if path.suffix == ".safetensors":
            follow_umask(path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an `OSError`: there is no room for the file
