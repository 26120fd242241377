"""The index by which files that have not changed are not read again."""

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from helpers import encoded, noise, parquet

from hf_vaeplus.data import hashes
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.options import ImageOptions
from hf_vaeplus.data.stream import open_stream, stream_images

NAMES = ("a.png", "b.png", "c/d.png")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures/c").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        (tmp_path / "pictures" / name).write_bytes(encoded(noise(i)))
    return tmp_path / "pictures"


@pytest.fixture
def fingerprint(folder, tmp_path):
    def fingerprint(**options):
        source = {"train_data_dir": folder, "cache_dir": tmp_path / "cache", "resolution": 8, "progress": False}
        return load_images(**source | options).fingerprint

    return fingerprint


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were read for their hashes."""
    names, sha256 = [], hashes.sha256
    monkeypatch.setattr(hashes, "sha256", lambda path: names.append(Path(path).name) or sha256(path))
    return names


def index_of(tmp_path) -> Path:
    (index,) = (tmp_path / "cache/file_hashes").glob("*.json")
    return index


def test_a_second_start_reads_no_file_and_finds_the_same(fingerprint, read):
    first = fingerprint()
    assert read == ["a.png", "b.png", "d.png"]
    assert fingerprint() == first and fingerprint(on_bad_image="skip") != first
    assert len(read) == 3


def test_the_fingerprint_is_a_function_of_the_content_alone(folder, fingerprint):
    digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES]
    lines = "".join(f"{digest}\n" for digest in digests)
    key = {
        "version": 1, "max_samples": None, "resolution": 8, "crop": None, "num_channels": 3,
        "files": hashlib.sha256(lines.encode()).hexdigest(),
    }  # fmt: skip
    expected = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    assert fingerprint() == expected == fingerprint()


def test_a_file_with_another_time_or_size_is_read_again_and_no_other(folder, fingerprint, read):
    first = fingerprint()
    os.utime(folder / "b.png", ns=(0, 0))
    assert fingerprint() == first and read[3:] == ["b.png"]
    (folder / "a.png").write_bytes(encoded(noise(9)))
    changed = fingerprint()
    assert changed != first and read[4:] == ["a.png"]
    (folder / "e.png").write_bytes(encoded(noise(10)))
    assert fingerprint() not in (first, changed) and read[5:] == ["e.png"]


@pytest.mark.parametrize("way", ["written", "replaced", "swapped", "linked"])
def test_a_change_that_leaves_size_and_time_is_noticed(folder, fingerprint, tmp_path, way):
    a, b = folder / "a.png", folder / "b.png"
    for i, path in enumerate((a, b, tmp_path / "other")):  # bitmaps of one shape have one size
        path.write_bytes(encoded(noise(20 + i), format="bmp"))
        os.utime(path, ns=(0, 0))
    if way == "linked":
        os.replace(a, tmp_path / "first")
        a.symlink_to(tmp_path / "first")
    before = fingerprint()
    if way == "written":
        a.write_bytes((tmp_path / "other").read_bytes())
        os.utime(a, ns=(0, 0))
    elif way == "replaced":
        os.replace(tmp_path / "other", a)
    elif way == "swapped":
        os.replace(a, tmp_path / "aside")
        os.replace(b, a)
        os.replace(tmp_path / "aside", b)
    else:
        a.unlink()
        a.symlink_to(tmp_path / "other")
    assert a.stat().st_mtime_ns == 0 and fingerprint() != before


def test_the_same_content_under_other_names_is_the_same(folder, fingerprint):
    first = fingerprint()
    (folder / "a.png").rename(folder / "a2.png")
    (folder / "c").rename(folder / "d")
    assert fingerprint() == first
    (folder / "a2.png").rename(folder / "e.png")  # another order
    assert fingerprint() != first


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"x": 3}', '{"x": [1, 2]}', '{"x": ["a", "b", "c"]}', "[" * 9999]
)
def test_a_damaged_index_is_ignored_and_written_again(content, fingerprint, read, tmp_path):
    first = fingerprint()
    index_of(tmp_path).write_text(content)
    assert fingerprint() == first and len(read) == 6
    assert fingerprint() == first and len(read) == 6


def test_tables_are_read_once_too(tmp_path, fingerprint, read):
    (tmp_path / "rows.parquet").write_bytes(parquet(image=[encoded(noise(0)), encoded(noise(1))]))
    source = {"train_data_dir": None, "train_data_files": str(tmp_path / "*.parquet")}
    assert fingerprint(**source) == fingerprint(**source)
    assert read == ["rows.parquet"]


def test_a_stream_reads_no_file_twice_and_needs_no_folder_that_it_can_write(folder, tmp_path, read):
    options = ImageOptions(train_data_dir=folder, resolution=8)
    first = open_stream(options, tmp_path / "cache").fingerprint
    assert open_stream(options, tmp_path / "cache").fingerprint == first and len(read) == 3
    (tmp_path / "file").touch()
    assert open_stream(options, tmp_path / "file").fingerprint == first and len(read) == 6


def test_the_keywords_of_load_images_are_the_fields_of_the_record(folder, tmp_path):
    renamed = {"dataset_revision": "revision", "max_train_samples": "max_samples"}
    values = {renamed.get(entry.name, entry.name): entry.default for entry in fields(ImageOptions)}
    values |= {"train_data_dir": folder, "resolution": 8, "max_samples": 2}
    images = load_images(**values, cache_dir=tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(images.images, np.stack([noise(0), noise(1)]))
    assert stream_images(**values).fingerprint == images.fingerprint
