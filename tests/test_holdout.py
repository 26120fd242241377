"""Pictures that training holds out: which ones, that no stage sees them, and what tables and cards say of figures."""

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import run
from PIL import Image

from hf_vaeplus.cli.evaluate import _seen_in_training as run_says
from hf_vaeplus.data.cache import load_images, rows_held_out
from hf_vaeplus.data.stream import stream_images
from hf_vaeplus.training.options import StageOptions, read_record
from hf_vaeplus.training.stages import open_images, seen_in_training, with_holdout

pytestmark = pytest.mark.usefixtures("working_folder")
COUNT = 60
STEPS = ("--max_train_steps", "1", "--train_batch_size", "4", "--mixed_precision", "no", "--no-match_spectrum")
TINY = (
    "--set",
    "autoencoder.model.hidden_channels=[4,8]",
    "vae.model.hidden_dim=8",
    "second_stage.model.hidden_dim=8",
)


def digits(split: str = "train", holdout=0, **options):
    source = dict(resolution=8, num_channels=1, max_samples=COUNT, progress=False)
    return load_images("digits", split=split, holdout=holdout, **{**source, **options})


@pytest.fixture
def pictures() -> Path:
    folder = Path("pictures")
    folder.mkdir()
    for number in range(COUNT):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02}.png")
    return folder


@pytest.mark.parametrize(
    "count, holdout, number",
    [(49, None, 0), (50, None, 10), (60, None, 12), (600, None, 100), (2_000, None, 100), (2_001, None, 101),
     (100_000, None, 5_000), (60, 0, 0), (60, 7, 7), (60, 0.25, 15), (60, 1, 1)],
)  # fmt: skip
def test_how_many_are_held_out(count, holdout, number):
    held_out = rows_held_out(range(count), holdout, "pictures")
    assert len(held_out) == number == len(set(held_out.tolist())) and (np.diff(held_out) > 0).all()
    assert np.array_equal(held_out, rows_held_out(range(count), holdout, "others"))
    if 10 < number:  # spread over the whole folder, not its end
        assert abs(held_out.mean() - count / 2) < 4 * count / np.sqrt(12 * number)


@pytest.mark.parametrize("holdout", [60, 61, 1.5, 0.001])
def test_what_cannot_be_held_out(holdout):
    with pytest.raises(
        ValueError, match=f"holdout={holdout} must hold some of the 60 images of digits out and not all"
    ):
        digits(holdout=holdout)


def test_seen_and_unseen_images_are_the_whole_and_share_nothing():
    whole, seen, unseen = digits(), digits(holdout=15), digits("train[unseen]", 15)
    assert (len(seen), len(unseen)) == (45, 15) and seen.path == whole.path == unseen.path
    assert sorted([*seen.numbers, *unseen.numbers]) == list(range(COUNT))
    for part in (seen, unseen, seen.unseen(), pickle.loads(pickle.dumps(seen))):
        expected = whole.batch(part.numbers)["pixel_values"]
        assert part.batch(range(len(part)))["pixel_values"].equal(expected)
        assert [row for batch in part.in_order(4) for row in batch["index"].tolist()] == part.numbers.tolist()
    assert len({whole.fingerprint, seen.fingerprint, unseen.fingerprint}) == 3
    assert seen.unseen().fingerprint == unseen.fingerprint and whole.unseen() is None
    assert digits("train[seen]", 15).fingerprint == seen.fingerprint
    assert len(digits("train[unseen]")) == 12  # by default a fifth of 60
    flipped = digits(holdout=15, random_flip=True)
    assert len(flipped) == 90 and len(flipped.unseen()) == 15
    mirrored = flipped.batch([45 + 3])["pixel_values"]
    assert mirrored.equal(flipped.batch([3])["pixel_values"].flip(3))
    part = digits("train[10:50]", 0.5)
    assert set(part.numbers) | set(part.unseen().numbers) == set(range(10, 50))
    with pytest.raises(ValueError, match="holds nothing out of 40 images"):
        digits("train[unseen]", max_samples=40)
    with pytest.raises(ValueError, match="a stream holds no images out, got holdout=5"):
        stream_images("digits", holdout=5)


def test_whether_a_model_has_seen_images():
    options = StageOptions(dataset_name="digits", resolution=8, num_channels=1, max_train_samples=COUNT, holdout=15)
    training = open_images(options)
    for images, expected in (
        (training.unmirrored(), "seen"), (training.unseen(), "unseen"), (open_images(options, "train"), "partly seen"),
        (open_images(options, "train[100:120]"), "unseen"), (SimpleNamespace(split="test"), "unseen"),
    ):  # fmt: skip
        assert seen_in_training(images, training, options) == expected
    stream = stream_images("digits", resolution=8, num_channels=1, max_samples=COUNT)
    options = StageOptions(**asdict(options) | {"holdout": 0, "streaming": True})
    assert seen_in_training(digits(), stream, options) == "seen"
    assert seen_in_training(open_images(options, "train[60:90]"), stream, options) == "unseen"


def test_a_folder_is_held_out_by_default_and_figures_say_so(pictures):
    words = ("train", "--config", "quickstart", "--train_data_dir", "pictures", "--output_dir", "run", *STEPS, *TINY)
    code, output, errors = run(*words)
    assert code == 0, errors
    assert "12 unseen images of pictures" in output
    summary, record = json.loads(Path("run/summary.json").read_text()), read_record(Path("run/vae"))
    seen = load_images(train_data_dir="pictures", resolution=32, holdout=None, progress=False)
    assert (summary["images_are"], summary["num_images"], record["holdout"]) == ("unseen", 12, None)
    assert record["made_from"]["images"] == seen.fingerprint and summary["fingerprint"] == seen.unseen().fingerprint
    weights = Path("run/vae/model.safetensors").read_bytes()
    assert run(*words)[0] == 0 and Path("run/vae/model.safetensors").read_bytes() == weights
    code, _, errors = run(*words, "--holdout", "0")
    assert code == 2 and "other images (holdout None -> 0" in errors
    assert run("card", "run", "org/pictures", "--data_license", "none")[0] == 0
    card = Path("run/pipeline/README.md").read_text()
    assert "measured on 12 unseen images of pictures" in card and "was not trained on these images" in card
    for images, expected in ((seen.unseen(), "unseen"), (seen, "seen"), (digits(), None)):
        assert run_says("run/pipeline", images.fingerprint) == expected
    assert run_says("elsewhere/pipeline", seen.fingerprint) is None
    words = (
        "evaluate",
        "run/pipeline",
        "--train_data_dir",
        "pictures",
        "--num_images",
        "12",
        "--split",
        "train[unseen]",
    )
    assert "likelihoods: unseen in training" in run(*words)[1]


def test_a_run_of_an_earlier_version_goes_on_with_all_its_pictures(pictures):
    preset = {"common": {"train_data_dir": "pictures", "resolution": 32}}
    assert with_holdout(preset, Path("run"))["common"]["holdout"] is None
    assert with_holdout(preset, Path("run"), holdout=5) == preset
    for other in ({"dataset_name": "celeba"}, {"streaming": True}, {"holdout": 0}):
        named = {"common": preset["common"] | other}
        assert with_holdout(named, Path("run")) == named
    Path("run/vae").mkdir(parents=True)
    for record, holdout in (({"seed": 0}, 0), ({"seed": 0, "holdout": 7}, 7)):
        Path("run/vae/training_options.json").write_text(json.dumps(record))
        assert with_holdout(preset, Path("run"))["common"]["holdout"] == holdout
