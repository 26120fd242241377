"""Train each stage for thousands of steps and call a pipeline thousands of times: does memory, or anything else, grow?

    python tests/faults/soak.py --steps 10000 --calls 10000 --output results/soak.json --figure docs/images/soak.png

Tiny models on the embedded digits, with checkpoints, averages, logs, trackers, pictures and a worker that reads data.
Each part has a process of its own and is watched from inside: resident size, open files and sockets, and threads, of
the process and its children. The first tenth is the warm-up.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import psutil
import torch

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.provenance import provenance
from hf_vaeplus.training.loop import train
from hf_vaeplus.training.options import STAGES, StageOptions, stage_options
from hf_vaeplus.training.stages import build_pipeline, build_stage, open_images

PARTS = (*STAGES, "pipeline")
MAX_GROWTH = 0.03  # of the resident size at the end of the warm-up
DATA = dict(dataset_name="digits", resolution=32, num_channels=1, max_train_samples=500, train_batch_size=8)
OPTIONS = {
    "autoencoder": dict(
        model=dict(latent_dim=16, hidden_channels=[8, 16], num_blocks=1),
        report_to="tensorboard",
        dataloader_num_workers=1,
    ),
    "vae": dict(model=dict(latent_dim=8, hidden_dim=16, num_blocks=1), mixed_precision="bf16"),
    "second_stage": dict(model=dict(hidden_dim=16, num_blocks=1)),
}


class Watch:
    """What this process and its children hold, against progress; a reading at each hundredth of the way."""

    def __init__(self, total: int):
        self.total, self.process = total, psutil.Process()
        self.readings = []

    def __call__(self, progress: int):
        """To be told of each step once, from 1 on."""
        if progress % max(1, self.total // 100):
            return
        family = [self.process, *self.process.children(recursive=True)]
        self.readings.append({
            "progress": progress,
            "resident_mb": sum(each.memory_info().rss for each in family) / 2**20,
            "handles": sum(each.num_fds() for each in family),
            "threads": sum(each.num_threads() for each in family),
        })  # fmt: skip

    def summary(self) -> dict:
        """Growth of the resident size after the warm-up, as a ratio, and the fewest and the most handles and threads
        in the tenth after it and in the last tenth."""
        after, end = (
            [each for each in self.readings if start < each["progress"] <= start + self.total // 10]
            for start in (self.total // 10, self.total - self.total // 10)
        )
        counts = {
            name: [[pick(each[name] for each in part) for pick in (min, max)] for part in (after, end)]
            for name in ("handles", "threads")
        }
        return {"growth": end[-1]["resident_mb"] / after[0]["resident_mb"] - 1, **counts, "readings": self.readings}


def stage_of(part: str, folder: Path, steps: int) -> StageOptions:
    """The options of a stage, saved, drawn and logged twenty times and more."""
    earlier = {name: str(folder / name) for name in STAGES[: STAGES.index(part)]}
    length = dict(max_train_steps=steps, checkpointing_steps=steps // 20, sample_steps=steps // 20, logging_steps=20)
    own = dict(output_dir=str(folder / part), cache_dir=str(folder / "cache"), use_ema=True)
    return stage_options(part, **{**DATA, **length, **earlier, **own, **OPTIONS[part]})


def train_watched(part: str, folder: Path, steps: int, watch: Watch):
    """`run_stage`, with a watch in its steps."""
    options = stage_of(part, folder, steps)
    stage = build_stage(options)

    def watched(batch, noise, step):
        watch(step + 1)
        return stage.prepare(batch, noise, step)

    trained = train(replace(stage, prepare=watched), options)
    if part == "second_stage":
        build_pipeline(options, trained).save_pretrained(folder / "pipeline")


def call_watched(folder: Path, calls: int, watch: Watch):
    """What people do with a pipeline, in turn, over and over."""
    pipe = VAEPlusPipeline.from_pretrained(folder / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    images = open_images(stage_of("autoencoder", folder, 20)).pixels(0, 8)
    pictures = pipe.reconstruct(images)
    uses = (
        lambda number: pipe(4, torch.Generator().manual_seed(number)),
        lambda number: pipe(4, output_type="np", sharpness=0.5, temperature=0.8),
        lambda number: pipe.reconstruct(pictures),
        lambda number: pipe.encode(images).sample(),
        lambda number: pipe.interpolate(images[:2], images[2:4], steps=4, output_type="pt"),
        lambda number: pipe.log_likelihood(images[:2], 4),
    )
    for number in range(1, calls + 1):
        uses[number % len(uses)](number)
        watch(number)


def work(parts: tuple[str, ...], steps: int, calls: int, folder: Path):
    """The parts one after the other in this process, each in its own file of figures."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(folder / "log", "a")
    for part in parts:
        started, total = time.monotonic(), calls if part == "pipeline" else steps
        watch = Watch(total)
        if part == "pipeline":
            call_watched(folder, calls, watch)
        else:
            train_watched(part, folder, steps, watch)
        row = {"part": part, "total": total, "seconds": round(time.monotonic() - started, 1), **watch.summary()}
        (folder / f"{part}.json").write_text(json.dumps(row))


def soak(steps: int, calls: int, folder: Path, together: bool = False) -> list[dict]:
    """A row of figures for each of `PARTS`; `together` in one process, forked off one that has imported everything.

    Raises:
        RuntimeError: a part failed.
    """
    context = multiprocessing.get_context("forkserver" if together else "spawn")
    for parts in [PARTS] if together else [(part,) for part in PARTS]:
        process = context.Process(target=work, args=(parts, steps, calls, folder))
        # glibc gives each thread a heap of its own, whose sizes depend on which thread asks first.
        with mock.patch.dict(os.environ, {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}):
            process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{parts} ended with {process.exitcode}: {(folder / 'log').read_text()[-2000:]}")
    return [json.loads((folder / f"{part}.json").read_text()) for part in PARTS]


def what_grew(rows: list[dict], max_growth: float = MAX_GROWTH) -> list[str]:
    """What grew, in words. Of handles and threads both the fewest and the most must have grown: a batch on its way
    from a worker holds a handle, and how many are on their way changes from reading to reading."""
    found = [f"{row['part']}: memory grew by {row['growth']:.1%}" for row in rows if not row["growth"] <= max_growth]
    return found + [
        "{}: {} went from {}-{} to {}-{}".format(row["part"], name, *row[name][0], *row[name][1])
        for row in rows
        for name in ("handles", "threads")
        if all(before < after for before, after in zip(*row[name], strict=True))
    ]


def draw(rows: list[dict], path: Path):
    """Resident size against progress, as a part of what it is after the warm-up, a curve for each part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    for row in rows:
        progress, sizes = zip(*[(each["progress"], each["resident_mb"]) for each in row["readings"]], strict=True)
        warm = sizes[len(sizes) // 10]
        axis.plot(progress, [100 * (size / warm - 1) for size in sizes], label=f"{row['part']} ({warm:.0f} MiB)")
    axis.axhline(100 * MAX_GROWTH, linestyle="--", color="grey", label="allowed")
    axis.set(xlabel="steps or calls", ylabel="resident size: growth (%)")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    found = {**provenance(), "allowed_growth": MAX_GROWTH}
    with tempfile.TemporaryDirectory() as folder:
        found["parts"] = rows = soak(args.steps, args.calls, Path(folder))
    for row in rows:
        print({name: value for name, value in row.items() if name != "readings"})
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    if args.figure:
        draw(rows, args.figure)
    if grown := what_grew(rows):
        raise SystemExit("\n".join(grown))


if __name__ == "__main__":
    main()
