"""Hashes of the content of files. An index in the cache saves reading a file again that has not changed."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from ..files import sha256, write_text


class FileHashes:
    """SHA-256 of files by their content, computed anew only for a file that is new or has been written or replaced.

    The index of all files below one folder is a JSON file, `file_hashes/*.json` in the folder of the cache: from path
    to the file's state and its SHA-256. The state is its size in bytes, the times in nanoseconds at which its content
    and its inode changed last, and the inode's number. Programs set the first time as they like, but not the second.
    The index only saves time: without it, or with one that is damaged or cannot be written, every file is read.
    """

    def __init__(self, cache_dir: Path):
        self.folder = cache_dir / "file_hashes"

    def of_all(self, files: Iterable[Path]) -> str:
        """SHA-256 over the content of `files` in their order, whatever they are called.

        A file that cannot be read has a digest of its own: it is refused or left out when it is decoded.
        """
        paths = [os.path.abspath(path) for path in files]
        common = os.path.commonpath(paths)
        index = self.folder / f"{hashlib.sha256(os.fsencode(common)).hexdigest()[:32]}.json"
        known = _read(index)
        now, total = {}, hashlib.sha256()
        for path in paths:
            try:
                stat = os.stat(path)  # before the file is read: a change while it is read gives it another time
                state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
                entry = known.get(path)
                if entry is None or entry[:-1] != state:
                    entry = [*state, sha256(path)]
                now[path], digest = entry, entry[-1]
            except OSError:
                digest = "not readable"
            total.update(f"{digest}\n".encode())
        if any(known.get(path) != entry for path, entry in now.items()):
            with contextlib.suppress(OSError):  # a full or read-only disk
                index.parent.mkdir(parents=True, exist_ok=True)
                write_text(index, json.dumps(known | now))
        return total.hexdigest()


def _read(index: Path) -> dict[str, list]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        return {path: [*map(int, state), str(digest)] for path, (*state, digest) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
