"""A run knows what it was made from: stages that no longer fit, content that lies elsewhere, records and weights."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import (
    TINY,
    Killed,
    contents,
    encoded,
    fit,
    killed_at,
    make_pipeline,
    make_vae,
    noise,
    parquet,
    perturbed,
    resume,
    run,
    run_script,
    tree,
)
from loopback_hub import TOKEN
from safetensors.torch import load_file, save_file

from hf_vaeplus import VAEPlusPipeline, VAEPlusVAEModel
from hf_vaeplus.fields import from_home
from hf_vaeplus.hub.client import BackgroundPush
from hf_vaeplus.hub.repository import export
from hf_vaeplus.provenance import folder_fingerprint
from hf_vaeplus.training.checkpoints import save_model
from hf_vaeplus.training.options import STAGES, stage_options
from hf_vaeplus.training.stages import open_images

ROOT = Path(__file__).parents[1]
OPTIONS = {"dataset_name": None, "max_train_samples": None, "max_train_steps": 2}
PRESET = {**TINY, "common": {**TINY["common"], **OPTIONS}}
RETRAIN = r"add --retrain to train (it|\w+) anew"


def make_pictures(folder: Path, first: int = 0, count: int = 12):
    """Bitmaps of noise, all of one size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:02}.bmp").write_bytes(encoded(noise(first + i, 32), "bmp"))


@pytest.fixture(scope="module", autouse=True)
def no_curves():
    """Curves are no matter here, and drawing them takes longer than all the rest of a run."""
    with pytest.MonkeyPatch.context() as patch:
        draw = lambda folders, path, num_factors: path.write_bytes(encoded(noise(0)))  # noqa: E731
        patch.setattr("hf_vaeplus.evaluation.summaries.plot_curves", draw)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with pictures, the same in two parquet files, a finished run, and one of a longer autoencoder."""
    home = tmp_path_factory.mktemp("made")
    (home / "tiny.yaml").write_text(yaml.safe_dump(PRESET))
    make_pictures(home / "pics")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("VAEPLUS_CACHE", str(home / "cache"))
        patch.setattr("sys.argv", ["vaeplus", "train", "the first time"])
        assert train() == (0, "")
        assert train("--set", "autoencoder.max_train_steps=3", "--output_dir", "other") == (0, "")
    return home


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A copy of it, in which commands run; the pictures keep their times."""
    shutil.copytree(made, tmp_path / "home", ignore=shutil.ignore_patterns("cache"))
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("VAEPLUS_CACHE", str(made / "cache"))
    return tmp_path / "home"


def train(*words: str) -> tuple[int, str]:
    """`(exit code, last line of the errors)` of `vaeplus train` on the pictures; later words replace earlier ones."""
    usual = ["--config", "tiny.yaml", "--output_dir", "run"]
    if not any(word.startswith("--train_data") for word in words):
        usual += ["--train_data_dir", "pics"]
    code, _, errors = run("train", *usual, *words)
    return code, "" if code == 0 else errors.splitlines()[-1]


def train_stage(stage: str, *words: str) -> tuple[int, str]:
    """The same of `examples/train_stage.py` on the pictures, resumed."""
    code, _, errors = run_script(
        ROOT / "examples" / "train_stage.py", "--config", "tiny.yaml", "--stage", stage, "--train_data_dir", "pics",
        "--resume_from_checkpoint", "latest", *words,
    )  # fmt: skip
    return code, (errors.strip().splitlines() or [""])[-1]


