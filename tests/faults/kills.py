"""Kill training with SIGKILL at random moments, resume it, and compare what is left with a run that was left alone.

    python tests/faults/kills.py --kills 60 --output results/kills.json

Three stages, one and two processes, with and without averaging, accumulation, bf16 and workers that read data. A run
is killed again and again, in the middle of saves as well, until it gets through; then its weights, average, optimizer,
progress and stats.jsonl must be those of the undisturbed run, byte for byte.
"""

import argparse
import contextlib
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import Launched
from tqdm.auto import tqdm

from hf_vaeplus.provenance import provenance
from hf_vaeplus.training.checkpoints import checkpoint_step, list_checkpoints
from hf_vaeplus.training.options import STAGES, stage_options
from hf_vaeplus.training.stages import run_stage

DATA = dict(dataset_name="digits", resolution=32, num_channels=1, max_train_samples=90, train_batch_size=8)
LENGTH = dict(max_train_steps=40, checkpointing_steps=3, logging_steps=4, lr_warmup_steps=5)
MODELS = {
    "autoencoder": dict(latent_dim=16, hidden_channels=[8, 16], num_blocks=1),
    "vae": dict(latent_dim=8, hidden_dim=16, num_blocks=1),
    "second_stage": dict(hidden_dim=16, num_blocks=1),
}
SETTINGS = [  # stage, processes, options
    ("autoencoder", 1, dict(use_ema=True, gradient_accumulation_steps=2)),
    ("autoencoder", 2, dict(dataloader_num_workers=1)),
    ("vae", 1, dict(use_ema=True, mixed_precision="bf16", dataloader_num_workers=1)),
    ("vae", 2, dict(use_ema=True, gradient_accumulation_steps=2)),
    ("second_stage", 1, dict(gradient_accumulation_steps=2)),
    ("second_stage", 2, dict(use_ema=True)),
]


def run_of(options: dict, num_processes: int, folder: Path) -> Launched:
    """A training run that goes on from its latest checkpoint."""
    return Launched(num_processes, folder / "log", {"VAEPLUS_CACHE": f"{folder}/cache"}, train, options)


def train(options: dict):
    run_stage(stage_options(**options, resume_from_checkpoint="latest"))


def contents(folder: Path) -> dict[str, bytes]:
    """What a run leaves, but for its options, which name the folder, and for pictures."""
    files = (
        path for path in folder.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".json", ".jsonl")
    )
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: content for name, content in found.items() if name != "training_options.json"}


def survive(kills: int, folder: Path, seed: int, settings=SETTINGS) -> list[dict]:
    """So many kills, spread over the settings; a row of figures for each setting.

    Raises:
        RuntimeError: a resumed run failed, or left something else than the undisturbed one.
    """
    chance = random.Random(seed)
    rows, trained = [], {}  # stage -> folder, for the stages after it
    with tqdm(total=kills, desc="kills") as bar, contextlib.ExitStack() as running:  # nothing outlives an error
        for number, (stage, num_processes, special) in enumerate(settings):
            for name in STAGES[: STAGES.index(stage)]:
                if name not in trained:
                    own = {"stage": name, "output_dir": str(folder / name), "model": MODELS[name]}
                    _run_through({**DATA, **LENGTH, **trained, **own}, 1, folder)
                    trained[name] = own["output_dir"]
            before = {name: trained[name] for name in STAGES[: STAGES.index(stage)]}
            options = {"stage": stage, **DATA, **LENGTH, "model": MODELS[stage], **before, **special}
            undisturbed = folder / f"{number}-undisturbed"
            _run_through({**options, "output_dir": str(undisturbed)}, num_processes, folder)
            expected, wanted = contents(undisturbed), kills // len(settings) + (number < kills % len(settings))
            killed, in_save, runs = 0, 0, 0
            while killed < wanted:
                disturbed, runs = folder / f"{number}-{runs}", runs + 1
                while True:
                    run = run_of({**options, "output_dir": str(disturbed)}, num_processes, folder)
                    running.callback(run.kill)
                    if killed < wanted and _wait_for_a_moment(run, disturbed, chance, in_a_save=killed % 3 == 0):
                        run.kill()
                        killed += 1
                        in_save += any(disturbed.glob(".*.partial"))
                        bar.update()
                    elif run.ended_within(600):
                        break
                if contents(disturbed) != expected:
                    names = [name for name, content in contents(disturbed).items() if expected.get(name) != content]
                    raise RuntimeError(f"after {killed} kills {disturbed} differs in {names or 'missing files'}.")
            rows.append({"stage": stage, "processes": num_processes, **special, "kills": killed,
                         "in_the_middle_of_a_save": in_save, "runs_compared": runs})  # fmt: skip
    return rows


def _wait_for_a_moment(run: Launched, folder: Path, chance: random.Random, in_a_save: bool) -> bool:
    """Until some step, drawn from those to come, and a little longer, or until a save; whether the run still runs."""
    now = max(map(checkpoint_step, list_checkpoints(folder)), default=0)
    wanted = chance.randint(now, LENGTH["max_train_steps"])
    while now < wanted:
        if run.ended_within(0.001):
            return False
        now = max(map(checkpoint_step, list_checkpoints(folder)), default=0)
    if not in_a_save:
        return not run.ended_within(chance.uniform(0, 1))
    while not any(folder.glob(".checkpoint-*.partial")):  # a save takes little of the time
        if run.ended_within(0.001):
            return False
    return not run.ended_within(chance.uniform(0, 0.02))


def _run_through(options, num_processes, folder):
    run = run_of(options, num_processes, folder)
    if not run.ended_within(600):
        run.kill()
        raise RuntimeError("the undisturbed run did not end within 10 minutes.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; what they hit differs from run to run")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = survive(args.kills, Path(folder), args.seed)
    found = {**provenance(), "kills": args.kills, "seed": args.seed, "settings": rows}
    print(json.dumps(found, indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
