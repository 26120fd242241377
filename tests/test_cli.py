"""The command line as a user meets it: help, mistakes, files."""

import contextlib
import hashlib
import json
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from helpers import SIZE, encoded, noise, run
from huggingface_hub.errors import HTTPError
from PIL import Image

import hf_vaeplus
from hf_vaeplus import (
    VAEPlusAutoencoderModel,
    VAEPlusPipeline,
)
from hf_vaeplus.cli.flags import parse_stage_options
from hf_vaeplus.cli.main import build_parser, main, run_command
from hf_vaeplus.data import cache
from hf_vaeplus.progress import tqdm
from hf_vaeplus.training import stages
from hf_vaeplus.training.options import STAGES

COMMANDS = ("quickstart", "train", "evaluate", "sample", "reconstruct", "interpolate")
TRAIN_STAGE = Path(__file__).parents[1] / "examples" / "train_stage.py"
EVALUATE = Path(__file__).parents[1] / "examples" / "evaluate.py"

pytestmark = pytest.mark.usefixtures("working_folder")


# --------------------------------------------------------------------------------------------------------- help


def test_help_names_every_command_and_where_to_begin():
    code, output, errors = run("--help")
    assert (code, errors) == (0, "")
    assert {line.split()[0] for line in output.splitlines() if line.startswith("    ")} >= set(COMMANDS)
    assert "vaeplus quickstart" in output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example_that_it_accepts(command, home, monkeypatch):
    code, output, _ = run(command, "--help")
    assert code == 0
    examples = [shlex.split(line) for line in output.splitlines() if line.startswith(f"  vaeplus {command}")]
    assert examples
    seen = []
    for name in ("train._train", "evaluate._evaluate", "inference._sample", "inference._reconstruct",
                 "inference._interpolate"):  # fmt: skip
        monkeypatch.setattr(f"hf_vaeplus.cli.{name}", lambda *args: seen.append(args))
    for example in examples:
        assert run(*example[1:])[0] == 0, example
    assert len(seen) == len(examples)


def test_the_version_is_that_of_the_package():
    assert run("--version") == (0, f"vaeplus {hf_vaeplus.__version__}\n", "")


@pytest.mark.parametrize("command", ["train", "train_stage"])
def test_the_help_of_config_lists_the_presets(command, capsys):
    with contextlib.suppress(SystemExit):
        parse_stage_options("", ["--help"]) if command == "train_stage" else main([command, "--help"])
    presets = Path(hf_vaeplus.__file__).parent.joinpath("presets").glob("*.yaml")
    assert ", ".join(sorted(path.stem for path in presets)) in " ".join(capsys.readouterr().out.split())


def test_hyphens_stand_for_underscores():
    argv = ["--stage", "autoencoder", "--train-data-dir=my-pictures", "--no-use-ema", "--max-train_steps", "7"]
    options = parse_stage_options("", argv)
    assert (options.train_data_dir, options.use_ema, options.max_train_steps) == ("my-pictures", False, 7)
    args = build_parser().parse_args(["sample", "--num-images", "3", "--", "--a-folder"])
    assert (args.num_images, args.pipeline) == (3, "--a-folder")


# ----------------------------------------------------------------------------------------------------- mistakes
# What a command refuses and in which words is in the catalogue of test_bad_input.py.

PIPE = "home/pipeline"
TRAIN = "train --config home/tiny.yaml --output_dir out"
EVAL = f"evaluate {PIPE} --dataset_name digits --max_images 40"


@pytest.mark.parametrize(
    "command",
    [f"sample {PIPE}", f"reconstruct {PIPE} home/0.png", f"interpolate {PIPE} home/0.png home/1.png", EVAL],
    ids=lambda command: command.split()[0],
)
def test_a_file_that_exists_is_replaced_only_with_overwrite(command, working_folder, monkeypatch):
    """Without the flag it is refused before the work."""
    output = working_folder / ("old.json" if command == EVAL else "old.png")
    output.write_bytes(b"old")
    words = [*command.split(), "--output", output.name]
    with monkeypatch.context() as patch:
        patch.setattr(VAEPlusPipeline, "from_pretrained", lambda *args, **options: pytest.fail("began to work"))
        code, _, errors = run(*words)
    assert code == 2 and f"{output.name} exists: add --overwrite to replace it" in errors and errors.count("\n") == 1
    assert output.read_bytes() == b"old"
    few = ["--num_images", "4"] if words[0] in ("sample", "evaluate") else []
    code, printed, _ = run(*words, *few, "--overwrite")
    assert code == 0 and printed.endswith(f"saved {output.name}\n") or f"saved in {output.name}\n" in printed
    assert output.read_bytes() != b"old"


