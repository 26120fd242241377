"""`vaeplus encode`: latents as a data set, in constant memory, complete or not there."""

import gzip
import json
import os
import re
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from helpers import code_blocks, make_pipeline, run
from huggingface_hub import DatasetCard, HfApi
from huggingface_hub.errors import HTTPError
from PIL import Image

from hf_vaeplus import (
    VAEPlusPipeline,
)
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.stream import stream_images
from hf_vaeplus.hub import latents
from hf_vaeplus.hub.latents import encode_to_parquet

SIZE, COUNT = 32, 21
pytestmark = pytest.mark.usefixtures("working_folder")


@pytest.fixture(scope="module")
def pipe() -> VAEPlusPipeline:
    return make_pipeline(second_stage=False)


@pytest.fixture(scope="module")
def home(pipe, tmp_path_factory) -> Path:
    """A folder with a saved pipeline, and the same pictures as files and as a parquet table."""
    home = tmp_path_factory.mktemp("encoding")
    pipe.save_pretrained(home / "pipeline")
    (home / "pictures").mkdir()
    for number in range(COUNT):
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(home / "pictures" / f"{number:02}.png")
    rows = [{"bytes": path.read_bytes(), "path": None} for path in sorted((home / "pictures").iterdir())]
    table = datasets.Dataset.from_dict({"image": rows}, datasets.Features(image=datasets.Image()))
    (home / "table").mkdir()
    table.to_parquet(home / "table" / "test-00000.parquet")
    return home


def source(name: str) -> dict:
    sources = {
        "pictures": dict(train_data_dir="home/pictures"),
        "parquet": dict(train_data_dir="home/table", split="test"),
        "digits": dict(dataset_name="digits", max_samples=COUNT),
        "rendered-faces": dict(dataset_name="rendered-faces", max_samples=COUNT),
    }
    return {**sources[name], "resolution": SIZE, "num_channels": 3}


def load(path: str, **options) -> datasets.Dataset:
    if path.endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files=path, split="train").with_format("torch")
    return datasets.load_dataset(path, split=options.get("split", "train")).with_format("torch")


# ------------------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("name", ["pictures", "parquet", "digits", "rendered-faces"])
def test_every_image_has_its_posterior_whether_cached_or_streamed(pipe, name):
    images = load_images(**source(name), progress=False)
    assert encode_to_parquet(pipe, images, "cached.parquet", batch_size=8) == [Path("cached.parquet")]
    encode_to_parquet(pipe, stream_images(**source(name)), "streamed.parquet", batch_size=8)
    cached, streamed = load("cached.parquet"), load("streamed.parquet")
    vector = datasets.List(datasets.Value("float32"), length=4)
    names = {"file_name": datasets.Value("string")} if name == "pictures" else {}
    assert cached.features == {"index": datasets.Value("int64"), **names, "mean": vector, "logvar": vector}
    assert cached["index"][:].tolist() == list(range(COUNT))
    posterior = pipe.encode(images.pixels(0, COUNT))
    torch.testing.assert_close(cached["mean"][:], posterior.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cached["logvar"][:], posterior.logvar, rtol=1e-5, atol=1e-5)
    if names:
        assert cached["file_name"][:] == [f"{number:02}.png" for number in range(COUNT)]
    for column in cached.column_names[-2:]:
        torch.testing.assert_close(cached[column][:], streamed[column][:], rtol=0, atol=0)