def edit(folder: Path):
    """Other weights in place of those of a model."""
    weights = load_file(folder / "model.safetensors")
    weights = {name: value + 0.1 if value.is_floating_point() else value for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def assert_fits(folder: Path):
    """Each stage was trained on those beside it, and the pipeline holds these and no others."""
    weights = {stage: folder_fingerprint(folder / stage) for stage in STAGES}
    for stage in STAGES:
        record = json.loads((folder / stage / "training_options.json").read_text())
        earlier = {name: weights[name] for name in STAGES[: STAGES.index(stage)]}
        assert record["made_from"] == {"images": record["made_from"]["images"], **earlier}
        assert record["weights"] == weights[stage] == folder_fingerprint(folder / "pipeline" / stage)


# --------------------------------------------------------------------------------------------- stale derivatives


def other_pictures(place):
    make_pictures(place / "pics", first=100)


def one_more_picture(place):
    make_pictures(place / "pics", count=13)


def two_pictures_swapped(place):
    for old, new in (("03", "aside"), ("07", "03"), ("aside", "07")):
        os.replace(place / "pics" / f"{old}.bmp", place / "pics" / f"{new}.bmp")


def copied(stage):
    def change(place):
        shutil.rmtree(place / "run" / stage)
        shutil.copytree(place / "other" / stage, place / "run" / stage)

    return change


def without_checkpoints(stage):
    def change(place):
        for checkpoint in (place / "run" / stage).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        edit(place / "run" / stage)

    return change


@pytest.mark.parametrize(
    "change, words, told, retrains",
    [
        (
            None,
            ["--set", "autoencoder.max_train_steps=4"],
            "autoencoder is to be trained to 4 steps, and run/vae",
            True,
        ),
        (None, ["--set", "vae.max_train_steps=3"], "vae is to be trained to 3 steps, and run/second_stage was", False),
        (None, ["--max_train_steps", "4"], "autoencoder is to be trained to 4 steps, and run/vae was", False),
        (other_pictures, [], "run/autoencoder was trained on other images than", False),
        (one_more_picture, [], "run/autoencoder was trained on other images than", False),
        (two_pictures_swapped, [], "run/autoencoder was trained on other images than", False),
        (copied("autoencoder"), [], "run/vae was trained on another autoencoder than", False),
        (copied("vae"), [], "run/vae was trained on another autoencoder than", True),
        (copied("second_stage"), [], "run/second_stage was trained on another autoencoder and another first", False),
        (without_checkpoints("vae"), [], "vae is to be trained from its start, and run/second_stage was", False),
    ],
)
def test_what_no_longer_fits_is_refused_or_retrained(place, change, words, told, retrains):
    if change:
        change(place)
    before = tree(place / "run")
    code, error = train(*words)
    assert code == 2 and error.startswith(f"vaeplus: error: {told}") and re.search(RETRAIN, error), error
    assert tree(place / "run") == before
    if retrains:
        assert train(*words, "--retrain") == (0, "")
        assert_fits(place / "run")


def test_a_retrained_run_is_a_fresh_run(place):
    other_pictures(place)
    assert train("--retrain") == train("--output_dir", "fresh") == (0, "")
    assert_fits(place / "run")
    for stage in STAGES:
        assert contents(place / "run" / stage) == contents(place / "fresh" / stage)


@pytest.mark.parametrize("stage", ["autoencoder", "second_stage"])
def test_edited_weights_never_reach_the_pipeline_beside_others(place, made, caplog, stage):
    edit(place / "run" / stage)
    assert train() == (0, "")
    assert f"run/{stage} holds other weights than its run saved: the run replaces them" in caplog.text
    assert_fits(place / "run")
    for each in STAGES:
        assert contents(place / "run" / each) == contents(made / "run" / each)


@pytest.mark.parametrize(
    "stage, change, earlier, told, retrains",
    [
        ("vae", lambda place: edit(place / "run/autoencoder"), ["run/autoencoder"], "another autoencoder", True),
        ("vae", lambda place: None, ["other/autoencoder"], "another autoencoder", False),
        ("vae", other_pictures, ["run/autoencoder"], "other images", False),
        ("second_stage", lambda place: edit(place / "run/vae"), ["run/autoencoder", "run/vae"], "another first", True),
        ("second_stage", copied("vae"), ["other/autoencoder", "run/vae"], "another autoencoder and another", False),
    ],
)
def test_a_single_stage_whose_inputs_have_changed(place, stage, change, earlier, told, retrains):
    change(place)
    words = [word for pair in zip(("--autoencoder", "--vae"), earlier, strict=False) for word in pair]
    words += ["--output_dir", f"run/{stage}"]
    before = tree(place / "run")
    code, error = train_stage(stage, *words)
    assert code == 2 and told in error and re.search(RETRAIN, error), error
    assert tree(place / "run") == before
    if not retrains:
        return
    assert train_stage(stage, *words, "--retrain")[0] == 0
    record = json.loads((place / "run" / stage / "training_options.json").read_text())
    known = [record["made_from"][name] for name in ("autoencoder", "vae") if name in record["made_from"]]
    assert known == [folder_fingerprint(each) for each in earlier]


@pytest.mark.parametrize("autoencoder, vae", [("other/autoencoder", "run/vae"), ("run/autoencoder", "other/vae")])
def test_a_second_stage_takes_no_first_vae_of_another_autoencoder(place, autoencoder, vae):
    words = ["--autoencoder", autoencoder, "--vae", vae, "--output_dir", "new"]
    code, error = train_stage("second_stage", *words)
    assert code == 2 and f"{vae} was trained on another autoencoder than {autoencoder}" in error
    assert not (place / "new" / "model.safetensors").exists()


@pytest.mark.parametrize("failing", ["vae", "second_stage"])
def test_a_save_that_breaks_off_leaves_no_pipeline_of_old_and_new_stages(tmp_path, monkeypatch, failing):
    make_pipeline().save_pretrained(tmp_path)
    pipe, save = make_pipeline(), VAEPlusVAEModel.save_pretrained
    perturbed(pipe.autoencoder)

    def fail(model, folder, *args, **options):
        if Path(folder).name == failing:
            raise Killed
        save(model, folder, *args, **options)

    monkeypatch.setattr(VAEPlusVAEModel, "save_pretrained", fail)
    with pytest.raises(Killed):
        pipe.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="model_index.json"):
        VAEPlusPipeline.from_pretrained(tmp_path)


