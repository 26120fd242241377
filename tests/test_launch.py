"""What a launcher says and where a run takes place; a batch of the whole run, however it is shared out."""

import json
import os
from contextlib import suppress
from types import SimpleNamespace

import pytest
import yaml
from accelerate.utils import DistributedType
from helpers import TINY, Killed, Launched, contents, fit, killed_at, make_vae, run, stats_of
from safetensors.torch import load_file

from hf_vaeplus.training import launch, stages
from hf_vaeplus.training.options import STAGES, StageOptions, TrainingOptions, stage_options, with_own_batch

# ---------------------------------------------------------------------------------------- a batch of the whole run

# Steps like those of SGD, whose errors are not blown up, and a schedule that looks ahead to the end.
WHOLE = dict(
    global_batch_size=8, learning_rate=0.1, adam_epsilon=1.0, logging_steps=3, checkpointing_steps=2,
    checkpoints_total_limit=9,
)  # fmt: skip


def part_of_a_run(folder: str, stop: int, gamma: str, passes: int):
    """Go on until step `stop`, and end there as if killed."""
    options = dict(gradient_accumulation_steps=passes, resume_from_checkpoint="latest", **WHOLE)
    with suppress(Killed):
        fit(folder, make_vae(gamma=gamma), prepare=killed_at(stop), **options)