def test_labels_go_with_the_latents(pipe):
    """Of folders, of a column, and of MNIST's files; a slice and pictures that are left out move none of them."""
    labels = [str(number % 3) for number in range(COUNT)]
    for number, label in enumerate(labels):
        (folder := Path("sorted", label)).mkdir(parents=True, exist_ok=True)
        shutil.copy(f"home/pictures/{number:02}.png", folder / f"{number:02}.png")
    Path("sorted/0/00.png").write_bytes(b"no picture")
    wanted = dict(resolution=SIZE, progress=False, on_bad_image="skip", split="train[3:9]")
    encode_to_parquet(pipe, load_images(train_data_dir="sorted", **wanted), "folders.parquet", batch_size=4)
    rows = load("folders.parquet")
    assert [f"{Path(name).parent}" for name in rows["file_name"][:]] == rows["label"][:] == ["0"] * 3 + ["1"] * 3
    pixels = pipe.encode([Path("sorted", name) for name in rows["file_name"][:]]).mean
    torch.testing.assert_close(rows["mean"][:], pixels, rtol=1e-5, atol=1e-5)

    table = datasets.load_dataset("parquet", data_files="home/table/test-00000.parquet", split="train")
    table.add_column("digit", list(range(COUNT))).to_parquet("labelled.parquet")
    images = load_images(train_data_files="labelled.parquet", resolution=SIZE, progress=False)
    encode_to_parquet(pipe, images, "column.parquet", label_column="digit")
    assert load("column.parquet")["label"][:].tolist() == list(range(COUNT))
    with pytest.raises(ValueError, match="no column 'letter'"):
        encode_to_parquet(pipe, images, "none.parquet", label_column="letter")

    Path("mnist").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    Path("mnist/train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *noise.shape) + noise.tobytes())
    with gzip.open("mnist/train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">2I", 0x801, 4) + bytes([7, 2, 1, 0]))
    encode_to_parquet(pipe, load_images(train_data_dir="mnist", resolution=SIZE, progress=False), "mnist.parquet")
    assert load("mnist.parquet")["label"][:].tolist() == [7, 2, 1, 0]


def test_the_index_is_the_row_of_the_whole_split(pipe):
    images = load_images(**source("pictures") | {"split": "train[15:20]"}, progress=False)
    encode_to_parquet(pipe, images, "slice.parquet", batch_size=2)
    encode_to_parquet(pipe, load_images(**source("pictures"), progress=False), "whole.parquet", batch_size=5)
    part, whole = load("slice.parquet"), load("whole.parquet")
    assert part["index"][:].tolist() == [15, 16, 17, 18, 19]
    torch.testing.assert_close(part["mean"][:], whole["mean"][15:20], rtol=1e-5, atol=1e-5)


def test_a_folder_is_laid_out_as_the_hub_expects(pipe):
    images = load_images(**source("parquet"), progress=False)
    files = encode_to_parquet(pipe, images, "new/latents", "test", batch_size=4, rows_per_file=8)
    names = [f"new/latents/data/test-0000{i}-of-00003.parquet" for i in range(3)]
    assert [str(file) for file in files] == names
    encode_to_parquet(pipe, images, "one.parquet", batch_size=4)
    rows, expected = load("new/latents", split="test"), load("one.parquet")
    for column in expected.column_names:
        assert rows[column][:].equal(expected[column][:])


class Endless:
    """A source without end: what has been read of it is counted."""

    name, count = "endless", 0

    def in_order(self, batch_size):
        while True:
            yield {
                "pixel_values": torch.zeros(batch_size, 3, SIZE, SIZE, dtype=torch.uint8),
                "index": torch.arange(self.count, self.count + batch_size),
            }
            self.count += batch_size


def files_in(folder: Path) -> list[Path]:
    return [Path(where) / name for where, _, names in os.walk(folder) for name in names]  # follows no link to `home`


@pytest.mark.parametrize("output", ["latents.parquet", "latents"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_endless_source_is_written_as_it_is_read_and_leaves_nothing_when_stopped(
    pipe, output, stop, working_folder, monkeypatch
):
    monkeypatch.setattr(latents, "_ROWS_PER_GROUP", 8)
    endless, sizes = Endless(), []

    class Stopping:
        vae = pipe.vae

        def encode(self, pixels, batch_size, preprocess):
            written = files_in(working_folder)
            assert not Path(output).exists() and not [file for file in written if file.suffix == ".parquet"]
            sizes.append(sum(file.stat().st_size for file in written))
            if endless.count == 40 * 4:
                raise stop
            return pipe.encode(pixels, batch_size)

    with pytest.raises(stop):
        encode_to_parquet(Stopping(), endless, output, batch_size=4, rows_per_file=32)
    assert sizes[0] == 0 and sizes[10] > 0 and sizes[40] > 3 * sizes[10]
    assert files_in(working_folder) == [] and {path.name for path in working_folder.iterdir()} == {"home"}


# --------------------------------------------------------------------------------------------------------- command

PICTURES = ["encode", "home/pipeline", "--train_data_dir", "home/pictures"]


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_the_command_writes_what_the_pipeline_says(home, pipe, streaming):
    code, output, _ = run(*PICTURES, "--max_images", "10", "--batch_size", "4", *streaming)
    assert (code, output) == (0, "saved 10 posteriors in latents.parquet\n")
    pixels = load_images(**source("pictures"), progress=False).pixels(0, 10)
    torch.testing.assert_close(load("latents.parquet")["mean"][:], pipe.encode(pixels).mean, rtol=1e-5, atol=1e-5)


def test_a_crop_is_taken(pipe):
    assert run(*PICTURES, "--crop", "33", "--output", "cropped.parquet")[0] == 0
    images = load_images(**source("pictures") | {"crop": 33}, progress=False)
    expected = pipe.encode(images.pixels(0, COUNT)).mean
    torch.testing.assert_close(load("cropped.parquet")["mean"][:], expected, rtol=1e-5, atol=1e-5)


def test_a_folder_has_a_card_whose_code_runs():
    code, output, _ = run(*PICTURES, "--split", "train[5:]", "--output", "latents", "--json")
    assert code == 0
    assert json.loads(output) == {
        "files": ["latents/data/train-00000-of-00001.parquet"],
        "pipeline": "home/pipeline",
        "split": "train[5:]",
        "num_images": COUNT - 5,
        "latent_dim": 4,
    }
    text = Path("latents/README.md").read_text()
    assert DatasetCard(text).data.tags == ["hf_vaeplus", "latents"]
    for told in ("`home/pipeline`", "16 images", "`train[5:]`", "4 x float32", "32 x 32", "the largest square"):
        assert told in text
    assert not re.search(r"[{}]|None", text)
    (code,) = code_blocks(text)
    found = {}
    exec(code, found)
    assert found["z"].shape == (8, 4)


MISTAKES = {
    "a file that exists": ("{} --output taken.parquet", "taken.parquet exists: name a new file or folder"),
    "a folder that exists": ("{} --output taken", "taken exists"),
    "another suffix": ("{} --output latents.csv", "latents.parquet or to a folder such as latents, got latents.csv"),
    "a file in a file": ("{} --output taken.parquet/a.parquet", "taken.parquet"),
    "a missing pipeline": ("encode nowhere/pipeline/x --dataset_name digits", "is not a saved pipeline"),
    "no data": ("encode home/pipeline", "exactly one of.*got none"),
    "a missing folder": ("encode home/pipeline --train_data_dir nowhere", "'nowhere' is not a folder"),
    "a slice of a stream": ("{} --streaming --split train[:5]", "a stream takes no slice"),
    "an empty batch": ("{} --batch_size 0", "batch_size.* must be at least 1, got 0"),
    "private without a repository": ("{} --private", "--private is of --push_to_hub, which is missing"),
    "a crop that does not fit": ("{} --streaming --crop 41", "smaller than crop=41"),
    "a repository that cannot be": ("{} --push_to_hub a/b/c", "Repo id must be in the form"),
}


@pytest.mark.parametrize("command, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(command, message, working_folder, home):
    load_images(**source("pictures"), progress=False)  # decoded already: no progress bar before a mistake
    Path("taken").mkdir()
    Path("taken.parquet").touch()
    code, output, errors = run(*command.format(" ".join(PICTURES)).split())
    assert (code, output) == (2, "")
    (sentence,) = [line for line in errors.split("\n") if line.startswith("vaeplus: error: ")]
    assert re.search(message, sentence), errors
    assert {path.name for path in working_folder.iterdir()} == {"home", "taken", "taken.parquet"}


def test_images_of_another_size_are_refused(pipe, working_folder):
    images = load_images("digits", resolution=16, max_samples=3, progress=False)
    with pytest.raises(ValueError, match="must have shape"):
        encode_to_parquet(pipe, images, "latents.parquet")
    assert {path.name for path in working_folder.iterdir()} == {"home"}


# ------------------------------------------------------------------------------------------------------------- Hub


@pytest.fixture
def hub(monkeypatch) -> SimpleNamespace:
    """What is asked of the Hub, in order; `there` are the files of the repository, `private` whether it is."""
    hub = SimpleNamespace(asked=[], there=[], private=True, fails=False, committed={}, deleted=[])

    def create_repo(self, repo_id, **options):
        hub.asked.append(("create_repo", repo_id, options))

    def create_commit(self, repo_id, operations, commit_message, repo_type):
        if hub.fails:
            raise HTTPError("the connection was cut")
        hub.asked.append(("create_commit", repo_id, repo_type))
        for operation in operations:
            if hasattr(operation, "path_or_fileobj"):
                with operation.as_file() as file:
                    hub.committed[operation.path_in_repo] = file.read()
            else:
                hub.deleted.append(operation.path_in_repo)
        return SimpleNamespace(repo_url=f"https://hub/datasets/{repo_id}")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, repo_id: SimpleNamespace(private=hub.private))
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, repo_id, repo_type: hub.there)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return hub


@pytest.mark.parametrize("output", ["latents", "latents.parquet"])
def test_latents_are_pushed_in_place_of_older_ones_of_the_same_split(hub, output):
    hub.there = ["README.md", *(f"data/{split}-00000-of-00002.parquet" for split in ("train", "test"))]
    flags = ["--output", output, "--push_to_hub", "somebody/latents", "--private", "--json"]
    code, printed, _ = run(*PICTURES, *flags)
    assert code == 0
    assert hub.asked == [
        ("create_repo", "somebody/latents", {"repo_type": "dataset", "private": True, "exist_ok": True}),
        ("create_commit", "somebody/latents", "dataset"),
    ]
    assert hub.deleted == ["data/train-00000-of-00002.parquet"]
    (file,) = json.loads(printed)["files"]
    assert hub.committed.keys() == {"README.md", "data/train-00000-of-00001.parquet"}
    assert hub.committed["data/train-00000-of-00001.parquet"] == Path(file).read_bytes()
    assert 'load_dataset("somebody/latents", split="train")' in hub.committed["README.md"].decode()
    told = json.loads(printed)
    assert (told["repository"], told["url"]) == ("somebody/latents", "https://hub/datasets/somebody/latents")


def test_a_public_repository_is_not_taken_for_a_private_one(hub, working_folder):
    hub.private = False
    code, _, errors = run(*PICTURES, "--push_to_hub", "somebody/latents", "--private")
    assert code == 2 and "somebody/latents is on the Hub already, and public" in errors
    assert {path.name for path in working_folder.iterdir()} == {"home"}


def test_a_failed_push_keeps_the_latents(hub):
    hub.fails = True
    code, _, errors = run(*PICTURES, "--push_to_hub", "somebody/latents")
    assert code == 2
    assert "latents.parquet is complete, but pushing it to somebody/latents failed: the connection was cut" in errors
    assert len(load("latents.parquet")) == COUNT
