"""Caches of codes and bins under several processes, kills and damage. Those of images: test_data.py."""

import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers import full_disk, make_pipeline, start_together
from safetensors.torch import load_file, save_file

from hf_vaeplus import VAEPlusAutoencoderModel
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.files import write_json, write_whole
from hf_vaeplus.training import codes as encoded_rows
from hf_vaeplus.training.codes import encode_dataset


def codes(model: Path, cache: Path, encoded: Path | None = None, pause: float = 0) -> torch.Tensor:
    """Codes of 40 digits; a line in `encoded` for each batch that is encoded."""
    autoencoder = VAEPlusAutoencoderModel.from_pretrained(model).eval()

    def encode(pixels):
        if encoded is not None:
            with open(encoded, "a") as file:
                file.write(f"{len(pixels)}\n")
            time.sleep(pause)
        return autoencoder.encode(pixels)

    images = load_images("digits", resolution=32, max_samples=40, cache_dir=cache, progress=False)
    return encode_dataset(images, autoencoder, encode)


def encode_at_once(barrier, model, cache, encoded, pause, half):
    """In another process: encode, and leave what was found in a file; with `half`, stop in the middle of writing."""

    def save_half(tensors, path):
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:100])
        encoded.touch()
        time.sleep(60)

    if half:
        encoded_rows.save_file = save_half
    barrier.wait()
    save_file({"rows": codes(model, cache, encoded, pause)}, encoded.with_name(f"found-{os.getpid()}"))


@pytest.fixture
def model(tmp_path) -> Path:
    make_pipeline(second_stage=False).autoencoder.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_of_four_processes_one_encodes_and_all_read_the_same(model, tmp_path):
    codes(model, tmp_path / "other")  # elsewhere
    load_images("digits", resolution=32, max_samples=40, cache_dir=tmp_path / "cache", progress=False)
    for process in start_together(encode_at_once, 4, model, tmp_path / "cache", tmp_path / "encoded", 1.0, False):
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "encoded").read_text() == "40\n"
    found = [load_file(path)["rows"] for path in tmp_path.glob("found-*")]
    assert len(found) == 4 and all(torch.equal(each, codes(model, tmp_path / "other")) for each in found)


def test_what_a_killed_process_left_is_removed_and_the_codes_are_right(model, tmp_path):
    (process,) = start_together(encode_at_once, 1, model, tmp_path / "cache", tmp_path / "encoded", 0, True)
    while not (tmp_path / "encoded").exists() or not list((tmp_path / "cache" / "encoded").glob(".partial.*")):
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    folder = tmp_path / "cache" / "encoded"
    assert not list(folder.glob("*.safetensors")) or [path.name for path in folder.glob("*.safetensors")][0][0] == "."
    assert torch.equal(codes(model, tmp_path / "cache"), codes(model, tmp_path / "other"))
    assert not list(folder.glob(".partial.*")) and len(list(folder.glob("*.safetensors"))) == 1


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("codes"),
    "of other images": lambda path: save_file({"rows": torch.zeros(39, 6)}, path),
    "of something else": lambda path: save_file({"weights": torch.zeros(40, 6)}, path),
    "flat": lambda path: save_file({"rows": torch.zeros(40)}, path),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_codes_are_named_and_made_again(damage, model, tmp_path, caplog):
    expected = codes(model, tmp_path / "cache").clone()
    (path,) = (tmp_path / "cache" / "encoded").glob("*.safetensors")
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(codes(model, tmp_path / "cache"), expected)
    assert f"{path} is damaged" in caplog.text
    caplog.clear()
    assert torch.equal(codes(model, tmp_path / "cache"), expected) and not caplog.text


def test_a_full_disk_for_codes_is_one_sentence_and_leaves_nothing(model, tmp_path):
    images = load_images("digits", resolution=32, max_samples=40, cache_dir=tmp_path / "cache", progress=False)
    autoencoder = VAEPlusAutoencoderModel.from_pretrained(model).eval()
    with full_disk(), pytest.raises(OSError, match="the cache .*encoded cannot be written .* free some space or name"):
        encode_dataset(images, autoencoder, autoencoder.encode)
    assert [path.suffix for path in (tmp_path / "cache" / "encoded").iterdir()] == [".lock"]


@pytest.mark.parametrize("error", [OSError("no room"), KeyboardInterrupt()])
def test_a_file_is_written_whole_or_not_at_all(error, tmp_path):
    path = tmp_path / "a.json"
    write_json(path, [1])

    def write(partial):
        partial.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_whole(path, write)
    assert path.read_text() == "[\n  1\n]\n" and list(tmp_path.iterdir()) == [path]
    with full_disk(), pytest.raises(OSError):
        write_json(path, list(range(1000)))
    assert path.read_text() == "[\n  1\n]\n" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: events.append(name) or real(*args))
    write_json(tmp_path / "a.json", {})
    assert events == ["fsync", "replace"]
