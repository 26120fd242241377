"""How time and memory grow: processes, batch, resolution, latent dimensions, and the size of the data set.

    python benchmarks/scaling.py

Every row of the first two tables is a process of its own, for its peak memory. Data sets are synthetic: grey noise of
32 x 32 in the cache's format (1,000,000 of them take 1 GB in the folder for temporary files), and a parquet file of as
many small PNGs for the stream. "resumed" starts a stream in the middle of its first pass, which it has to skip.

The loader alone is faster on a data set that a processor's cache holds (10,000 of these images are 10 MB); what that
means for training is the last column of the table "cache", with a network of a few milliseconds a step.
"""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import pyarrow
import pyarrow.parquet
from accelerate import Accelerator
from common import ROOT, Clock, benchmark, goal, in_turn, peak_mib, run_python, synthetic_images, train_and_time
from PIL import Image

from hf_vaeplus import VAEPlusAutoencoderConfig, VAEPlusAutoencoderModel
from hf_vaeplus.data.pixels import to_unit_range
from hf_vaeplus.data.stream import stream_images
from hf_vaeplus.training.loop import _loader
from hf_vaeplus.training.options import TrainingOptions

BATCH, SIZE = 128, 32
WORKER = "import sys, scaling; scaling.worker(sys.argv[1])"


def arguments(batch, noise, step) -> dict:
    return {"pixel_values": to_unit_range(batch["pixel_values"])}


def worker(words: str):
    """Train in this process and print seconds per step, on the clock that the parent uses, and the peak in MiB."""
    given = json.loads(words)
    common.torch.set_num_threads(given["threads"])
    if given["processor_time"]:
        common.now = common._processor_time
    with tempfile.TemporaryDirectory(prefix="vaeplus-bench-") as folder:
        config = VAEPlusAutoencoderConfig(image_size=given["size"], latent_dim=given["latent_dim"])
        images = synthetic_images(Path(folder) / "data", 4 * given["batch"], given["size"], 3)
        options = TrainingOptions(
            output_dir=given.get("output_dir") or f"{folder}/run",
            max_train_steps=Clock.warmup + 1 + given["steps"],
            train_batch_size=given["batch"],
            mixed_precision="bf16",
        )
        seconds = train_and_time(
            VAEPlusAutoencoderModel(config),
            images,
            arguments,
            options,
        )
    if os.environ.get("RANK", "0") == "0":
        print(seconds, peak_mib())


def networks(args) -> list[dict]:
    """Time and memory of training the autoencoder, one property changed at a time."""
    base = {"size": 64, "batch": 64, "latent_dim": 64}
    changes = [{}]
    for name, values in {
        "batch": args.pick([], [16], [1, 4, 16, 128, 256]),
        "size": args.pick([], [], [32, 128, 256]),
        "latent_dim": args.pick([], [], [8, 256, 1024]),
    }.items():
        changes += [{name: value} for value in values]
    if args.pick(True, False, False):
        base |= {"size": 32, "batch": 1}
    words = {"steps": args.pick(1, 2, 6), "threads": args.threads, "processor_time": args.processor_time}
    rows = [{**base, **change} for change in changes]
    peaks = {}

    def run(place):
        _, (seconds, peak) = run_python(WORKER, json.dumps({**rows[place], **words}), args=args)
        peaks[place] = float(peak)
        return float(seconds)

    repeats, args.repeats = args.repeats, args.pick(1, 1, 3)
    seconds = in_turn({place: lambda place=place: run(place) for place in range(len(rows))}, args, "networks")
    args.repeats = repeats
    return [
        row | {"ms_per_step": 1e3 * seconds[n], "images_per_second": row["batch"] / seconds[n], "peak_mib": peaks[n]}
        for n, row in enumerate(rows)
    ]


def processes(args) -> list[dict]:
    """One process and two, on one thread each: the same work per process."""
    rows = []
    for count in (1, 2):
        with tempfile.TemporaryDirectory(prefix="vaeplus-bench-") as folder:
            script = Path(folder) / "run.py"
            script.write_text(WORKER + "\n", encoding="utf-8")
            given = {"size": 64, "batch": args.pick(2, 64, 64), "latent_dim": 64, "steps": args.pick(1, 3, 10)}
            given |= {"threads": 1, "processor_time": False, "output_dir": f"{folder}/run"}
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count)]
            launch += ["--multi_gpu"] if count > 1 else []
            path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
            env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
            done = subprocess.run([*launch, script, json.dumps(given)], capture_output=True, encoding="utf-8", env=env)
            if done.returncode:
                raise RuntimeError(f"{count} processes failed: {done.stderr[-2000:]}")
            seconds, peak = map(float, done.stdout.split()[-2:])
        rate = count * given["batch"] / seconds
        rows.append({"processes": count, "ms_per_step": 1e3 * seconds, "images_per_second": rate, "peak_mib": peak})
    return [row | {"speedup": row["images_per_second"] / rows[0]["images_per_second"]} for row in rows]


