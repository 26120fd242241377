"""Examples killed with SIGKILL and resumed: the same run, byte for byte. And two processes are one with their batches.

Killing does not race with the run: the process waits, in a step or in the middle of writing a checkpoint, until the
test has killed it.
"""

import contextlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import LAUNCH_TWO, Launched, contents
from safetensors.torch import load_file

from hf_vaeplus import VAEPlusAutoencoderConfig, VAEPlusAutoencoderModel
from hf_vaeplus.evaluation import evaluate
from hf_vaeplus.training import checkpoints, shared_folder, stages
from hf_vaeplus.training.codes import encode_dataset
from hf_vaeplus.training.options import stage_options

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_stage.py"
# 90 images and at least 32 of them in a step: every kill below is in the middle of an epoch.
DATA = "--dataset_name digits --resolution 32 --num_channels 1 --max_train_samples 90 --train_batch_size 16"
LENGTH = "--max_train_steps 30 --checkpointing_steps 10 --logging_steps 4 --lr_warmup_steps 5"
AUTOENCODER = "--stage autoencoder --use_ema --gradient_accumulation_steps 2"
VAE = "--stage vae --mixed_precision bf16 --use_ema --gradient_accumulation_steps 2"
SECOND_STAGE = "--stage second_stage --gradient_accumulation_steps 2 --dataloader_num_workers 1"
STAGES = {
    "autoencoder": f"{AUTOENCODER} --model latent_dim=16 hidden_channels=[8,16] num_blocks=1",
    "vae": f"{VAE} --model latent_dim=8 hidden_dim=16 num_blocks=1",
    "second_stage": f"{SECOND_STAGE} --model hidden_dim=16 num_blocks=1",
}
EARLIER = {"autoencoder": [], "vae": ["autoencoder"], "second_stage": ["autoencoder", "vae"]}


def example(argv: list[str]):
    sys.argv = [str(EXAMPLE), *argv]
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def disturbed_example(folder: Path, point: str, step: int, argv: list[str]):
    """Runs the example, but at a chosen point waits for ever, after telling so in a file for each process; or gives
    one process, not the main one, a batch of NaN."""
    rank = os.environ.get("RANK", "0")
    train, save_file = stages.train, checkpoints.save_file

    def hold():
        (folder / f"held-{rank}").touch()
        time.sleep(600)

    def disturbed_train(stage, options):
        def disturbed_prepare(batch, noise, at):
            if point == "step" and at == step:
                hold()
            if point == "nan" and at == step and rank == "1":
                batch["code"] = batch["code"] * float("nan")
            return stage.prepare(batch, noise, at)

        return train(replace(stage, prepare=disturbed_prepare), options)

    def disturbed_save(tensors, path):
        if point == "save" and f".checkpoint-{step}." in str(path):
            Path(path).write_bytes(b"half a file")
            hold()
        save_file(tensors, path)

    stages.train, checkpoints.save_file = disturbed_train, disturbed_save
    example(argv)


def train_stages(stages_and_options: dict):
    """Every stage for three steps, from the stages that are there already."""
    for stage, options in stages_and_options.items():
        stages.run_stage(stage_options(stage, **options))


def without_barriers(folder: Path):
    """Opens images, encodes them and fits bins in two processes, with barriers forbidden: who waits for rank 0 at one
    does so no longer than the process group's timeout, and decoding can take hours."""
    options = stage_options("vae", dataset_name="digits", resolution=32, num_channels=1, cache_dir=str(folder / "new"))
    stages.process_state()

    def forbidden(*_, **__):
        raise AssertionError("a process waits at a barrier")

    torch.distributed.barrier = forbidden
    images = stages.open_images(options)
    config = VAEPlusAutoencoderConfig(image_size=32, num_channels=1, latent_dim=4, hidden_channels=(4,))
    torch.manual_seed(0)
    autoencoder = VAEPlusAutoencoderModel(config)
    assert len(encode_dataset(images, autoencoder, autoencoder.encode)) == len(images)
    assert len(evaluate._fitted_bins(images, 40, 4).centres) == 4


