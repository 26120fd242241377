"""What every benchmark shares: one command line, candidates timed in turn, tables, and results/bench_<name>.json."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_vaeplus.cli.flags import CommandParser, local_path
from hf_vaeplus.cli.main import run_command
from hf_vaeplus.data.cache import ImageDataset, load_images
from hf_vaeplus.data.pixels import to_uint8, to_unit_range
from hf_vaeplus.evaluation.evaluate import Judge, downsample, sample_images
from hf_vaeplus.evaluation.features import open_extractor
from hf_vaeplus.metrics.reconstruction import squared_error
from hf_vaeplus.provenance import provenance
from hf_vaeplus.training.loop import Stage, train
from hf_vaeplus.training.options import TrainingOptions

ROOT = Path(__file__).resolve().parents[1]
QUICK_SECONDS = 20  # when a quick run starts no further round; imports and the round under way come on top


def benchmark(name: str, description: str, measure: Callable, add_options: Callable | None = None) -> int:
    """Run one benchmark from the command line; returns the exit code.

    Args:
        name: of the result: `results/bench_<name>.json`, of a quick run `results/bench_<name>_quick.json`.
        description: first lines of `--help`.
        measure: `args -> dict` of numbers, texts and lists of rows (dicts), which are printed as tables. Beside the
            options below, `args.pick(smoke, quick, full)` chooses by scale.
        add_options: adds flags to the parser.
    """
    return run_command(lambda: _run(name, description, measure, add_options))


def _run(name, description, measure, add_options):
    parser = CommandParser(prog=f"{name}.py", description=description)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller measurements: under 50 seconds")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)  # for tests: the numbers say nothing
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch, for all candidates")
    parser.add_argument("--repeats", type=int, default=None, help="rounds of every comparison")
    parser.add_argument("--processor_time", action="store_true", help="per thread, not the clock's: on a busy machine")
    parser.add_argument("--output_dir", type=lambda text: Path(local_path(text)), default=ROOT / "results")
    if add_options:
        add_options(parser)
    args = parser.parse_args()
    scale = "smoke" if args.smoke else "quick" if args.quick else "full"
    args.pick = lambda smoke, quick, full: {"smoke": smoke, "quick": quick, "full": full}[scale]
    args.repeats = args.repeats or args.pick(1, 3, 7)
    args.deadline = time.perf_counter() + QUICK_SECONDS if scale == "quick" else float("inf")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes that are started
    torch.set_num_threads(args.threads)
    if args.processor_time:
        global now
        now = _processor_time
    started = {
        **provenance(),
        "processor": _processor(),
        "threads": args.threads,
        "cores": os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),  # of a quiet machine: near 0
        "clock": "processor" if args.processor_time else "wall",
        # glibc's settings decide whether large tensors cost page faults
        "allocator": {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "LD_PRELOAD"))},
        "scale": scale,
        "repeats": args.repeats,
    }
    start = time.perf_counter()
    result = {**started, **measure(args), "seconds": time.perf_counter() - start}
    for key, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"\n{key.replace('_', ' ')}\n{table(value)}")
    path = args.output_dir / f"bench_{name}{'' if scale == 'full' else f'_{scale}'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\n{scale}, {args.threads} threads, {started['processor']}, load {started['load_average_before']}: {path}")
    if args.json:
        print(json.dumps(result))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def table(rows: list[dict]) -> str:
    """Rows in columns under their keys; numbers with four significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)) for row in cells]
    return "\n".join(f"{row[0].ljust(widths[0])}  {line}" for row, line in zip(cells, lines, strict=True))