def assert_same_run(folder, reference):
    """Equal but for the order of floating-point sums."""
    for line, wanted in zip(stats_of(folder), stats_of(reference), strict=True):
        line.pop("active_units"), wanted.pop("active_units")  # a count over the rows of one process
        assert line == pytest.approx(wanted, rel=1e-5)
    for file in ("checkpoint-8/ema/model.safetensors", "checkpoint-8/optimizer.safetensors"):
        found, wanted = load_file(folder / file), load_file(reference / file)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert (found[name] - tensor).double().norm() <= 1e-5 * tensor.double().norm() + 1e-8, f"{file}: {name}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """Uninterrupted runs of one process, by their gamma."""
    folders = {gamma: tmp_path_factory.mktemp("whole") / gamma for gamma in ("analytic", "learned")}
    for gamma, folder in folders.items():
        fit(folder, make_vae(gamma=gamma), **WHOLE)
    return folders


# Processes, forward passes per step, and the step that the part goes to.
PARTS = {
    "analytic": [(1, 1, 2), (2, 1, 4), (4, 1, 6), (1, 1, 8)],
    "learned": [(1, 4, 2), (2, 2, 5), (1, 1, 8)],
}


@pytest.mark.parametrize("gamma", PARTS)
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, whole, gamma):
    folder = tmp_path / "run"
    for num_processes, passes, stop in PARTS[gamma]:
        if num_processes == 1:
            part_of_a_run(str(folder), stop, gamma, passes)
        else:
            group = Launched(num_processes, tmp_path / "log", {}, part_of_a_run, str(folder), stop, gamma, passes)
            try:
                assert group.ended_within(120)
            finally:
                group.kill()
        recorded = json.loads((folder / "training_options.json").read_text())
        share = 8 // (num_processes * passes)
        assert (recorded["num_processes"], recorded["train_batch_size"]) == (num_processes, share)
    assert_same_run(folder, whole[gamma])


def test_one_process_with_the_whole_batch_is_the_same_run_bit_for_bit(tmp_path, whole):
    options = WHOLE | dict(global_batch_size=None, train_batch_size=8)
    fit(tmp_path, make_vae(gamma="learned"), **options)
    runs = [contents(folder) for folder in (tmp_path, whole["learned"])]
    for files in runs:  # the checksums cover the options, which name the batch in two ways
        for name in [name for name in files if name.endswith("checksums.json")]:
            del files[name]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("passes", [2, 4])
def test_forward_passes_share_the_rows_and_the_noise_of_a_step(tmp_path, whole, passes):
    fit(tmp_path, make_vae(gamma="learned"), gradient_accumulation_steps=passes, **WHOLE)
    assert_same_run(tmp_path, whole["learned"])


@pytest.mark.parametrize(
    "before, after, told",
    [
        ({"train_batch_size": 8}, {"global_batch_size": 8}, None),
        ({"global_batch_size": 8}, {"global_batch_size": 8, "gradient_accumulation_steps": 2}, "accumulation_steps 1"),
        ({"global_batch_size": 8}, {"global_batch_size": 16}, "global_batch_size 8 -> 16"),
        ({"global_batch_size": 8}, {"train_batch_size": 8}, "global_batch_size 8 -> None"),
        ({"train_batch_size": 4}, {"global_batch_size": 8}, "global_batch_size 4 -> 8"),
        ({"train_batch_size": 4, "gradient_accumulation_steps": 2}, {"global_batch_size": 8}, "accumulation_steps 2"),
    ],
)
def test_what_a_run_may_go_on_with(tmp_path, before, after, told):
    """Its gamma is analytic, so each forward pass moves it."""
    fit(tmp_path, max_train_steps=2, **before)
    if told is None:
        fit(tmp_path, max_train_steps=3, resume_from_checkpoint="latest", **after)
    else:
        with pytest.raises(ValueError, match=f"other options .*{told}"):
            fit(tmp_path, max_train_steps=3, resume_from_checkpoint="latest", **after)


@pytest.mark.parametrize(
    "options, num_processes, told",
    [
        (TrainingOptions(global_batch_size=8), 3, "8 cannot be split evenly over 3 parts .*: choose 6 or 9, or"),
        (TrainingOptions(global_batch_size=2, gradient_accumulation_steps=2), 2, "over 4 parts .*: choose 4, or"),
        (StageOptions(stage="vae", mmd_weight=1, global_batch_size=8), 2, "mmd_weight compares all .* into 2 parts"),
        (
            StageOptions(stage="vae", mmd_weight=1, global_batch_size=8, gradient_accumulation_steps=4),
            1,
            "mmd_weight compares all .* into 4 parts",
        ),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused(options, num_processes, told):
    with pytest.raises(ValueError, match=told):
        with_own_batch(options, num_processes)


@pytest.mark.parametrize(
    "preset, flags, expected",
    [
        ({"vae": {"global_batch_size": 6}}, {}, (6, 64)),
        ({"vae": {"global_batch_size": 6}}, {"train_batch_size": 3}, (None, 3)),
        ({"common": {"train_batch_size": 6}}, {"global_batch_size": 3}, (3, 64)),
        ({"common": {"train_batch_size": 6}, "vae": {"global_batch_size": 5}}, {}, (5, 64)),
        ({"common": {"global_batch_size": 6}, "vae": {"train_batch_size": 5}}, {}, (None, 5)),
    ],
)
def test_a_batch_of_one_kind_takes_the_place_of_the_other(preset, flags, expected):
    options = stage_options("vae", preset, **flags)
    assert (options.global_batch_size, options.train_batch_size) == expected


@pytest.mark.parametrize("preset", [{}, {"common": {"train_batch_size": 4, "global_batch_size": 8}}])
def test_both_kinds_at_once_are_refused(preset):
    flags = {} if preset else {"train_batch_size": 4, "global_batch_size": 8}
    with pytest.raises(ValueError, match="global_batch_size 8 and train_batch_size 4 are both given: choose one"):
        stage_options("vae", preset, **flags)


# ------------------------------------------------------------------------------------------------- the launcher


@pytest.mark.parametrize(
    "variable, value, name, expected",
    [
        ("MIXED_PRECISION", "bf16", "mixed_precision", "bf16"),
        ("MIXED_PRECISION", "no", "mixed_precision", "no"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps", 4),
        ("DYNAMO_BACKEND", "INDUCTOR", "torch_compile", True),
        ("DYNAMO_BACKEND", "NO", "torch_compile", False),
    ],
)
def test_the_launcher_counts_where_the_command_is_silent(monkeypatch, variable, value, name, expected):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    assert getattr(stage_options("vae"), name) == expected
    other = {"mixed_precision": "fp16", "gradient_accumulation_steps": 7, "torch_compile": not expected}[name]
    assert getattr(stage_options("vae", {"common": {name: other}}), name) == other
    assert getattr(stage_options("vae", None, **{name: other}), name) == other


@pytest.mark.parametrize(
    "variable, value, told",
    [
        ("MIXED_PRECISION", "fp8", "mixed_precision must be one of no, bf16, fp16, auto, got 'fp8'"),
        ("GRADIENT_ACCUMULATION_STEPS", "auto", "gradient_accumulation_steps must be int, got 'auto'"),
    ],
)
def test_what_the_launcher_cannot_mean_is_refused(monkeypatch, variable, value, told):
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    with pytest.raises(ValueError, match=told):
        stage_options("vae")


@pytest.mark.parametrize(
    "variables",
    [{"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}],
    ids=lambda variables: next(iter(variables)),
)
def test_nothing_that_the_loop_does_is_done_twice(tmp_path, monkeypatch, reference, variables):
    """Accelerate would divide the loss again, and compile again."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.compile", lambda *_, **settings: pytest.fail("compiled"))
    fit(tmp_path, checkpoints_total_limit=10)
    assert contents(tmp_path) == contents(reference)


