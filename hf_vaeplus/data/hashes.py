"""Hashes of the content of files. An index in the cache saves reading a file again that has not changed."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from ..files import sha256, write_text


class FileHashes:
    """SHA-256 of files by their content, computed anew only for a file that is new, or has another size or time.

    The index of all files below one folder is a JSON file, `file_hashes/*.json` in the folder of the cache: from path
    to size in bytes, time of the last change in nanoseconds and SHA-256. It only saves time: without it, or with one
    that is damaged or cannot be written, every file is read.
    """

    def __init__(self, cache_dir: Path):
        self.folder = cache_dir / "file_hashes"

    def of_all(self, files: dict[str, Path]) -> str:
        """SHA-256 over the names and the content of `files`, from name to path, in their order.

        A file that cannot be read has a digest of its own: it is refused or left out when it is decoded.
        """
        paths = {name: os.path.abspath(path) for name, path in files.items()}
        common = os.path.commonpath(paths.values())
        index = self.folder / f"{hashlib.sha256(os.fsencode(common)).hexdigest()[:32]}.json"
        known = _read(index)
        now, total = {}, hashlib.sha256()
        for name, path in paths.items():
            try:
                stat = os.stat(path)  # before the file is read: a change while it is read gives it another time
                entry = known.get(path)
                if entry is None or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
                    entry = [stat.st_size, stat.st_mtime_ns, sha256(path)]
                now[path], digest = entry, entry[2]
            except OSError:
                digest = "not readable"
            total.update(f"{name}\n{digest}\n".encode("utf-8", "surrogateescape"))
        if any(known.get(path) != entry for path, entry in now.items()):
            with contextlib.suppress(OSError):  # a full or read-only disk
                index.parent.mkdir(parents=True, exist_ok=True)
                write_text(index, json.dumps(known | now))
        return total.hexdigest()


def _read(index: Path) -> dict[str, list]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        return {path: [int(size), int(time), str(digest)] for path, (size, time, digest) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