def test_the_pipeline_on_the_hub_is_withdrawn_while_its_stages_change(hub):
    pipe = make_pipeline()
    pipe.push_to_hub("org/model", token=TOKEN)
    BackgroundPush("org/model", "vae", token=TOKEN, is_new=False).finish(pipe.vae.save_pretrained, "the same")
    assert {"model_index.json", "config.json"} <= hub["org/model"].files().keys()
    BackgroundPush("org/model", "vae", token=TOKEN).finish(perturbed(pipe.vae).save_pretrained, "step 1")
    assert not {"model_index.json", "config.json"} & hub["org/model"].files().keys()
    pipe.push_to_hub("org/model", token=TOKEN)
    assert {"model_index.json", "config.json"} <= hub["org/model"].files().keys()


# -------------------------------------------------------------------------------------------- identity by content


def fingerprint(**source) -> str:
    """Of the images that the first VAE of the preset would be trained on."""
    return open_images(stage_options("vae", PRESET, autoencoder="run/autoencoder", **source)).fingerprint


def trained_on(folder: Path) -> str:
    return json.loads((folder / "vae" / "training_options.json").read_text())["made_from"]["images"]


def moved_pictures(place):
    os.replace(place / "pics", place / "elsewhere")
    return "elsewhere"


def linked_pictures(place):
    (place / "link").symlink_to("pics")
    return "link/../link"


def copied_pictures(place):
    shutil.copytree(place / "pics", place / "copy")  # with other times
    for path in (place / "copy").iterdir():
        os.utime(path, ns=(0, 0))
    return "copy/"


def renamed_pictures(place):
    for path in (place / "pics").iterdir():
        path.rename(path.with_name(f"face {path.name}"))
    return "pics"


def pictures_below(place):
    os.replace(place / "pics", place / "below")
    (place / "pics").mkdir()
    os.replace(place / "below", place / "pics" / "train")
    return "pics"


def other_working_folder(place):
    os.chdir(place / "other")
    return "../pics"


@pytest.mark.parametrize(
    "spelling",
    [
        lambda place: "./pics", lambda place: "pics/", lambda place: "run/../pics//.", lambda place: "~/pics",
        lambda place: place / "pics", moved_pictures, linked_pictures, copied_pictures, renamed_pictures,
        pictures_below, other_working_folder,
    ],
)  # fmt: skip
def test_the_same_pictures_are_the_same_wherever_they_lie(place, monkeypatch, spelling):
    monkeypatch.setenv("HOME", str(place))
    folder = from_home(spelling(place))
    assert fingerprint(train_data_dir=folder) == trained_on(place / "run")


