"""`on_bad_image`: pictures that cannot be used are refused, or left out, counted and named."""

import json
import logging

import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers import TINY, encoded, noise, run, take

from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.sources import BadImage
from hf_vaeplus.data.stream import stream_images

COUNT = 12
BAD = {1: b"", 2: b"text", 6: encoded(noise(0, 64))[:2000], 11: b"\x89PNG"}
GOOD = [number for number in range(COUNT) if number not in BAD]


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures of noise, picture i from seed i, some of them unreadable: the last one among them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number:02}.png").write_bytes(BAD.get(number, encoded(noise(number))))
    return folder


@pytest.fixture
def source(folder, tmp_path):
    return dict(train_data_dir=folder, resolution=8, on_bad_image="skip")


@pytest.fixture
def load(source, tmp_path):
    return lambda **options: load_images(**{**source, "cache_dir": tmp_path / "cache", "progress": False, **options})


def rows(batches):
    return np.concatenate([batch["pixel_values"].permute(0, 2, 3, 1) for batch in batches])


def numbers_of(images):
    """Which pictures they are."""
    known = {noise(number).tobytes(): number for number in GOOD}
    return [known[image.tobytes()] for image in images]


def test_the_others_are_cached_and_those_left_out_are_counted_and_named(load, caplog):
    assert numbers_of(load().images) == GOOD
    told = "pictures: left out 4 pictures that cannot be used: 01.png, 02.png, 06.png, 11.png"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.WARNING, told)]
    caplog.clear()
    assert numbers_of(load(split="train[1:3]").images) == GOOD[1:3]  # from the cache, and told again
    assert [record.getMessage() for record in caplog.records] == [told]


def test_a_long_list_is_cut(folder, load, caplog):
    for number in range(3):
        (folder / f"a{number}.png").write_bytes(b"")
    load()
    assert caplog.messages == [
        "pictures: left out 7 pictures that cannot be used: 01.png, 02.png, 06.png, 11.png, a0.png and 2 more"
    ]


def test_it_is_part_of_the_key_and_the_default_refuses(load, folder, source):
    with pytest.raises(BadImage, match="01.png is not a readable picture"):
        load(on_bad_image="raise")
    with pytest.raises(BadImage, match="is not a readable picture"):
        take(stream_images(**{**source, "on_bad_image": "raise"}), 0, 1, batch_size=COUNT)
    for number in BAD:
        (folder / f"{number:02}.png").unlink()
    skipped, strict = load(), load(on_bad_image="raise")
    assert skipped.fingerprint != strict.fingerprint
    assert np.array_equal(skipped.images, strict.images)
    assert stream_images(**source).fingerprint == skipped.fingerprint
    assert (
        load(on_bad_image="raise").fingerprint
        == load_images(
            train_data_dir=folder, resolution=8, cache_dir=skipped.path.parents[1], progress=False
        ).fingerprint
    )


def test_in_order_gives_the_rows_of_the_source(load, source, caplog):
    for images in (load(), stream_images(**source)):
        batches = list(images.in_order(5))
        assert numbers_of(rows(batches)) == GOOD
        assert torch.cat([batch["index"] for batch in batches]).tolist() == GOOD
    assert len(caplog.records) == 2
    (batch,) = load(split="train[2:5]").in_order(5)
    assert batch["index"].tolist() == GOOD[2:5]


def test_every_way_of_being_bad(tmp_path, load, caplog):
    deep = encoded(np.full((8, 8), 300, np.uint16))
    column = [encoded(noise(0)), None, encoded(noise(3, 4)), deep, b"", encoded(noise(4))]
    (tmp_path / "tables").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"image": column}), tmp_path / "tables/train.parquet")
    names = pyarrow.table({"image": [__file__]})
    pyarrow.parquet.write_table(names, tmp_path / "tables/train-names.parquet")  # comes first
    dataset = load(train_data_dir=tmp_path / "tables", crop=8)
    assert numbers_of(dataset.images) == [0, 4]
    assert dataset.left_out == [0, 2, 3, 4, 5]
    named = ", ".join(f"row {row} of tables" for row in dataset.left_out)
    assert caplog.messages == [f"tables: left out 5 pictures that cannot be used: {named}"]


@pytest.fixture
def stream(source):
    return stream_images(**source, seed=3, shuffle_buffer=5, random_flip=True)


def test_a_stream_keeps_the_places_of_the_others(folder, source, stream, monkeypatch):
    options = dict(seed=3, shuffle_buffer=5)
    batches = take(stream_images(**source, **options), 0, 9, batch_size=8)
    for number in BAD:  # the same order, with pictures that can be told
        (folder / f"{number:02}.png").write_bytes(encoded(noise(100 + number)))
    whole = take(stream_images(**{**source, "on_bad_image": "raise"}, **options), 0, 9, batch_size=8)
    marks = {noise(100 + number).tobytes() for number in BAD}
    order, seen = rows(whole), rows(batches)
    for place, image in enumerate(seen[:64]):
        following = next(each for each in order[place:] if each.tobytes() not in marks)
        assert np.array_equal(image, following)
    assert sorted(set(numbers_of(seen))) == GOOD


def test_a_stream_resumes_and_is_shared_as_ever(stream):
    whole = take(stream, 0, 12, batch_size=4)
    for first in (1, 5, 9):
        for resumed, batch in zip(take(stream, first, 3, batch_size=4), whole[first:], strict=False):
            assert torch.equal(resumed["pixel_values"], batch["pixel_values"])
            assert torch.equal(resumed["index"], batch["index"])
    parts = [take(stream, 0, 12, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step]["pixel_values"] for part in parts]), batch["pixel_values"])


def test_a_stream_tells_at_each_doubling(stream, caplog):
    take(stream, 0, 12, batch_size=4)
    counts = [int(message.split("left out ")[1].split()[0]) for message in caplog.messages]
    assert counts == [1, 2, 4]
    assert all(f"{number:02}.png" in caplog.messages[-1] for number in BAD)


def test_a_data_set_of_which_nothing_remains_is_refused(folder, load, source):
    for number in GOOD:
        (folder / f"{number:02}.png").unlink()
    told = "pictures holds no picture that can be used, all 4 were left out; set on_bad_image to raise to see why"
    for use in (
        load,
        lambda: take(stream_images(**source), 0, 1, batch_size=3),
        lambda: list(stream_images(**source).in_order(3)),
    ):
        with pytest.raises(ValueError) as error:
            use()
        assert str(error.value) == told


def test_an_unknown_way_is_refused(source, load):
    for use in (load, lambda **options: stream_images(**{**source, **options})):
        with pytest.raises(ValueError, match="on_bad_image must be one of raise, skip, got 'ignore'"):
            use(on_bad_image="ignore")


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_training_and_latents_leave_them_out(folder, working_folder, caplog, streaming):
    (working_folder / "tiny.yaml").write_text(json.dumps(TINY))
    source = ["--train_data_dir", str(folder), "--on_bad_image", "skip", *streaming]
    code, _, errors = run("train", "--config", "tiny.yaml", "--output_dir", "out", *source, "--max_train_steps", "2")
    assert code == 0, errors
    assert any("left out 4 pictures" in message for message in caplog.messages)
    options = json.loads((working_folder / "out/vae/training_options.json").read_text())
    assert options["on_bad_image"] == "skip"
    code, _, errors = run("encode", "home/pipeline", "--output", "latents.parquet", *source)
    assert code == 0, errors
    assert pyarrow.parquet.read_table(working_folder / "latents.parquet")["index"].to_pylist() == GOOD