def caches(args, folder: Path) -> list[dict]:
    """Reading batches from caches of different sizes, and training on them, each in turn."""
    counts = args.pick([256, 512], [1_000, 10_000, 1_000_000], [1_000, 10_000, 100_000, 1_000_000])
    data = {count: synthetic_images(folder / str(count), count, SIZE, 1) for count in counts}
    accelerator, options = Accelerator(), TrainingOptions(train_batch_size=BATCH)
    batches = args.pick(2, 1_000_000 // BATCH, 1_000_000 // BATCH)  # as many for all: one epoch of the largest

    def read(count):
        """With all permutations that come on the way."""
        start = common.now()
        for batch in _loader(data[count], options, accelerator, 0, batches):
            to_unit_range(batch["pixel_values"])
        return common.now() - start

    def first(count):
        start = common.now()
        next(iter(_loader(data[count], options, accelerator, 0, 1)))
        return common.now() - start

    def step(count):
        run = TrainingOptions(
            output_dir=tempfile.mkdtemp(dir=folder),
            max_train_steps=Clock.warmup + 1 + args.pick(1, 20, 100),
            train_batch_size=BATCH,
            mixed_precision="bf16",
        )
        config = VAEPlusAutoencoderConfig(image_size=SIZE, num_channels=1, hidden_channels=(32, 64))
        return train_and_time(VAEPlusAutoencoderModel(config), data[count], arguments, run)

    seconds = in_turn({count: lambda count=count: read(count) for count in counts}, args, "cache")
    starts = in_turn({count: lambda count=count: first(count) for count in counts}, args, "first batch")
    steps = in_turn({count: lambda count=count: step(count) for count in counts}, args, "training")
    return [
        {
            "images": count,
            "mib": count * SIZE**2 / 2**20,
            "images_per_second": batches * BATCH / seconds[count],
            "first_batch_ms": 1e3 * starts[count],
            "images_per_second_in_training": BATCH / steps[count],
        }
        for count in counts
    ]


def streams(args, folder: Path) -> list[dict]:
    """Reading a parquet file of PNGs as a stream: the first batch, the following ones, and a start in mid-pass."""
    rng, rows = np.random.default_rng(0), []
    pictures = []
    for _ in range(1_000):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(SIZE, SIZE), dtype=np.uint8)).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    block = pyarrow.table(
        {"image": pyarrow.array(pictures, kind)}
    )  # stored again and again: a dictionary holds it once
    for count in args.pick([1_000], [1_000, 100_000], [1_000, 10_000, 100_000, 1_000_000]):
        file = folder / f"train-{count}.parquet"
        with pyarrow.parquet.ParquetWriter(file, block.schema) as writer:
            for _ in range(count // 1_000):
                writer.write_table(block)

        def read(first, batches, file=file):
            stream = stream_images(train_data_files=str(file), resolution=SIZE, num_channels=1)
            start = time.perf_counter()
            stream.set_position(first, BATCH)
            moments = [time.perf_counter() - start for _ in itertools.islice(stream, batches)]
            return moments[0], (moments[-1] - moments[0]) / max(1, len(moments) - 1)

        begin, each = read(0, args.pick(3, 30, 100))
        resumed, _ = read(count // 2 // BATCH, 1)
        rows.append(
            {
                "images": count,
                "images_per_second": BATCH / each,
                "first_batch_ms": 1e3 * begin,
                "resumed_first_batch_ms": 1e3 * resumed,
                "file_mib": file.stat().st_size / 2**20,
            }
        )
        file.unlink()
    return rows


def measure(args) -> dict:
    with tempfile.TemporaryDirectory(prefix="vaeplus-bench-") as folder:
        cached = caches(args, Path(folder))
        for part in Path(folder).iterdir():
            shutil.rmtree(part)
        streamed = streams(args, Path(folder))
    small, large = cached[args.pick(0, 1, 1)], cached[-1]
    ratios = {key: large[key] / small[key] for key in ("images_per_second_in_training", "images_per_second")}
    what = dict(zip(ratios, ("training", "the loader alone"), strict=True))
    return {
        "ratio": ratios["images_per_second_in_training"],
        "loader_ratio": ratios["images_per_second"],
        "network": networks(args),
        "processes": processes(args),
        "cache": cached,
        "stream": streamed,
        "goals": [
            goal(f"1,000,000 images over 10,000, {what[key]}", None if args.smoke else ratio, ">= 0.95")
            for key, ratio in ratios.items()
        ],
    }


if __name__ == "__main__":
    raise SystemExit(benchmark("scaling", __doc__, measure))