@pytest.mark.parametrize("flags", ["--output home/notes.txt", "--output home", "--output .png", "--output samples",
                                   "--output home/notes.txt/a.png", "--separate --output home/notes.txt",
                                   "--separate --output home/notes.txt/a"])  # fmt: skip
def test_an_impossible_output_is_refused_before_the_work(flags, home, monkeypatch):
    monkeypatch.setattr(VAEPlusPipeline, "from_pretrained", lambda *args, **options: pytest.fail("began to work"))
    code, _, errors = run("sample", PIPE, *flags.split())
    assert code == 2 and errors.startswith("vaeplus: error: ") and errors.count("\n") == 1
    assert (home / "notes.txt").read_text() == "not a picture"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(VAEPlusPipeline, "from_pretrained", lambda *args, **options: pytest.fail("began to work"))
    (tmp_path / "closed").mkdir(mode=0o500)
    for flags in (["--output", "closed/a.png"], ["--separate", "--output", "closed"]):
        code, _, errors = run("sample", PIPE, *flags)
        assert code == 2 and "closed" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("changes", [{"resolution": 48}, {"max_train_samples": 39}])
def test_what_only_the_report_needs_is_refused_before_training(changes, monkeypatch):
    monkeypatch.setattr(stages, "run_stage", lambda options: pytest.fail("began to train"))
    flags = [text for name, value in changes.items() for text in (f"--{name}", str(value))]
    code, _, errors = run(*TRAIN.split(), *flags, "--evaluation_split", "test")
    assert code == 2 and "'test'" in errors


def test_a_hub_that_does_not_answer(monkeypatch):
    def fail(*args, **options):
        raise HTTPError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    code, _, errors = run(*TRAIN.split(), "--dataset_name", "owner/name")
    assert code == 2 and errors.count("\n") == 1
    assert "the Hub did not answer" in errors and "Name or service not known" in errors


@pytest.mark.parametrize("argv", [["--debug", "sample", "/nowhere"], ["sample", "/nowhere", "--debug"]])
def test_debug_shows_the_traceback(argv):
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        run(*argv)


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError):
        run_command(lambda: {}["key"])


def test_an_interrupted_training_says_how_to_go_on(monkeypatch):
    def interrupted(options, images):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "run_stage", interrupted)
    code, _, errors = run(*TRAIN.split())
    assert code == 130
    assert errors.splitlines()[-1].endswith("interrupted; the same command goes on from the newest checkpoint")


def test_divergence_has_its_own_exit_code(working_folder):
    code, _, errors = run(*TRAIN.split(), "--learning_rate", "1e30", "--max_train_steps", "20")
    assert code == 3
    assert re.search("vaeplus: error: step .*not finite.*learning_rate", errors)
    assert [path.name for path in (working_folder / "out/autoencoder").glob("checkpoint-*")]


# -------------------------------------------------------------------------------------------- options of one stage

ROUND_TRIPS = {
    "flags": "--stage autoencoder --dataset_name digits --model hidden_channels=[4,8] latent_dim=6 --use_ema",
    "floats": "--stage vae --learning_rate 1e-5 --adam_epsilon 1e-12 --autoencoder a/b --no-streaming",
    "a preset": "--stage second_stage --config quickstart --vae v --autoencoder a --model hidden_dim=3",
    "nothing but the stage": "--stage autoencoder",
    "a batch of the whole run": "--stage vae --global_batch_size 12 --output_dir here",
    "text that looks like YAML": "--stage vae --split no --train_data_files *.parquet --hub_model_id 1e3",
}