def test_the_same_tables_are_the_same_however_they_are_named(place):
    def make_tables(first):
        for name in "ab":
            rows = [encoded(noise(first + i + ord(name), 32), "bmp") for i in range(6)]
            (place / "tables" / f"{name}.parquet").write_bytes(parquet(image=rows))

    (place / "tables").mkdir()
    make_tables(0)
    first = fingerprint(train_data_files="tables/*.parquet")
    files = [str(place / "tables" / name) for name in ("a.parquet", "b.parquet")]
    for spelling in ("./tables/[ab].parquet", str(place / "tables" / "*"), "table?/**/*.parquet", files):
        assert fingerprint(train_data_files=spelling) == first
    assert fingerprint(train_data_dir="tables") == first
    os.replace(place / "tables", place / "moved")
    os.replace(place / "moved" / "a.parquet", place / "moved" / "0.parquet")
    assert fingerprint(train_data_files="moved/*.parquet") == first
    assert fingerprint(train_data_files=["moved/b.parquet", "moved/0.parquet"]) != first  # other rows come first
    os.replace(place / "moved", place / "tables")
    os.unlink(place / "tables" / "0.parquet")
    make_tables(50)
    assert fingerprint(train_data_files="tables/*.parquet") != first


def elsewhere(place):
    os.replace(place / "run", place / "moved")
    (place / "deep").mkdir()
    os.replace(place / "pics", place / "deep" / "other name")
    return "moved", ["--output_dir", "moved", "--train_data_dir", "deep/other name"]


def from_another_folder(place):
    (place / "other" / "link").symlink_to(place / "pics")
    os.chdir(place / "other")
    return "run", ["--config", "../tiny.yaml", "--output_dir", "../run", "--train_data_dir", "link"]


@pytest.mark.parametrize("change", [elsewhere, from_another_folder])
def test_a_run_goes_on_bit_for_bit_wherever_it_lies(place, made, monkeypatch, change):
    def killed(run):
        raise Killed

    shutil.rmtree(place / "run" / "vae")
    shutil.rmtree(place / "run" / "second_stage")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("hf_vaeplus.training.loop._Run.push", killed)  # what follows the first checkpoint
        train("--checkpointing_steps", "1")
    folder, words = change(place)
    assert [path.name for path in (place / folder / "vae").glob("checkpoint-*")] == ["checkpoint-1"]
    assert train(*words) == (0, "")
    for stage in STAGES:
        found = contents(place / folder / stage)
        assert {name: each for name, each in found.items() if not name.startswith("checkpoint-1/")} == (
            contents(made / "run" / stage)
        )


@pytest.mark.parametrize("kept", ["size", "size and time"])
def test_replaced_pictures_are_noticed(place, kept):
    picture = place / "pics" / "05.bmp"
    stat = picture.stat()
    picture.write_bytes(encoded(noise(77, 32), "bmp"))
    assert picture.stat().st_size == stat.st_size
    if kept == "size and time":
        os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    code, error = train()
    assert code == 2 and "run/autoencoder was trained on other images than what is there now" in error


# ------------------------------------------------------------------------------------- records, cards, evaluations


def test_evaluations_tell_content_from_names(place):
    def evaluated(*words):
        found = run("evaluate", "run/pipeline", "--num_images", "4", "--output", "results.json", "--overwrite", *words)
        assert found[0] == 0, found
        return json.loads((place / "results.json").read_text())

    shutil.copytree(place / "pics", place / "copy")
    first, copy = evaluated("--train_data_dir", "pics"), evaluated("--train_data_dir", "./copy/")
    assert first["protocol"] == copy["protocol"] | {name: first["protocol"][name] for name in ("images", "real")}
    assert first["protocol"]["fingerprint"] == trained_on(place / "run")
    assert first["weights"] == {stage: folder_fingerprint(place / "run" / stage) for stage in STAGES}
    other_pictures(place)
    assert evaluated("--train_data_dir", "pics")["protocol"]["fingerprint"] != trained_on(place / "run")


