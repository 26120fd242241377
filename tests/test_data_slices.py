"""Slices of a split: which images they hold, what they share, and which ones are refused."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.stream import stream_images
from hf_vaeplus.training.codes import encode_dataset

COUNT = 40


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    cache_dir = tmp_path_factory.mktemp("cache")

    def load(split="train", **options):
        source = dict(resolution=8, num_channels=1, max_samples=COUNT, cache_dir=cache_dir, progress=False)
        return load_images("digits", split=split, **{**source, **options})

    return load


@settings(max_examples=40, deadline=None)
@given(*[st.none() | st.integers(-COUNT, COUNT)] * 2)
def test_a_slice_is_that_of_a_list(load, start, stop):
    split = f"train[{'' if start is None else start}:{'' if stop is None else stop}]"
    expected = load().images[start:stop]
    if not len(expected):
        with pytest.raises(ValueError, match=r"must name some of the 40 images; choose limits from 0 to 40"):
            load(split)
        return
    part = load(split)
    np.testing.assert_array_equal(part.images, expected)
    assert len(part) == len(expected) == len(part.rows) and part.split == split
    assert (part.fingerprint == load().fingerprint) == (len(part) == COUNT)


def test_slices_share_one_cache_and_have_fingerprints_of_their_own(load):
    parts = [load(f"train[{limits}]") for limits in ("10:20", "10:21", "11:20", "20:", "-20:")]
    assert {part.path for part in parts} == {load().path}
    assert [len({part.fingerprint for part in parts}), parts[3].fingerprint] == [4, parts[4].fingerprint]
    assert load("train[10:20]", max_samples=30).fingerprint != parts[0].fingerprint


def test_mirror_images_are_those_of_the_slice(load):
    part = load("train[30:33]", random_flip=True)
    images = part.__getitems__(range(6))["pixel_values"]
    assert len(part) == 6
    assert torch.equal(images[3:], images[:3].flip(-1))
    np.testing.assert_array_equal(images[:3, 0], load().images[30:33, ..., 0])
    with pytest.raises(IndexError):
        part[6]


def test_a_slice_survives_pickling(load):
    part = load("train[5:9]")
    again = pickle.loads(pickle.dumps(part))
    np.testing.assert_array_equal(again.images, part.images)
    assert (again.rows, again.split, again.fingerprint) == (part.rows, part.split, part.fingerprint)


def test_codes_of_one_slice_are_not_those_of_another(load):
    model = torch.nn.Identity()
    for first in (0, 3, 0):
        codes = encode_dataset(load(f"train[{first}:{first + 2}]"), model, lambda pixels: pixels.flatten(1))
        np.testing.assert_allclose(255 * codes, load().images[first : first + 2].reshape(2, -1), atol=1e-3)


@pytest.mark.parametrize(
    "split", ["train[", "train[]", "train[3]", "train[1:2:1]", "train[10%:20%]", "train[a:b]", "train[:5]+train[7:]",
              "[:5]", "train[0.5:]", "train[: 5]", "train[:5] ", ""]
)  # fmt: skip
def test_a_malformed_slice_is_refused_in_one_sentence(load, split):
    with pytest.raises(ValueError, match="neither a name nor a name with a slice of whole numbers; write train, "):
        load(split)


@pytest.mark.parametrize("limits", ["41:", ":41", "-41:", "40:", "7:7", "9:3", ":0"])
def test_an_empty_slice_or_one_beyond_the_images_is_refused(load, limits):
    with pytest.raises(ValueError, match=r"split='train\[.*\]' must name some of the 40 images"):
        load(f"train[{limits}]")


def test_the_split_of_a_slice_is_checked_and_streams_take_none(load):
    with pytest.raises(ValueError, match="dataset_name has no splits, got split='test'"):
        load("test[:5]")
    with pytest.raises(ValueError, match=r"a stream takes no slice of a split, got split='train\[:5\]'"):
        stream_images("digits", split="train[:5]", resolution=8)