def _text(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def goal(what: str, measured: float | None, wanted: str) -> dict:
    """A row of the table `goals`. `wanted` is `">= 2.5"` or `"<= 0.05"`; what was not measured is neither."""
    sign, limit = wanted.split()
    met = None if measured is None else measured >= float(limit) if sign == ">=" else measured <= float(limit)
    return {"goal": what, "measured": measured, "wanted": wanted, "met": {True: "yes", False: "no", None: "-"}[met]}


class OverDownsample:
    """Distances of sets of images to real ones, by the stem of each extractor's name, in `units` of Downsample's.

    Args:
        features: names of extractors, as in `vaeplus evaluate`.
        real: uint8 batches.
        more: `bins` and `training` of a [`Judge`].
    """

    def __init__(self, features: list[str], real: list[torch.Tensor], **more):
        self.judges = {
            Path(name).stem: Judge(open_extractor(name), tqdm(real, desc=name), **more) for name in features
        }
        self.units = {name: judge(map(downsample, real))["frechet"] for name, judge in self.judges.items()}

    def __call__(self, batches) -> dict[str, float]:
        return {name: found["over_downsample"] for name, found in self.compare(batches).items()}

    def compare(self, batches) -> dict[str, dict]:
        """All that each judge says, and its distance as `over_downsample`."""
        batches = list(batches)
        found = {name: judge(iter(batches)) for name, judge in self.judges.items()}
        return {name: {**each, "over_downsample": each["frechet"] / self.units[name]} for name, each in found.items()}


class Unseen:
    """Images that no stage has seen, with which pictures of pipelines are compared: as many of each kind.

    Args:
        pipe: any of the pipelines; they have one size of image.
        args: `train_data_dir`, `split`, `num_images`, `features` and `seed`.
    """

    def __init__(self, pipe, args):
        image_size, crop = pipe.image_shape[1], pipe.image_processor.crop
        images = load_images(train_data_dir=args.train_data_dir, split=args.split, resolution=image_size, crop=crop)
        self.seed, self.parts = args.seed, torch.arange(min(args.num_images, len(images))).split(50)
        self.real = [batch["pixel_values"] for batch in islice(images.in_order(50), len(self.parts))]
        self.judged = OverDownsample(args.features, self.real)

    def compare(self, pipe, **setting) -> dict:
        """Samples and reconstructions that are drawn with `setting`; their codes are the same whatever it is."""
        bar = tqdm(self.parts, desc=", ".join(f"{name} {value:g}" for name, value in setting.items()))
        errors = []

        def reconstructions():
            for number, batch in enumerate(self.real):
                generator = torch.Generator().manual_seed(self.seed * 1000 + number)
                images = pipe.reconstruct(batch, "pt", generator=generator, **setting)
                errors.append(squared_error(images, to_unit_range(batch)))
                yield to_uint8(images)

        row = dict(setting)
        sets = {"samples": sample_images(pipe, bar, self.seed, **setting), "reconstructions": reconstructions()}
        for kind, batches in sets.items():
            compared = self.judged.compare(batches)
            row[kind] = {name: each["over_downsample"] for name, each in compared.items()}
            row[f"{kind}_kernel"] = {name: each["kernel"] and each["kernel"][0] for name, each in compared.items()}
            row[f"{kind}_prdc"] = {name: each["prdc"] for name, each in compared.items()}
        return {**row, "squared_error": float(torch.cat(errors).mean())}

    @property
    def told(self) -> dict:
        """For the file of results."""
        return {"num_images": sum(map(len, self.parts)), "seed": self.seed, "downsample": self.judged.units}


# ------------------------------------------------------------------------------------------------------------ time


now = time.perf_counter  # in seconds


def _processor_time() -> float:
    return time.process_time() / torch.get_num_threads()


def in_turn(candidates: dict[str, Callable[[], float]], args, name: str) -> dict[str, float]:
    """Median of what each candidate returns, over rounds in which each has its turn: noise hits all alike.

    Candidates warm up by themselves. A quick run stops before the round that would end too late.
    """
    found = {each: [] for each in candidates}
    bar, start = tqdm(total=args.repeats * len(candidates), desc=name), time.perf_counter()
    for done in range(args.repeats):
        here = time.perf_counter()
        if done and here + (here - start) / done > args.deadline:
            break
        for each, measure in candidates.items():
            bar.set_postfix_str(each)
            found[each].append(measure())
            bar.update()
    bar.close()
    return {each: statistics.median(values) for each, values in found.items()}


def seconds_of(function: Callable, calls: int = 1, summary: Callable = statistics.median) -> Callable[[], float]:
    """A candidate for `in_turn`: seconds of a call of `function`, the `summary` of `calls` after one that warms up."""

    def measure():
        found = []
        for _ in range(1 + calls):
            start = now()
            function()
            found.append(now() - start)
        return summary(found[1:])

    return measure


class Clock(list):
    """The moments at which steps begin (or end)."""

    warmup = 1  # steps that do not count

    def tick(self):
        self.append(now())

    @property
    def seconds_per_step(self) -> float:
        return (self[-1] - self[self.warmup]) / (len(self) - 1 - self.warmup)


def train_and_time(model, dataset, prepare: Callable, options: TrainingOptions) -> float:
    """Seconds per step of [`hf_vaeplus.training.train`] as it is: from one call of `prepare` to the next."""
    clock = Clock()

    def timed(batch, noise, step):
        clock.tick()
        return prepare(batch, noise, step)

    train(Stage(model, dataset, timed), options)
    return clock.seconds_per_step


def run_python(code: str, *words: str, args) -> tuple[float, list[str]]:
    """Seconds of a fresh Python process that runs `code` on this checkout, and the words of its last line."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    start, before = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, encoding="utf-8", env=env)
    after, seconds = os.times(), time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"a process of the benchmark failed: {done.stderr[-2000:]}")
    if args.processor_time:
        seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, done.stdout.splitlines()[-1].split() if done.stdout.strip() else []


# ------------------------------------------------------------------------------------------------------------ data


def synthetic_images(folder: Path, count: int, size: int, num_channels: int) -> ImageDataset:
    """A cache of uint8 noise, as `load_images` opens them: what a picture shows takes no time."""
    shape = (count, size, size, num_channels)
    block = np.random.default_rng(0).integers(256, size=(1_000, size, size, num_channels), dtype=np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "images.bin", "wb") as file:
        for start in tqdm(range(0, count, len(block)), desc=f"{count:,} images", leave=False):
            file.write(block[: count - start].tobytes())
    return ImageDataset(folder / "images.bin", shape, "noise", "0" * 32)


def peak_mib() -> float | None:
    """The most memory that this process has held so far, where the system says so (Linux).

    Not `ru_maxrss`: a process inherits that from the one that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
