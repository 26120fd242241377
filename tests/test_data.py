"""Pixels of every source, the cache on disk, and streams that resume."""

import gzip
import json
import os
import pickle
import signal
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import encoded, noise, start_together, take
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from hf_vaeplus.data import sources
from hf_vaeplus.data.cache import keep_batch, load_images
from hf_vaeplus.data.pixels import to_uint8, to_unit_range
from hf_vaeplus.data.rendered_faces import factors_of, render_faces
from hf_vaeplus.data.stream import stream_images

NUM_PICTURES = 11


def coordinates(height, width):
    """A picture whose red channel is the row and whose green channel is the column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)


def write_parquet(path, pictures, column="image"):
    rows = [picture and {"bytes": picture, "path": f"{i}.png"} for i, picture in enumerate(pictures)]
    labels = pyarrow.array(range(len(rows)))
    pyarrow.parquet.write_table(pyarrow.table({column: rows, "label": labels}), path, row_group_size=4)


@pytest.fixture
def folder(tmp_path):
    """Eleven noise pictures of 8x8 pixels, picture i from seed i."""
    folder = tmp_path / "pictures"
    (folder / "b").mkdir(parents=True)
    for i in range(NUM_PICTURES):
        (folder / ("b" if i > 5 else "") / f"a{i:02}.png").write_bytes(encoded(noise(i)))
    (folder / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture
def load(tmp_path):
    def load(*args, **options):
        return load_images(*args, **{"cache_dir": tmp_path / "cache", "progress": False, "resolution": 8, **options})

    return load


@pytest.fixture
def decoded(monkeypatch):
    """Labels of the pictures decoded so far in this process."""
    labels, decode = [], sources.decode_image

    def counting(content, label, **options):
        labels.append(label)
        return decode(content, label, **options)

    monkeypatch.setattr(sources, "decode_image", counting)
    return labels


# Pixels


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.data())
def test_crop_is_centred(height, width, draw):
    side = draw.draw(st.integers(1, min(height, width)))
    cropped = sources.decode_image(coordinates(height, width), "picture", side, side, 3)
    top, left = (height - side) // 2, (width - side) // 2
    np.testing.assert_array_equal(cropped, coordinates(height, width)[top : top + side, left : left + side])


def test_celeba_crop_of_an_aligned_picture(tmp_path, load):
    (tmp_path / "aligned").mkdir()
    (tmp_path / "aligned" / "000001.png").write_bytes(encoded(coordinates(218, 178)))
    dataset = load("celeba", train_data_dir=tmp_path / "aligned", resolution=128)
    np.testing.assert_array_equal(dataset.images[0], coordinates(218, 178)[45:173, 25:153])
    assert dataset.name == "celeba"
    square = load(train_data_dir=tmp_path / "aligned", resolution=178)
    np.testing.assert_array_equal(square.images[0], coordinates(218, 178)[20:198])


def test_shrinking_averages_areas_and_enlarging_is_bicubic():
    pixels = noise(0, 64)
    means = pixels.reshape(16, 4, 16, 4, 3).mean((1, 3))
    shrunk = sources.decode_image(pixels, "picture", 16, None, 3)
    assert np.abs(shrunk - means).max() <= 1  # Pillow rounds after each of the two axes
    enlarged = sources.decode_image(pixels, "picture", 100, None, 3)
    bicubic = Image.fromarray(pixels).resize((100, 100), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(enlarged, np.asarray(bicubic))


def test_exif_orientation_and_grey():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    pixels = noise(1)
    upright = sources.decode_image(encoded(pixels, exif=exif), "picture", 8, None, 3)
    np.testing.assert_array_equal(upright, np.rot90(pixels, -1))
    grey = sources.decode_image(encoded(pixels), "picture", 8, None, 1)
    np.testing.assert_allclose(grey[..., 0], pixels @ [0.299, 0.587, 0.114], atol=1)  # ITU-R 601 luma


def test_unit_range_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit_range(pixels)
    assert unit.dtype == torch.float32
    torch.testing.assert_close(unit, torch.linspace(0, 1, 256))
    assert torch.equal(to_uint8(unit), pixels) and torch.equal(pixels, torch.arange(256, dtype=torch.uint8))
    assert to_uint8(torch.tensor([-3.0, 0.4999 / 255, 0.5001 / 255, 9.0])).tolist() == [0, 0, 1, 255]
    with pytest.raises(ValueError, match="must be uint8, got torch.float32"):
        to_unit_range(unit)
    for bad in (pixels, torch.tensor([float("nan")])):
        with pytest.raises(ValueError, match="must be floating point without NaN"):
            to_uint8(bad)


# Sources


def test_folder_is_read_in_order_of_paths(folder, load):
    dataset = load(train_data_dir=folder)
    np.testing.assert_array_equal(dataset.images, np.stack([noise(i) for i in range(NUM_PICTURES)]))
    assert (dataset.name, dataset.resolution, dataset.num_channels) == ("pictures", 8, 3)
    assert len(load(train_data_dir=folder, max_samples=4)) == 4


def test_parquet_files_of_the_split(tmp_path, load):
    for name, seeds in {"train-00000": (0, 1, 2, 3, 4), "train-00001": (5, 6), "validation-00000": (7, 8)}.items():
        write_parquet(tmp_path / f"{name}.parquet", [encoded(noise(seed)) for seed in seeds])
    training = np.stack([noise(seed) for seed in range(7)])
    np.testing.assert_array_equal(load(train_data_dir=tmp_path).images, training)
    np.testing.assert_array_equal(load(train_data_files=str(tmp_path / "train-*")).images, training)
    np.testing.assert_array_equal(load(train_data_dir=tmp_path, max_samples=3).images, training[:3])
    validation = load(train_data_dir=tmp_path, split="validation")
    np.testing.assert_array_equal(validation.images, np.stack([noise(7), noise(8)]))


def test_column_made_by_datasets(tmp_path, load):
    made = datasets.Dataset.from_dict({"photo": [Image.fromarray(noise(seed)) for seed in range(3)]})
    made.to_parquet(tmp_path / "train.parquet")
    dataset = load(train_data_dir=tmp_path, image_column="photo")
    np.testing.assert_array_equal(dataset.images, np.stack([noise(seed) for seed in range(3)]))


def test_digits(load):
    from sklearn.datasets import load_digits

    dataset = load("digits", num_channels=1)
    assert dataset.images.shape == (1797, 8, 8, 1)
    np.testing.assert_array_equal(np.round(dataset.images[..., 0] / 255 * 16), load_digits().images)


def test_rendered_faces(load):
    faces = render_faces(factors_of(range(70), 3), 32)
    dataset = load("rendered-faces", num_factors=3, max_samples=70, resolution=32)
    np.testing.assert_array_equal(dataset.images, faces)
    other = load("rendered-faces", num_factors=4, max_samples=70, resolution=32)
    assert other.fingerprint != dataset.fingerprint
    grey = load("rendered-faces", num_factors=3, max_samples=70, resolution=32, num_channels=1)
    np.testing.assert_allclose(grey.images[..., 0], faces @ [0.299, 0.587, 0.114], atol=1)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands for the Hub: `org/set` has a train split of three rows, the last with the name of a file that is here."""
    (tmp_path / "near.png").write_bytes(encoded(noise(3)))
    rows = [{"bytes": encoded(noise(0)), "path": None}, {"bytes": encoded(noise(1)), "path": "1.png"}]
    rows.append({"bytes": encoded(noise(2)), "path": str(tmp_path / "near.png")})
    train = datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 2]}).to_iterable_dataset()
    calls = []

    def load_dataset(path, revision, streaming):
        calls.append((path, revision, streaming))
        return datasets.IterableDatasetDict(train=train, test=train)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_data_set_is_streamed_at_one_commit(hub, load):
    first = load("org/set", revision="1" * 40)
    np.testing.assert_array_equal(first.images, np.stack([noise(0), noise(1), noise(2)]))
    assert hub == [("org/set", "1" * 40, True)]
    load("org/set", revision="1" * 40)
    assert len(hub) == 1  # the cache is opened without a request
    assert load("org/set", revision="2" * 40).fingerprint != first.fingerprint
    with pytest.raises(ValueError, match=r"no split 'valid' in org/set, which has \['test', 'train'\]"):
        load("org/set", revision="1" * 40, split="valid")
    with pytest.raises(ValueError, match=r"no column 'photo' in org/set, which has \['image', 'label'\]"):
        load("org/set", revision="1" * 40, image_column="photo")
    assert load("mnist", revision="1" * 40).num_channels == 1
    assert hub[-1][0] == "ylecun/mnist"