def test_the_launcher_says_how_to_compile(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("torch.nn.Module.compile", lambda model, **settings: seen.append(settings))
    fit(tmp_path / "plain", max_train_steps=1, torch_compile=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "reduce-overhead")
    fit(tmp_path / "launched", max_train_steps=1, torch_compile=True)
    assert seen == [{}, {"backend": "aot_eager", "mode": "reduce-overhead"}]


# ------------------------------------------------------------------------------ refused before the data is read


@pytest.fixture
def tiny_preset(tmp_path, monkeypatch):
    """`tiny.yaml` in the working folder, whose data must not be read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "open_images", lambda *_: pytest.fail("read the data"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))


def refusal(*flags: str) -> str:
    """The one sentence with which `vaeplus train` is refused, before it has written anything."""
    before = os.listdir()
    code, _, errors = run("train", "--config", "tiny.yaml", "--output_dir", "out", *flags)
    assert code == 2 and errors.count("\n") == 1 and os.listdir() == before
    return errors


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
@pytest.mark.usefixtures("tiny_preset")
def test_types_that_split_the_model_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    assert f"distributed type {kind} cannot train these models" in refusal()
    with pytest.raises(ValueError, match=f"distributed type {kind} cannot"):
        fit(tmp_path / "from-python")


@pytest.mark.usefixtures("tiny_preset")
def test_only_types_that_hold_the_whole_model_are_taken(monkeypatch):
    for kind in DistributedType:
        state = SimpleNamespace(distributed_type=kind, device=SimpleNamespace(type="cpu"), num_processes=1)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "process_state", lambda state=state: state)
            if kind.value in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"):
                assert f"distributed type {kind.value} cannot" in refusal()
            else:
                launch.refuse_what_cannot_run(TrainingOptions())


@pytest.mark.usefixtures("tiny_preset")
def test_compilation_by_regions_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "True")
    assert "leave out --dynamo_use_regional_compilation" in refusal()


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "comet_ml"])
@pytest.mark.usefixtures("tiny_preset")
def test_a_tracker_that_is_not_installed_is_refused(monkeypatch, tracker):
    monkeypatch.setattr(launch, "get_available_trackers", lambda: [])
    told = refusal("--report_to", tracker)
    assert f"report_to {tracker} needs a package that is not installed: run `pip install {tracker}`" in told


@pytest.mark.usefixtures("tiny_preset")
def test_a_batch_that_does_not_split_is_refused_before_the_data_is_read():
    told = refusal("--global_batch_size", "6", "--gradient_accumulation_steps", "4")
    assert "global_batch_size 6 cannot be split evenly" in told and "choose 4 or 8" in told


# --------------------------------------------------------------------------------- where a preset has a run written


@pytest.mark.parametrize(
    "common, own, flags, expected",
    [
        ({}, {}, [], "runs/vaeplus runs/vaeplus/autoencoder runs/vaeplus/vae"),
        ({"output_dir": "here"}, {}, [], "here here/autoencoder here/vae"),
        ({"output_dir": "here"}, {}, ["--output_dir", "there"], "there there/autoencoder there/vae"),
        ({}, {}, ["--set", "common.output_dir=set"], "set set/autoencoder set/vae"),
        ({}, {"output_dir": "faces"}, ["--output_dir", "there"], "there faces there/vae"),
    ],
)
@pytest.mark.usefixtures("tiny_preset")
def test_an_output_dir_of_a_preset_is_used(tmp_path, monkeypatch, common, own, flags, expected):
    preset = TINY | {"common": TINY["common"] | common, "autoencoder": TINY["autoencoder"] | own}
    (tmp_path / "placed.yaml").write_text(yaml.safe_dump(preset))
    seen = []

    def opened(options):
        seen.extend([*(options[stage].output_dir for stage in STAGES), options["vae"].autoencoder])
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "open_stage_images", opened)
    assert run("train", "--config", "placed.yaml", *flags)[0] == 130
    folder, autoencoder, vae = expected.split()
    assert seen == [autoencoder, vae, f"{folder}/second_stage", autoencoder]
    assert (tmp_path / folder).is_dir()


@pytest.mark.parametrize(
    "setting, told",
    [
        ("common.output_dir=5", "output_dir must be str, got 5"),
        ("vae.output_dir=5", "output_dir must be str, got 5"),
        ("vae.output_dir=out/autoencoder", "each stage needs an output_dir of its own, got out/autoencoder, out/auto"),
    ],
)
@pytest.mark.usefixtures("tiny_preset")
def test_an_output_dir_that_cannot_be_is_refused(setting, told):
    assert told in refusal("--set", setting)


@pytest.mark.parametrize("kind, other", [("train_batch_size", "global"), ("global_batch_size", "train")])
@pytest.mark.usefixtures("tiny_preset")
def test_a_setting_of_one_stage_takes_the_place_of_the_other_kind_of_batch(tmp_path, monkeypatch, kind, other):
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(TINY | {"vae": {f"{other}_batch_size": 9} | TINY["vae"]}))
    seen = {}

    def opened(options):
        seen.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "open_stage_images", opened)
    assert run("train", "--config", "both.yaml", "--set", f"vae.{kind}=2")[0] == 130
    assert getattr(seen["vae"], kind) == 2 and (seen["vae"].global_batch_size is None) == (other == "global")