@pytest.fixture
def card(place):
    """`(exit code, last line of the errors, text)` of `vaeplus card` for the run."""

    def card(*words: str) -> tuple[int, str, str]:
        code, _, errors = run("card", "run", "org/model", "--data_license", "CC0", *words)
        readme = place / "run" / "pipeline" / "README.md"
        return code, (errors.splitlines() or [""])[-1], readme.read_text() if readme.exists() else ""

    return card


def test_a_card_says_which_images_and_weights_it_is_of(place, card):
    code, error, text = card()
    record = json.loads((place / "run/vae/training_options.json").read_text())
    assert (code, error) == (0, "") and text.count("These are the images that the model was trained on.") == 1
    for known in (record["made_from"]["images"], *map(folder_fingerprint, (place / "run" / s for s in STAGES))):
        assert f"`{known}`" in text
    other_pictures(place)
    measured = ["--train_data_dir", "pics", "--num_images", "4", "--output", "results.json"]
    assert run("evaluate", "run/pipeline", *measured)[0] == 0
    assert "These are not the images that the model was trained on" in card("--evaluation", "results.json")[2]


def stale_evaluation(place):
    measured = ["--train_data_dir", "pics", "--num_images", "4", "--output", "results.json"]
    assert run("evaluate", "other/pipeline", *measured)[0] == 0
    return ["--evaluation", "results.json"]


def stale_summary(place):
    shutil.copy(place / "other" / "summary.json", place / "run")
    return []


def stale_pipeline(place):
    for stage in STAGES:
        copied(stage)(place)
    return []


def changed_stage(place):
    edit(place / "run" / "second_stage")
    return []


def foreign_stage(place):
    copied("vae")(place)
    return []


@pytest.mark.parametrize(
    "change, told",
    [
        (stale_evaluation, "the evaluation was measured on other weights than those of run"),
        (stale_summary, "run/summary.json was measured on other weights than those beside it"),
        (stale_pipeline, "run/pipeline/autoencoder holds other weights than run/autoencoder"),
        (changed_stage, "run/second_stage holds other weights than its run saved"),
        (foreign_stage, "run/vae was trained on other stages than those beside it"),
    ],
)
def test_no_card_is_made_of_what_does_not_belong_together(place, card, change, told):
    code, error, text = card(*change(place))
    assert code == 2 and error.startswith(f"vaeplus: error: {told}") and not text


def test_no_card_goes_to_the_hub_with_other_weights(place, card, hub):
    assert card()[0] == 0
    assert train("--set", "second_stage.max_train_steps=3")[0] == 0
    stale = "run/pipeline/README.md tells of other weights than those beside it: write it again"
    for words in (["push", "run/pipeline", "org/model"], ["export", "run/pipeline", "exported"]):
        code, _, errors = run(*words)
        assert code == 2 and stale in errors
    assert "org/model" not in hub.repositories and not (place / "exported").exists()
    assert card()[0] == 0
    assert run("export", "run/pipeline", "exported", "--weights", "bf16")[0] == 0
    for source in ("run/pipeline", "exported"):
        assert run("push", source, "org/model")[0] == 0


def test_fewer_steps_change_no_record(place, card, monkeypatch):
    before = tree(place / "run")
    monkeypatch.setattr("sys.argv", ["vaeplus", "train", "--max_train_steps", "1"])
    assert train("--max_train_steps", "1", "--set", "vae.learning_rate=0.1") == (0, "")
    after = tree(place / "run")
    assert {name for name in after if after[name] != before.get(name)} == {"summary.json"}
    assert "Command: `vaeplus train the first time`" in card()[2]