def two_machines(folder: Path):
    """What two processes with their own or a common folder are told; and a stage with a gamma that no loss uses."""
    accelerator, rank = Accelerator(), int(os.environ["RANK"])
    own = folder / f"machine-{rank}"
    for place in (own, folder):
        place.mkdir(exist_ok=True)
    shared_folder._PATIENCE = 0.1
    for place, step, told in (
        (own, 0, r"processes \[1\] do not see the folder"),
        (folder, rank, r"different checkpoints in .*steps \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=told):
            shared_folder.refuse_other_folders(accelerator, place, step)
    shared_folder.refuse_other_folders(accelerator, folder, 7)
    accelerator.wait_for_everyone()
    assert not list(folder.rglob(".seen-by-all-*"))
    model = {"latent_dim": 4, "network": "conv", "hidden_channels": [4], "gamma": "learned"}
    images = dict(dataset_name="digits", resolution=32, num_channels=1, max_train_samples=40, train_batch_size=4)
    options = dict(mmd_weight=10.0, model=model, max_train_steps=3, output_dir=str(folder / "wae"))
    stages.run_stage(stage_options("vae", **images, **options))


@contextlib.contextmanager
def launched(workplace: Path, num_processes: int, target, *arguments):
    """Started processes and the file of their output; at the end all are killed, so that nothing can be tidied up."""
    with tempfile.NamedTemporaryFile("r") as output:
        run = Launched(
            num_processes, Path(output.name), {"VAEPLUS_CACHE": str(workplace / "cache")}, target, *arguments
        )
        try:
            yield run, output
        finally:
            run.kill()


def finish(workplace: Path, num_processes: int, target, *arguments):
    with launched(workplace, num_processes, target, *arguments) as (run, _):
        assert run.ended_within(300)


def kill_when_held(workplace: Path, num_processes: int, num_held: int, folder: Path, *arguments):
    """Start the disturbed example, wait until `num_held` processes wait, and kill all there are with SIGKILL."""
    folder.mkdir()
    with launched(workplace, num_processes, disturbed_example, folder, *arguments) as (run, _):
        deadline = time.monotonic() + 300
        while len(list(folder.glob("held-*"))) < num_held:
            assert not run.ended_within(0.05), "the run ended before the point where it is to be killed"
            assert time.monotonic() < deadline, "the run never came to the point where it is to be killed"


class Workplace:
    """Uninterrupted runs of the stages, each made once, when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def arguments(self, stage: str, output_dir: Path) -> list[str]:
        earlier = [part for name in EARLIER[stage] for part in (f"--{name}", str(self.straight(name, 1)))]
        return [*DATA.split(), *LENGTH.split(), *earlier, "--output_dir", str(output_dir), *STAGES[stage].split()]

    def straight(self, stage: str, num_processes: int) -> Path:
        output_dir = self.folder / f"{stage}-{num_processes}" / "straight"
        if not (output_dir / "model.safetensors").exists():
            arguments = self.arguments(stage, output_dir)
            if num_processes == 1:
                finish(self.folder, 1, example, arguments)
            else:  # as a user does it
                variables = dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
                environment = {**os.environ, **variables, "VAEPLUS_CACHE": str(self.folder / "cache")}
                command = [sys.executable, *LAUNCH_TWO, str(EXAMPLE), *arguments]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
                assert done.returncode == 0, done.stderr[-4000:]
        return output_dir


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("resume"))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "stage, num_processes, point, step",
    [
        slow("autoencoder", 1, "step", 13),
        slow("autoencoder", 2, "step", 17),
        ("vae", 1, "save", 20),
        ("vae", 2, "step", 17),
        slow("vae", 1, "step", 13),
        slow("vae", 2, "save", 20),
        slow("second_stage", 1, "step", 13),
        slow("second_stage", 2, "step", 17),
        slow("second_stage", 2, "save", 20),
    ],
)
def test_a_killed_run_is_resumed_bit_for_bit(workplace, stage, num_processes, point, step):
    straight = workplace.straight(stage, num_processes)
    output_dir = straight.with_name(f"killed-in-{point}-{step}")
    arguments = workplace.arguments(stage, output_dir)
    held = straight.with_name(f"held-in-{point}-{step}")
    num_held = num_processes if point == "step" else 1  # one process writes
    kill_when_held(workplace.folder, num_processes, num_held, held, point, step, arguments)

    lines = [json.loads(line)["step"] for line in (output_dir / "stats.jsonl").read_text().splitlines()]
    assert lines == list(range(4, step + 1, 4)) and lines[-1] > 10  # beyond the checkpoint that it is resumed from
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-10"]
    assert len(list(output_dir.glob(".checkpoint-20.partial/optimizer.safetensors"))) == (point == "save")
    assert not (output_dir / "model.safetensors").exists()

    finish(workplace.folder, num_processes, example, [*arguments, "--resume_from_checkpoint", "latest"])
    resumed, wanted = contents(output_dir), contents(straight)
    assert (
        resumed.keys()
        == wanted.keys()
        >= {
            "model.safetensors",
            "stats.jsonl",
            "checkpoint-30/optimizer.safetensors",
            "checkpoint-30/progress.json",
        }
    )
    assert ("checkpoint-30/ema/model.safetensors" in wanted) == (stage != "second_stage")
    assert [name for name in wanted if resumed[name] != wanted[name]] == []


@pytest.mark.slow
def test_nan_in_one_process_stops_both_and_the_run_can_go_on(workplace):
    straight = workplace.straight("vae", 2)
    output_dir = straight.with_name("diverged")
    arguments = workplace.arguments("vae", output_dir)
    with launched(workplace.folder, 2, disturbed_example, output_dir, "nan", 17, arguments) as (run, output):
        codes, errors = run.exit_codes(300), output.read()
    assert codes == [3, 3]
    told = re.findall(r"vaeplus: error: (step 18 gave values that are not finite \(.*?\))", errors)
    assert told == ["step 18 gave values that are not finite (loss, nll, kl, squared_error)"] * 2
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-17"]
    finish(workplace.folder, 2, example, [*arguments, "--resume_from_checkpoint", "latest"])
    assert contents(output_dir) == contents(straight)


@pytest.mark.parametrize("target", [without_barriers, two_machines])
def test_several_processes(workplace, tmp_path, target):
    finish(workplace.folder, 2, target, tmp_path)


def test_two_processes_take_the_steps_of_one_with_their_batches_together(workplace):
    """The analytic gamma of the VAE is one number for both processes. SGD-like steps, so errors are not blown up."""
    common = dict(
        dataset_name="digits", resolution=32, num_channels=1, max_train_samples=90, max_train_steps=3, logging_steps=1,
        lr_scheduler="constant", learning_rate=1.0, adam_epsilon=1e3,
    )  # fmt: skip
    models = {
        "autoencoder": {"latent_dim": 16, "hidden_channels": [8, 16], "num_blocks": 1},
        "vae": {"latent_dim": 8, "hidden_dim": 16, "num_blocks": 1, "gamma": "analytic"},
        "second_stage": {"hidden_dim": 16, "num_blocks": 1},
    }
    folders = {}
    for num_processes, train_batch_size in ((1, 32), (2, 16)):
        folders[num_processes] = workplace.folder / f"together-{num_processes}"
        options = {}
        for stage, model in models.items():
            earlier = {name: str(workplace.straight(name, 1)) for name in EARLIER[stage]}
            own = dict(train_batch_size=train_batch_size, output_dir=str(folders[num_processes] / stage), model=model)
            options[stage] = {**common, **earlier, **own}
        finish(workplace.folder, num_processes, train_stages, options)

    for stage in models:
        lines = [(folders[number] / stage / "stats.jsonl").read_text().splitlines() for number in (1, 2)]
        assert len(lines[0]) == 3
        for alone, shared in zip(*lines, strict=True):
            alone, shared = json.loads(alone), json.loads(shared)
            alone.pop("active_units", 0), shared.pop("active_units", 0)  # a count over the rows of one process
            assert shared == pytest.approx(alone, rel=1e-5)
        for file in ("model.safetensors", "optimizer.safetensors"):  # exp_avg is a mean of the gradients themselves
            one, two = (load_file(folders[number] / stage / "checkpoint-3" / file) for number in (1, 2))
            assert one.keys() == two.keys()
            size = {name: tensor.float().norm() for name, tensor in one.items()}
            largest = max(norm for name, norm in size.items() if not name.endswith("exp_avg_sq"))
            apart = {name: (two[name] - one[name]).float().norm() for name in one}
            far = [name for name in one if not apart[name] <= 1e-5 * size[name] + 1e-8 * largest]
            assert not far, f"{stage}: {far}"