# Cache


def test_second_load_decodes_nothing_and_options_select_other_pixels(folder, load, decoded):
    first = load(train_data_dir=folder)
    assert len(decoded) == NUM_PICTURES
    again = load(train_data_dir=folder, random_flip=True)
    assert len(decoded) == NUM_PICTURES and again.fingerprint == first.fingerprint
    options = ({"resolution": 4}, {"crop": 6}, {"num_channels": 1}, {"max_samples": 3})
    others = {load(train_data_dir=folder, **option).fingerprint for option in options}
    assert len(others | {first.fingerprint}) == 5


def test_a_moved_folder_keeps_its_cache(folder, load, decoded):
    first = load(train_data_dir=folder)
    folder.rename(folder.with_name("renamed"))
    assert load(train_data_dir=folder.with_name("renamed")).fingerprint == first.fingerprint
    assert len(decoded) == NUM_PICTURES


def test_changed_content_of_equal_size_is_noticed_by_its_time(folder, load):
    for name in ("one.bmp", "two.bmp"):  # bitmaps of one shape have one size
        (folder / name).write_bytes(encoded(noise(20), format="bmp"))
    before, stat = load(train_data_dir=folder), (folder / "one.bmp").stat()
    (folder / "one.bmp").write_bytes(encoded(noise(21), format="bmp"))
    os.utime(folder / "one.bmp", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert (folder / "one.bmp").stat().st_size == stat.st_size
    after = load(train_data_dir=folder)
    assert after.fingerprint != before.fingerprint
    np.testing.assert_array_equal(after.images[-2:], np.stack([noise(21), noise(20)]))


def test_order_of_files_is_content(folder, load):
    before = load(train_data_dir=folder)
    (folder / "a00.png").rename(folder / "swap.png")
    assert load(train_data_dir=folder).fingerprint != before.fingerprint


def test_default_cache_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VAEPLUS_CACHE", str(tmp_path / "variable"))
    dataset = load_images(train_data_dir=folder, progress=False)
    assert dataset.path == tmp_path / "variable" / dataset.fingerprint / "images.bin"
    monkeypatch.delenv("VAEPLUS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    dataset = load_images(train_data_dir=folder, progress=False)
    assert dataset.path.is_relative_to(tmp_path / "home" / ".cache" / "hf_vaeplus")


@pytest.mark.parametrize("damage", ["truncated", "info.json"])
def test_damaged_cache_is_built_again(folder, load, damage, caplog):
    dataset = load(train_data_dir=folder)
    expected = np.array(dataset.images)
    if damage == "truncated":
        dataset.path.write_bytes(dataset.path.read_bytes()[:-1])
    else:
        (dataset.path.parent / "info.json").write_text("{")
    dataset = load(train_data_dir=folder)
    assert "is damaged and will be built again" in caplog.text
    np.testing.assert_array_equal(dataset.images, expected)


def build_slowly(barrier, folder, cache, log, pause):
    """Runs in another process: load the folder, and write a line to `log` for every picture before it is decoded."""
    decode = sources.decode_image

    def slow(content, label, **options):
        with open(log, "a") as file:
            file.write(label + "\n")
        time.sleep(pause)
        return decode(content, label, **options)

    sources.decode_image = slow
    barrier.wait()
    images = load_images(train_data_dir=folder, cache_dir=cache, progress=False, resolution=8).images
    np.save(log.with_name(f"read-{os.getpid()}.npy"), images)


def test_of_four_processes_one_builds_and_all_read_the_same(folder, tmp_path, load):
    for process in start_together(build_slowly, 4, folder, tmp_path / "cache", tmp_path / "log", 0.1):
        process.join()
        assert process.exitcode == 0
    names = (tmp_path / "log").read_text().split()
    assert sorted(names) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    read = [np.load(path) for path in tmp_path.glob("read-*.npy")]
    assert len(read) == 4
    for images in read:
        np.testing.assert_array_equal(images, np.stack([noise(i) for i in range(NUM_PICTURES)]))
    (index,) = (tmp_path / "cache/file_hashes").iterdir()  # and no part of one
    assert len(json.loads(index.read_text())) == NUM_PICTURES


def test_what_a_killed_builder_left_is_removed(folder, tmp_path, load):
    (process,) = start_together(build_slowly, 1, folder, tmp_path / "cache", tmp_path / "log", 60)
    while not (tmp_path / "log").exists():
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(list((tmp_path / "cache").glob("*.tmp-*"))) == 1
    dataset = load(train_data_dir=folder)
    assert list((tmp_path / "cache").glob("*.tmp-*")) == []
    np.testing.assert_array_equal(dataset.images, np.stack([noise(i) for i in range(NUM_PICTURES)]))


def test_a_failed_build_leaves_nothing(folder, tmp_path, load):
    (folder / "zz.png").write_bytes(encoded(noise(0))[:60])
    with pytest.raises(ValueError, match="zz.png is not a readable picture"):
        load(train_data_dir=folder)
    assert {path.suffix or path.name for path in (tmp_path / "cache").iterdir()} == {".lock", "file_hashes"}


# Dataset


def test_flipped_half(folder, load):
    plain, dataset = load(train_data_dir=folder), load(train_data_dir=folder, random_flip=True)
    assert (len(plain), len(dataset)) == (NUM_PICTURES, 2 * NUM_PICTURES)
    mirrored = dataset[NUM_PICTURES + 3]
    assert mirrored["index"] == NUM_PICTURES + 3
    assert torch.equal(mirrored["pixel_values"], torch.from_numpy(noise(3)[:, ::-1].copy()).permute(2, 0, 1))
    np.testing.assert_array_equal(dataset.images, plain.images)  # the cache is not written to


def test_a_batch_is_its_items_stacked(folder, load):
    dataset = load(train_data_dir=folder, random_flip=True)
    indices = [20, 0, 3, 14, 3]
    batch = dataset.__getitems__(indices)
    assert torch.equal(batch["pixel_values"], torch.stack([dataset[i]["pixel_values"] for i in indices]))
    assert batch["pixel_values"].shape == (5, 3, 8, 8) and batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    assert batch["index"].dtype == torch.int64 and batch["index"].tolist() == indices
    for outside in (-1, 2 * NUM_PICTURES):
        with pytest.raises(IndexError, match=f"got {outside} to {outside} for 22 images"):
            dataset[outside]


def test_pixels_are_the_items_between_as_floats(folder, load):
    dataset = load(train_data_dir=folder)
    expected = dataset.__getitems__([2, 3, 4])["pixel_values"] / 255
    torch.testing.assert_close(dataset.pixels(2, 5), expected, rtol=0, atol=1e-7)
    assert len(dataset.pixels(NUM_PICTURES - 2, NUM_PICTURES + 30)) == 2  # to the end


def test_loader_workers_and_pickling(folder, load):
    dataset = load(train_data_dir=folder, random_flip=True)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=keep_batch)
    pixels = torch.cat([batch["pixel_values"] for batch in loader])
    assert torch.equal(pixels, dataset.__getitems__(range(2 * NUM_PICTURES))["pixel_values"])
    big = load("digits", resolution=32)
    assert len(pickle.dumps(big)) < 1000 < big.images.nbytes
    copy = pickle.loads(pickle.dumps(big))
    assert isinstance(copy.images, np.memmap) and torch.equal(copy[5]["pixel_values"], big[5]["pixel_values"])


# Stream


@pytest.fixture(params=["folder", "parquet"])
def stream(request, folder, tmp_path):
    """A stream over eleven pictures, whose passes end in the middle of batches."""
    if request.param == "folder":
        source = {"train_data_dir": folder}
    else:
        write_parquet(tmp_path / "train.parquet", [encoded(noise(i)) for i in range(NUM_PICTURES)])
        source = {"train_data_files": tmp_path / "train.parquet"}
    return stream_images(**source, resolution=8, seed=3, shuffle_buffer=5, random_flip=True)


def test_stream_resumes_at_any_batch(stream):
    whole = take(stream, 0, 12, batch_size=4)
    for first in (1, 3, 8):
        for resumed, batch in zip(take(stream, first, 3, batch_size=4), whole[first:], strict=False):
            assert torch.equal(resumed["pixel_values"], batch["pixel_values"])
            assert torch.equal(resumed["index"], batch["index"])
    assert torch.cat([batch["index"] for batch in whole]).tolist() == list(range(48))
    assert whole[0]["pixel_values"].shape == (4, 3, 8, 8) and whole[0]["pixel_values"].dtype == torch.uint8
    assert whole[0]["pixel_values"].is_contiguous(memory_format=torch.channels_last)


def test_ranks_share_the_global_batch(stream):
    whole = take(stream, 2, 3, batch_size=6)
    parts = [take(stream, 2, 3, batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    for step, batch in enumerate(whole):
        for key in ("pixel_values", "index"):
            assert torch.equal(torch.cat([part[step][key] for part in parts]), batch[key])


def test_every_pass_holds_every_picture_once_in_another_order(stream):
    (batch,) = take(stream, 0, 1, batch_size=3 * NUM_PICTURES)
    originals = {noise(i).tobytes(): (i, False) for i in range(NUM_PICTURES)}
    originals |= {noise(i)[:, ::-1].tobytes(): (i, True) for i in range(NUM_PICTURES)}
    seen = [originals[image.tobytes()] for image in batch["pixel_values"].permute(0, 2, 3, 1).numpy()]
    passes = [seen[i : i + NUM_PICTURES] for i in range(0, len(seen), NUM_PICTURES)]
    orders = [tuple(number for number, _ in images) for images in passes]
    assert all(sorted(order) == list(range(NUM_PICTURES)) for order in orders)
    assert len(set(orders)) == 3
    assert 0 < sum(mirrored for _, mirrored in seen) < len(seen)


def test_only_rows_of_the_rank_are_decoded(stream, decoded):
    take(stream, 5, 1, batch_size=2, rank=1, world_size=3)
    assert len(decoded) == 2


def test_stream_options(folder, decoded):
    stream = stream_images(train_data_dir=folder, resolution=8, max_samples=4, shuffle_buffer=1)
    (batch,) = take(stream, 0, 1, batch_size=9)
    assert decoded == [f"a{i:02}.png" for i in (0, 1, 2, 3, 0, 1, 2, 3, 0)]
    assert (stream.name, stream.resolution, stream.num_channels) == ("pictures", 8, 3)
    with pytest.raises(TypeError, match="cache_dir"):
        stream_images(train_data_dir=folder, cache_dir="elsewhere")


def test_stream_in_a_loader_worker(folder, monkeypatch):
    stream = stream_images(train_data_dir=folder, resolution=8)
    expected = take(stream, 1, 3, batch_size=4)
    stream.set_position(1, batch_size=4)
    for same, batch in zip(expected, DataLoader(stream, batch_size=None, num_workers=1), strict=False):
        assert torch.equal(batch["pixel_values"], same["pixel_values"])
    monkeypatch.setattr("hf_vaeplus.data.stream.get_worker_info", lambda: SimpleNamespace(id=0, num_workers=2))
    with pytest.raises(ValueError, match="at most one DataLoader worker, got 2"):
        next(iter(stream))


def test_stream_position_is_checked(stream):
    with pytest.raises(ValueError, match="call set_position first"):
        next(iter(stream))
    for bad in ((-1, 4, 0, 1), (0, 0, 0, 1), (0, 4, 1, 1), (0, 4, -1, 1)):
        with pytest.raises(ValueError, match="expected first_batch >= 0"):
            stream.set_position(*bad)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of dataset_name, train_data_dir and train_data_files .* got none"),
        ({"dataset_name": "digits", "train_data_dir": "x"}, "got train_data_dir and dataset_name"),
        (
            {"dataset_name": "celeba", "train_data_dir": "x", "train_data_files": "y"},
            "got train_data_dir and train_data_files",
        ),
        ({"dataset_name": "not an id"}, "dataset_name='not an id' .* is not on the Hub"),
        ({"dataset_name": "digits", "num_channels": 2}, r"num_channels must be 1 \(grey\) or 3 \(RGB\), got 2"),
        ({"dataset_name": "digits", "num_channels": 0}, "num_channels must be .* got 0"),
        ({"dataset_name": "digits", "resolution": 0}, "resolution must be at least 1, got 0"),
        ({"dataset_name": "celeba", "crop": 0}, "crop must be at least 1, got 0"),
        ({"dataset_name": "digits", "max_samples": 0}, "max_train_samples must be at least 1, got 0"),
        ({"dataset_name": "digits", "crop": 9}, r"digit \d+ is 8x8, smaller than crop=9"),
        ({"dataset_name": "digits", "split": "test"}, "dataset_name has no splits, got split='test'"),
        ({"dataset_name": "rendered-faces", "crop": 9}, "takes no crop .* got crop=9"),
        ({"dataset_name": "rendered-faces", "num_factors": 17}, "1 to 16 factors, .* num_factors=17"),
        ({"dataset_name": "rendered-faces", "max_samples": 1}, "between 32 and 256 pixels, got 8"),
        ({"dataset_name": "digits", "revision": "main"}, "only a Hub data set has a revision, got 'main'"),
        ({"train_data_dir": "{}/pictures", "revision": "main"}, "only a Hub data set has a revision"),
        ({"train_data_dir": "{}/pictures", "split": "test"}, "a folder of pictures has no splits"),
        (
            {"train_data_dir": "{}/tables", "split": "test"},
            r"no split 'test' in .* which has \['train', 'validation'\]",
        ),
        ({"train_data_dir": "{}/tables", "split": "valid"}, r"no split 'valid' in .* \['train', 'validation'\]"),
        (
            {"train_data_dir": "{}/tables", "image_column": "x"},
            r"no column 'x' in tables, which has \['image', 'label'\]",
        ),
        ({"train_data_dir": "{}/empty"}, "must hold pictures or parquet files, got neither"),
        ({"train_data_dir": "{}"}, "must hold pictures or parquet files, got both"),
        ({"train_data_dir": "{}/tables"}, "row 1 of tables has no image"),
        ({"train_data_dir": "{}/tables", "split": "validation"}, "tables holds no images"),
        ({"train_data_files": "{}/tables/train*", "split": "test"}, "train_data_files has no splits"),
        ({"train_data_dir": "{}/deep"}, "deep.png has pixel type I;16, expected 8 bits"),
    ],
)
@pytest.mark.parametrize("entry", ["load_images", "stream_images"])
def test_bad_options_are_refused_in_one_sentence(entry, options, message, folder, tmp_path, load):
    for name in ("tables", "empty", "deep"):
        (tmp_path / name).mkdir()
    write_parquet(tmp_path / "tables" / "train-0.parquet", [encoded(noise(0)), None])
    empty = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    pyarrow.parquet.write_table(empty.arrow_schema.empty_table(), tmp_path / "tables" / "validation-0.parquet")
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(tmp_path / "deep" / "deep.png")
    options = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message) as error:
        if entry == "load_images":
            load(**options)
        else:
            take(stream_images(**{"resolution": 8, **options}), 0, 1, batch_size=2)
    assert "\n" not in str(error.value) and not str(error.value).endswith(".")