@pytest.mark.parametrize("steps", [3, 5])
def test_an_interrupted_longer_run_keeps_the_record_of_the_model_that_is_there(tmp_path, steps):
    fit(tmp_path, max_train_steps=2)
    model, record = ((tmp_path / name).read_bytes() for name in ("model.safetensors", "training_options.json"))
    with pytest.raises(Killed):
        resume(tmp_path, max_train_steps=8, checkpointing_steps=1, prepare=killed_at(steps))
    assert (tmp_path / "model.safetensors").read_bytes() == model
    assert (tmp_path / "training_options.json").read_bytes() == record
    resume(tmp_path, max_train_steps=2)  # the model of these steps is there
    assert (tmp_path / "training_options.json").read_bytes() == record
    resume(tmp_path, max_train_steps=8, checkpointing_steps=1)
    after = json.loads((tmp_path / "training_options.json").read_text())
    assert after["max_train_steps"] == 8 and after["weights"] == folder_fingerprint(tmp_path)


# ------------------------------------------------------------------------------------ one form of weights, not two


def saved_model(folder, shards, variant=None):
    make_vae(seed=len(list(folder.rglob("*")))).save_pretrained(
        folder, max_shard_size="1KB" if shards else "1GB", variant=variant
    )


def saved_by_a_run(folder, shards):
    model = make_vae(seed=len(list(folder.rglob("*"))))
    if shards:
        whole = model.save_pretrained
        model.save_pretrained = lambda folder: whole(folder, max_shard_size="1KB")
    save_model(model, folder)


def saved_pipeline(folder, shards):
    make_pipeline().save_pretrained(folder, max_shard_size="1KB" if shards else "1GB")


def saved_export(folder, shards):
    pipe = make_pipeline()
    if shards:
        whole = pipe.save_pretrained
        pipe.save_pretrained = lambda folder, variant: whole(folder, variant=variant, max_shard_size="1KB")
    export(pipe, folder)


def assert_one_form(names):
    """Of each model among these files there is the one file, or an index and the shards."""
    whole = {name.rpartition("/")[0] for name in names if name.endswith("model.safetensors")}
    index = {name.rpartition("/")[0] for name in names if name.endswith("model.safetensors.index.json")}
    shards = {name.rpartition("/")[0] for name in names if "-of-" in name}
    totals = {place: {name[-17:] for name in names if "-of-" in name and name.startswith(place)} for place in shards}
    assert whole | index and not whole & shards and index == shards
    assert all(len(each) == 1 for each in totals.values()), totals


@pytest.mark.parametrize("save", [saved_model, saved_by_a_run, saved_pipeline, saved_export])
def test_shards_and_one_file_never_lie_side_by_side(tmp_path, save):
    for shards in (False, True, True, False):
        save(tmp_path, shards)
        names = tree(tmp_path).keys()
        assert_one_form(names)
        assert any("-of-" in name for name in names) is shards


def test_a_variant_replaces_its_own_weights_alone(tmp_path):
    saved_model(tmp_path, False)
    for shards in (True, False, True):
        saved_model(tmp_path, shards, "ema")
        assert (tmp_path / "model.safetensors").exists()
        assert (tmp_path / "model.ema.safetensors").exists() is not shards
        assert (tmp_path / "model.safetensors.index.ema.json").exists() is shards


@pytest.mark.parametrize("first", [False, True])
def test_neither_do_they_on_the_hub(hub, tmp_path, first):
    for shards in (first, not first):
        push = BackgroundPush("org/model", "stages/vae", token=TOKEN)
        assert push.finish(lambda folder, shards=shards: saved_model(folder, shards), "end")
        assert_one_form(hub["org/model"].files())
    pipe = make_pipeline()
    pipe.push_to_hub("org/pipe", token=TOKEN)
    pipe.push_to_hub("org/pipe", token=TOKEN, variant="bf16")
    whole = pipe.save_pretrained
    pipe.save_pretrained = lambda folder, variant: whole(folder, variant=variant, max_shard_size="1KB")
    pipe.push_to_hub("org/pipe", token=TOKEN)
    names = hub["org/pipe"].files().keys()
    assert_one_form({name for name in names if "bf16" not in name})
    assert "vae/model.bf16.safetensors" in names and "vae/model-00001-of-00002.safetensors" not in names


def test_the_model_that_is_read_is_the_one_that_was_saved_last(tmp_path):
    for seed, size in ((0, "1GB"), (1, "1KB"), (2, "2KB"), (3, "1GB")):
        model = make_vae(seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
        read = VAEPlusVAEModel.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(value, read[name]) for name, value in model.state_dict().items())