@pytest.mark.parametrize("argv", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_dry_run_prints_a_preset_that_gives_the_same_options(argv, capsys, tmp_path):
    argv = argv.split()
    expected = parse_stage_options("", argv)
    assert parse_stage_options("", [*argv, "--dry_run", "--hub_token", "secret"]) is None
    printed = capsys.readouterr().out
    assert "secret" not in printed
    (tmp_path / "again.yaml").write_text(printed)
    again = parse_stage_options("", ["--stage", expected.stage, "--config", str(tmp_path / "again.yaml")])
    assert again == expected


def test_flags_override_the_preset_and_the_preset_the_defaults(home):
    path = home / "tiny.yaml"
    argv = ["--stage", "vae", "--config", str(path), "--max_train_steps", "7"]
    options = parse_stage_options("", [*argv, "--model", "latent_dim=9", "--model", "num_blocks=2"])
    assert (options.max_train_steps, options.train_batch_size, options.seed) == (7, 8, 0)
    assert options.model == {"latent_dim": 9, "hidden_dim": 8, "num_blocks": 2}


def test_a_stage_must_be_named():
    with pytest.raises(ValueError, match="--stage is missing: choose autoencoder"):
        parse_stage_options("", [])


# ------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory) -> tuple[int, str, Path]:
    """Exit code and standard output of a tiny `vaeplus train`, and its folder."""
    folder = tmp_path_factory.mktemp("trained") / "new" / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAEPLUS_CACHE", str(home / "cache"))
        settings = ["--set", "vae.model.latent_dim=5", "second_stage.max_train_steps=2", "--set", "vae.seed=3"]
        flags = ["--output_dir", str(folder), "--train_batch_size", "4", "--hub_token", "secret"]
        code, output, _ = run("train", "--config", str(home / "tiny.yaml"), *flags, *settings)
    return code, output, folder


def test_train_leaves_what_it_says(trained):
    code, output, folder = trained
    assert code == 0
    named = output.split("saved in")[1].splitlines()[0].split(":")[1].split()
    assert {path.name for path in folder.iterdir()} == {name.strip("/") for name in named} | {*STAGES, ".lock"}
    cell = 2 * SIZE + 1  # small images are drawn twice as large in a report
    sizes = {"samples": (8, 8), "reconstructions": (8, 8), "interpolation": (9, 8)}
    for name, (columns, rows) in sizes.items():
        with Image.open(folder / f"{name}.png") as picture:
            assert (picture.size, picture.mode) == ((columns * cell, rows * cell), "L"), name
    for stage, steps in (("autoencoder", 3), ("vae", 3), ("second_stage", 2)):
        lines = (folder / stage / "stats.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    assert not [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".png" and b"secret" in p.read_bytes()]


def test_settings_override_flags_override_the_preset(trained):
    options = [json.loads((trained[2] / stage / "training_options.json").read_text()) for stage in STAGES]
    assert [each["train_batch_size"] for each in options] == [4, 4, 4]
    assert [each["seed"] for each in options] == [0, 3, 0]
    assert json.loads((trained[2] / "vae" / "config.json").read_text())["latent_dim"] == 5


def test_the_table_says_what_the_summary_says(trained):
    _, output, folder = trained
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["num_images"], summary["images"], summary["num_factors"]) == (40, "digits", None)
    for text in (
        f"squared error per image, autoencoder alone {summary['autoencoder_squared_error']:.2f}",
        f"squared error per image, whole model {summary['squared_error']:.2f}",
        f"first VAE: active units {summary['vae']['active_units_by_variance']} of 5",
        f"second stage: KL, gamma {summary['second_stage']['kl']:.2f} nats, {summary['second_stage']['gamma']:.3g}",
    ):
        assert text in " ".join(output.split())


def test_the_command_that_train_suggests_works(trained, working_folder):
    suggestion = trained[1].split("sample again: ")[1].split()
    assert run(*suggestion[1:], "--batch_size", "7")[0] == 0
    with Image.open(working_folder / "samples.png") as picture:
        assert picture.size == (8 * (SIZE + 1), 8 * (SIZE + 1))


def test_training_three_images_still_ends_in_a_report(working_folder):
    assert run(*TRAIN.split(), "--max_train_samples", "3", "--max_train_steps", "1")[0] == 0
    with Image.open(working_folder / "out/interpolation.png") as picture:
        assert picture.size == (9 * (2 * SIZE + 1), 2 * SIZE + 1)


def test_train_opens_the_pictures_once_and_says_what_it_writes_anew(working_folder, monkeypatch):
    opened, hashed = [], []

    def open_and_count(options, *args):
        opened.append(options.train_data_dir)
        return open_source(options, *args)

    def hash_and_count(file, *args):
        hashed.append(Path(file.name))
        return file_digest(file, *args)

    pictures = working_folder / "pictures"
    pictures.mkdir()
    for seed in range(6):
        (pictures / f"{seed}.png").write_bytes(encoded(noise(seed, SIZE, SIZE)))
    open_source, file_digest = cache.open_source, hashlib.file_digest
    monkeypatch.setattr(cache, "open_source", open_and_count)
    monkeypatch.setattr(hashlib, "file_digest", hash_and_count)
    command = (*TRAIN.split(), "--train_data_dir", "pictures", "--max_train_steps", "1", "--random_flip")
    code, output, _ = run(*command)
    assert code == 0 and "anew" not in output
    assert opened == ["pictures"]  # for three stages and the report
    assert sorted(path.name for path in hashed if path.parent.name == "pictures") == [f"{i}.png" for i in range(6)]
    assert json.loads((working_folder / "out/summary.json").read_text())["num_images"] == 6  # not their mirror images

    code, output, errors = run(*command, "--evaluation_split", "train[:4]", "--json")
    assert code == 0
    written = "samples.png reconstructions.png interpolation.png curves.png summary.json"
    assert f"{written} in out will be written anew.\n" in errors
    assert opened == ["pictures"] * 3  # once more to train on, and once as another split
    summary = json.loads((working_folder / "out/summary.json").read_text())
    assert summary["num_images"] == 4
    assert json.loads(output) == {"files": [f"out/{name}" for name in ("pipeline", *written.split())], **summary}


def test_the_report_on_a_stream_does_not_decode_the_whole_source(monkeypatch):
    counts = []
    monkeypatch.setattr(
        stages, "open_cache", lambda options, *args, **rest: counts.append(options.max_train_samples) or [1, 2]
    )
    monkeypatch.setattr(stages, "train_stages", lambda *args, **rest: pytest.fail("far enough", pytrace=False))
    for flags in ([], ["--max_train_samples", "5000"], ["--max_train_samples", "30"]):
        with pytest.raises(pytest.fail.Exception, match="far enough"):
            run(*TRAIN.split(), "--set", "common.max_train_samples=null", "--streaming", *flags)
    assert counts == [2_000, 2_000, 30]


# ----------------------------------------------------------------------------------------------------- evaluation

EVALUATION = f"{EVAL} --split train[:24] --num_images 12 --ndb_split train[24:] --ndb 2 3 --num_importance_samples 2"


def test_evaluate_prints_a_table_and_writes_the_same_numbers(working_folder):
    code, output, _ = run(*EVALUATION.split(), "--sampler", "prior", "gaussian", "--features", "pixels:4", "pixels:8")
    assert code == 0
    results = json.loads((working_folder / "results.json").read_text())
    protocol = results["protocol"]
    assert results["pipeline"] == PIPE and results["versions"]["torch"] == version("torch")
    assert (protocol["images"], protocol["split"], protocol["num_images"]) == ("digits", "train[:24]", 12)
    assert (protocol["num_channels"], protocol["resolution"]) == (3, SIZE)  # of the pipeline
    assert (protocol["training_split"], protocol["num_training_images"]) == ("train[24:]", 16)
    assert list(results["sets"]) == ["real", "downsample", "autoencoder", "reconstruction", "prior", "gaussian"]
    assert list(results["sets"]["gaussian"]["ndb"]) == ["2", "3"]
    for each in results["sets"].values():
        for distance in each["distances"].values():
            assert f"{distance['frechet']:.4g}" in output
    assert f"{results['likelihood']['nll']:.2f} nats" in output and "saved in results.json" in output


def test_evaluate_looks_for_copies_of_images_in_another_folder(working_folder):
    for folder, seeds in (("unseen", range(6)), ("trained-on", range(4, 14))):
        (working_folder / folder).mkdir()
        for seed in seeds:
            (working_folder / folder / f"{seed}.png").write_bytes(encoded(noise(seed, 40, 40)))
    command = ("evaluate", PIPE, "--train_data_dir", "unseen", "--num_images", "6", "--features", "pixels:8", "--json")
    code, output, _ = run(*command)
    assert code == 0 and json.loads(output)["guard"] is None
    code, output, _ = run(*command, "--training_data_dir", "trained-on", "--num_training_images", "9", "--overwrite")
    results = json.loads(output)
    assert code == 0 and results["protocol"]["num_training_images"] == 9
    assert results["protocol"]["training_split"] == "train"
    for space in ("codes", "pixels:8"):  # two of six are in both folders
        assert results["guard"][space]["copies"] == pytest.approx(1 / 3)
    assert results["sets"]["second_stage"]["memorised_codes"]["limit"] > 0.1


def test_evaluate_prints_json_and_depends_on_the_seed(working_folder):
    code, output, _ = run(*EVALUATION.split(), "--json", "--output", "new/first.json")
    first = json.loads(output)
    assert code == 0 and first == json.loads((working_folder / "new/first.json").read_text())
    assert list(first["sets"])[-1] == "second_stage"
    again, other = (
        json.loads(run(*EVALUATION.split(), "--json", "--seed", seed, "--output", f"{seed}.json")[1]) for seed in "01"
    )
    assert again["sets"] == first["sets"] and again["likelihood"] == first["likelihood"]
    assert other["sets"]["real"] == first["sets"]["real"] and other["squared_error"] == first["squared_error"]
    for name in ("sets", "likelihood", "vae"):
        assert other[name] != first[name]


def test_features_that_need_a_missing_package_are_one_sentence(monkeypatch):
    def missing(spec, device):
        raise ImportError("needs onnxruntime: run `pip install`")

    monkeypatch.setattr("hf_vaeplus.evaluation.features.open_extractor", missing)
    code, _, errors = run(*EVAL.split(), "--features", "net.onnx")
    assert code == 2 and errors == "vaeplus: error: needs onnxruntime: run `pip install`\n"


# ------------------------------------------------------------------------------------------------------ inference


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def test_sample_draws_a_grid_that_depends_on_the_seed_alone(working_folder):
    first, again, other = (working_folder / f"{name}.png" for name in ("first", "again", "other"))
    assert run("sample", PIPE, "--num_images", "5", "--output", str(first)) == (0, f"saved {first}\n", "")
    run("sample", PIPE, "--num_images", "5", "--output", str(again), "--seed", "0", "--batch_size", "2")
    run("sample", PIPE, "--num_images", "5", "--output", str(other), "--seed", "1")
    grid = pixels(first)
    assert grid.shape == (2 * (SIZE + 1), 3 * (SIZE + 1), 3)
    assert np.abs(grid.astype(int) - pixels(again)).max() <= 1  # another batch size sums in another order
    assert np.abs(grid.astype(int) - pixels(other)).max() > 10
    assert (grid[SIZE + 2 :, -SIZE:] == 255).all()  # the sixth place is empty


def test_sample_at_temperature_0_draws_one_image(working_folder):
    run("sample", PIPE, "--num_images", "2", "--temperature", "0", "--output", "cold.png")
    grid = pixels(working_folder / "cold.png")[1:, 1:]
    np.testing.assert_array_equal(grid[:, :SIZE], grid[:, SIZE + 1 :])


@pytest.mark.parametrize("flags, folder", [([], "samples"), (["--output", "new/folder/"], "new/folder")])
def test_separate_files_hold_the_images_of_the_grid(working_folder, flags, folder):
    assert run("sample", PIPE, "--num_images", "3", "--output", "grid.png") == (0, "saved grid.png\n", "")
    said = f"saved 3 pictures in {folder}\n"
    assert run("sample", PIPE, "--num_images", "3", "--separate", *flags) == (0, said, "")
    files = sorted((working_folder / folder).iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    grid = pixels(working_folder / "grid.png")
    for i, file in enumerate(files):
        top, left = 1 + i // 2 * (SIZE + 1), 1 + i % 2 * (SIZE + 1)
        np.testing.assert_array_equal(pixels(file), grid[top : top + SIZE, left : left + SIZE])


def test_a_missing_parent_of_the_output_is_made(working_folder):
    assert run("sample", PIPE, "--num_images", "1", "--output", "a/b/c.PNG")[0] == 0
    assert pixels(working_folder / "a/b/c.PNG").shape == (SIZE + 1, SIZE + 1, 3)


def test_separate_files_are_not_mixed_with_older_ones(working_folder):
    (working_folder / "old").mkdir()
    (working_folder / "old" / "000007.png").write_bytes(b"an older sample")
    code, _, error = run("sample", PIPE, "--num_images", "3", "--separate", "--output", "old")
    assert code == 2 and "old is not empty: name a new folder" in error
    assert [path.name for path in (working_folder / "old").iterdir()] == ["000007.png"]


def test_reconstruct_draws_pairs(working_folder, home):
    saved = "saved reconstructions.png\n"
    assert run("reconstruct", PIPE, *["home/0.png", "home/1.png"] * 3) == (0, saved, "")
    grid = pixels(working_folder / "reconstructions.png")
    assert grid.shape == (2 * (SIZE + 1), 8 * (SIZE + 1), 3)
    with Image.open(home / "0.png") as picture:  # 40 x 50: the centre 40 x 40
        original = picture.crop((0, 5, 40, 45)).resize((SIZE, SIZE), Image.Resampling.BOX)
    np.testing.assert_array_equal(grid[1 : SIZE + 1, 1 : SIZE + 1], np.asarray(original))
    pipe = VAEPlusPipeline.from_pretrained(home / "pipeline")
    reconstruction = np.asarray(pipe.reconstruct(original)[0]).astype(int)
    assert np.abs(grid[1 : SIZE + 1, SIZE + 2 : 2 * SIZE + 2] - reconstruction).max() <= 1


def test_a_crop_is_taken_from_the_centre_of_the_picture(working_folder, home):
    assert run("reconstruct", PIPE, "home/0.png", "--crop", str(SIZE))[0] == 0
    with Image.open(home / "0.png") as picture:  # 40 x 50
        original = np.asarray(picture)[9 : 9 + SIZE, 4 : 4 + SIZE]
    np.testing.assert_array_equal(pixels(working_folder / "reconstructions.png")[1:, 1 : SIZE + 1], original)
    for crop, told in (("0", "--crop must be positive"), ("41", "smaller than crop=41")):
        code, _, error = run("reconstruct", PIPE, "home/0.png", "--crop", crop, "--overwrite")
        assert code == 2 and told in error


def test_reconstruct_takes_folders_and_leaves_out_bad_pictures(working_folder, home, caplog):
    (working_folder / "pictures" / "more").mkdir(parents=True)
    shutil.copy(home / "0.png", working_folder / "pictures" / "more" / "b.png")
    shutil.copy(home / "1.png", working_folder / "pictures" / "a.png")
    (working_folder / "pictures" / "broken.jpg").write_bytes(b"no picture")
    (working_folder / "pictures" / "notes.txt").write_text("not looked at")
    command = ["reconstruct", PIPE, "pictures", "home/0.png", "--json"]
    code, _, errors = run(*command)
    assert code == 2 and "pictures/broken.jpg is not a readable picture" in errors
    code, output, _ = run(*command, "--on_bad_image", "skip")
    assert code == 0 and json.loads(output)["num_images"] == 3
    assert "left out: pictures/broken.jpg is not a readable picture" in caplog.text
    by_name = run("reconstruct", PIPE, "home/1.png", "home/0.png", "home/0.png", "--output", "named.png")
    assert by_name[0] == 0
    np.testing.assert_array_equal(pixels(working_folder / "reconstructions.png"), pixels(working_folder / "named.png"))


def test_interpolate_draws_a_row_from_one_reconstruction_to_the_other(working_folder):
    saved = "saved interpolation.png\n"
    assert run("interpolate", PIPE, "home/0.png", "home/1.png", "--steps", "4") == (0, saved, "")
    row = pixels(working_folder / "interpolation.png")
    assert row.shape == (SIZE + 1, 4 * (SIZE + 1), 3)
    run("reconstruct", PIPE, "home/0.png", "home/1.png")
    pairs = pixels(working_folder / "reconstructions.png").astype(int)
    for place, partner in ((0, 1), (3, 3)):
        columns, wanted = (slice(k * (SIZE + 1), (k + 1) * (SIZE + 1)) for k in (place, partner))
        assert np.abs(row[:, columns] - pairs[:, wanted]).max() <= 1


# ---------------------------------------------------------------------------------------------------- as a process


def process(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=300)


def test_what_needs_no_network_imports_no_library():
    """Help, version, completion and usage errors; all in one process, which has imported nothing else."""
    program = """
import contextlib, io, sys
from hf_vaeplus.cli.main import main
for command, expected in {
    "--help": 0, "--version": 0, "train --help": 0, "evaluate --help": 0, "completion bash": 0, "completion zsh": 0,
    "": 2, "trian": 2, "sample": 2, "sample pipeline --num-image 3": 2, "train --config quickstart --seed one": 2,
}.items():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(command.split())
        except SystemExit as stop:
            code = stop.code
    assert code == expected, command
    heavy = {"torch", "transformers", "diffusers", "accelerate", "datasets", "numpy", "PIL"} & sys.modules.keys()
    assert not heavy, (command, heavy)
"""
    found = process("-c", program)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("module", ["hf_vaeplus.cli.flags", "torch", "transformers.modeling_utils", "diffusers"])
def test_ctrl_c_during_an_import_ends_with_one_sentence(module, working_folder):
    program = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background would ignore it
def interrupt(event, details):
    if event == "import" and details[0] == {module!r}:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
from hf_vaeplus.cli.main import main
sys.exit(main())
"""
    found = process("-c", program, "sample", PIPE)
    assert (found.returncode, found.stdout) == (130, "")
    assert found.stderr == "vaeplus: error: interrupted; nothing was written\n"
    assert not (working_folder / "samples.png").exists()


def test_an_interruption_says_what_was_written_before(monkeypatch):
    def save(image, path, save=Image.Image.save):
        if path.name.endswith("000002.png"):
            raise KeyboardInterrupt
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", save)
    code, _, errors = run("sample", PIPE, "--num_images", "3", "--separate")
    assert code == 130
    assert errors.endswith("interrupted; files written before that: 2, the last is samples/000001.png\n")


def test_quiet_ends_with_the_command():
    assert run("sample", "nowhere", "--quiet")[0] == 2
    assert logging.getLogger("hf_vaeplus").isEnabledFor(logging.WARNING)


def test_quiet_leaves_results_alone(working_folder, home):
    quiet = process("-m", "hf_vaeplus.cli", *f"{EVAL} --num-images 8 --quiet".split())
    assert quiet.returncode == 0 and "saved in results.json" in quiet.stdout
    assert quiet.stderr == ""


def test_tqdm_disable_wins_over_the_choice_of_a_process(monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert list(tqdm(range(3), disable=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("TQDM_DISABLE")
    assert list(tqdm(range(3), disable=False)) == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err


def test_a_mistake_in_a_process_of_its_own():
    found = process("-m", "hf_vaeplus.cli", "sample", "/nowhere")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("vaeplus: error: /nowhere is not") and found.stderr.count("\n") == 1


def example(monkeypatch, *argv: str, script: Path = TRAIN_STAGE) -> int:
    """Exit code of an example, run in this process."""
    monkeypatch.setattr(sys, "argv", [str(script), *argv])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    return stop.value.code


def test_the_example_trains_a_stage_and_says_how_to_resume(working_folder, monkeypatch, capsys):
    argv = ["--stage", "autoencoder", "--config", "home/tiny.yaml", "--output_dir", "run"]
    assert example(monkeypatch, *argv) == 0
    model = VAEPlusAutoencoderModel.from_pretrained(working_folder / "run")
    assert (model.config.latent_dim, model.config.num_channels) == (6, 1)
    assert len((working_folder / "run" / "stats.jsonl").read_text().splitlines()) == 3

    capsys.readouterr()
    assert example(monkeypatch, *argv) == 2
    assert "--resume_from_checkpoint latest" in capsys.readouterr().err.splitlines()[-1]
    assert example(monkeypatch, *argv, "--resume_from_checkpoint", "latest", "--max_train_steps", "4") == 0
    assert len((working_folder / "run" / "stats.jsonl").read_text().splitlines()) == 4


def test_the_examples_help_shows_its_commands(monkeypatch, capsys):
    assert example(monkeypatch, "--help") == 0
    output = capsys.readouterr().out
    assert all(f"train_stage.py --stage {stage}" in output for stage in STAGES)


def test_the_example_of_evaluation_takes_the_options_of_the_command(working_folder, monkeypatch, capsys):
    argv = [*shlex.split(EVALUATION)[1:], "--output", "from_example.json"]
    assert example(monkeypatch, *argv, script=EVALUATE) == 0
    assert (working_folder / "from_example.json").is_file()
    capsys.readouterr()
    assert example(monkeypatch, "/nowhere", script=EVALUATE) == 2
    assert capsys.readouterr().err.startswith("vaeplus: error: /nowhere is not a saved pipeline")


def test_a_mistake_in_the_example_gives_one_sentence(monkeypatch, capsys):
    assert example(monkeypatch, "--stage", "vae", "--lerning_rate", "3") == 2
    assert example(monkeypatch, "--config", "quickstart") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("vaeplus: error: ") for line in lines)
