"""Images per second of every way to training data, against what training consumes.

    python benchmarks/data_routes.py

Drawn faces of 128 x 128, as JPEG, in a folder and in parquet files, read at 64 x 64. "datasets stream" is the reader
of Hub data sets (`datasets`, streaming) on local files: what it costs without the network. Decoding uses all cores,
whatever `--threads`; building the cache is paid once.

The cache is read as training reads it: in random order, through the loop's own loader, scaled to floats. It is larger
than a processor's caches (a few hundred images come from there, several times faster) and is read for about as long as
a training step takes, so that a busy machine slows both.
"""

import itertools
import shutil
import tempfile
from io import BytesIO
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from accelerate import Accelerator
from common import benchmark, goal, in_turn, seconds_of, synthetic_images
from PIL import Image
from tqdm.auto import tqdm
from train_throughput import ADAMW, build

from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.pixels import to_unit_range
from hf_vaeplus.data.rendered_faces import factors_of, render_faces
from hf_vaeplus.data.stream import stream_images
from hf_vaeplus.training.loop import _loader
from hf_vaeplus.training.options import TrainingOptions

BATCH = 64


def write_sources(folder: Path, count: int):
    """The same JPEGs as files and as rows of a parquet file."""
    pictures, rows = folder / "pictures", []
    pictures.mkdir()
    for start in tqdm(range(0, count, 100), desc="drawing"):
        for image in render_faces(factors_of(range(start, min(start + 100, count)), 8), 128):
            buffer = BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=90)
            rows.append({"bytes": buffer.getvalue(), "path": None})
            (pictures / f"{len(rows):06d}.jpg").write_bytes(buffer.getvalue())
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    (folder / "table").mkdir()
    table = pyarrow.table({"image": pyarrow.array(rows, kind)})
    pyarrow.parquet.write_table(table, folder / "table" / "train-00000-of-00001.parquet")


def read_cache(images, accelerator, batches: int):
    """Batches as the training loop gets and scales them."""
    for batch in _loader(images, TrainingOptions(train_batch_size=BATCH), accelerator, 0, batches):
        to_unit_range(batch["pixel_values"])


def read_stream(stream, batches: int):
    stream.set_position(0, BATCH)
    for batch in itertools.islice(stream, batches):
        to_unit_range(batch["pixel_values"])


def training_step(precision: str):
    model = build("conv64")[0].to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=True)
    pixels = torch.zeros(BATCH, 64, 64, 3, dtype=torch.uint8).permute(0, 3, 1, 2)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(to_unit_range(pixels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(args) -> dict:
    count = args.pick(64, 512, 4096)
    with tempfile.TemporaryDirectory(prefix="vaeplus-bench-") as folder:
        folder = Path(folder)
        write_sources(folder, count)
        sources = {
            "folder": dict(train_data_dir=str(folder / "pictures")),
            "parquet": dict(train_data_dir=str(folder / "table")),
            "datasets stream": dict(dataset_name=str(folder / "table"), revision="0" * 40),
        }
        cached, accelerator = synthetic_images(folder / "cache", args.pick(128, 20_000, 20_000), 64, 3), Accelerator()

        def building(source):
            shutil.rmtree(folder / "built", ignore_errors=True)
            load_images(**source, cache_dir=folder / "built", max_samples=count, progress=False)

        batches = args.pick(2, 1_000, 4_000)
        work = {"cache": (batches * BATCH, lambda: read_cache(cached, accelerator, batches))}
        for name, source in sources.items():
            work[f"{name}, building the cache"] = (count, lambda source=source: building(source))
            stream = stream_images(**source, max_samples=count)
            work[f"{name}, streamed"] = (
                count // BATCH * BATCH,
                lambda stream=stream: read_stream(stream, count // BATCH),
            )
        work["training consumes, conv64 bf16"] = (BATCH, training_step("bf16"))
        candidates = {name: seconds_of(function) for name, (_, function) in work.items()}
        rates = {name: work[name][0] / seconds for name, seconds in in_turn(candidates, args, "routes").items()}
    consumed = rates["training consumes, conv64 bf16"]
    rows = [{"route": n, "images_per_second": rate, "over_consumption": rate / consumed} for n, rate in rates.items()]
    return {"routes": rows, "goals": [goal("cache over consumption", rates["cache"] / consumed, ">= 10")]}


if __name__ == "__main__":
    raise SystemExit(benchmark("data_routes", __doc__, measure))