@pytest.mark.parametrize("content", [b"", b"not a picture", encoded(noise(0, 64))[:2000]])
def test_unreadable_picture_is_named(content, folder, load):
    (folder / "bad.jpg").write_bytes(content)
    with pytest.raises(ValueError, match="bad.jpg is not a readable picture .* remove it or replace it"):
        load(train_data_dir=folder)


def test_missing_paths(tmp_path, load):
    with pytest.raises(FileNotFoundError, match="train_data_dir='.*nowhere' is not a folder"):
        load(train_data_dir=Path(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no file matches train_data_files"):
        load(train_data_files=[str(tmp_path / "*.parquet")])


@pytest.mark.parametrize("options", [{"seed": -1}, {"shuffle_buffer": 0}])
def test_stream_arguments_are_checked(options):
    with pytest.raises(ValueError, match="expected seed >= 0 and shuffle_buffer >= 1"):
        stream_images("digits", **options)


def _write_idx(path, images, magic=0x803):
    content = struct.pack(">4i", magic, *images.shape) + images.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["-idx3-ubyte.gz", ".idx3-ubyte"])
def test_idx_files(tmp_path, suffix):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    _write_idx(tmp_path / f"train-images{suffix}", images)
    _write_idx(tmp_path / f"t10k-images{suffix}", images[:2])
    source = dict(train_data_dir=tmp_path, resolution=28, cache_dir=tmp_path / "cache", progress=False)
    assert np.array_equal(load_images("mnist", **source).images[..., 0], images)
    assert np.array_equal(load_images("mnist", split="test", **source).images[..., 0], images[:2])
    with pytest.raises(ValueError, match="choose train or test"):
        load_images("mnist", split="validation", **source)


def test_damaged_idx_files_are_refused(tmp_path):
    images = np.zeros((5, 28, 28), np.uint8)
    source = dict(train_data_dir=tmp_path, resolution=28, cache_dir=tmp_path / "cache", progress=False)
    path = tmp_path / "train-images-idx3-ubyte"
    _write_idx(path, images, magic=0x801)
    with pytest.raises(ValueError, match="idx3-ubyte"):
        load_images("mnist", **source)
    _write_idx(path, images)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="download it again"):
        load_images("mnist", **source)
