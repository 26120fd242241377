"""Images per second of every way to training data, against what training consumes.

    python benchmarks/data_routes.py

Drawn faces of 128 x 128, as JPEG, in a folder and in parquet files, read at 64 x 64. "datasets stream" is the reader of
Hub data sets (`datasets`, streaming) on local files: what it costs without the network. The cache is read as training
reads it, in random order; building it is paid once.
"""

import itertools
import shutil
import tempfile
from io import BytesIO
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from common import benchmark, goal, in_turn, seconds_of
from PIL import Image
from tqdm.auto import tqdm
from train_throughput import ADAMW, build

from hf_vaeplus.data import ImageDataset, load_images, stream_images, to_unit_range
from hf_vaeplus.rendered_faces import factors_of, render_faces
from hf_vaeplus.training import GlobalBatchSampler

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


def read_all(dataset) -> int:
    """One pass in the order of training."""
    if isinstance(dataset, ImageDataset):
        batches = len(dataset) // BATCH
        for indices in GlobalBatchSampler(len(dataset), BATCH, 0, 0, 1, 0, batches):
            dataset.__getitems__(indices)
        return batches * BATCH
    dataset.set_position(0, BATCH)
    batches = max(1, dataset.max_samples // BATCH)
    return sum(len(batch["index"]) for batch in itertools.islice(dataset, batches))


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
        cached = load_images(**sources["folder"], cache_dir=folder / "cache", progress=False)

        def building(source):
            shutil.rmtree(folder / "built", ignore_errors=True)
            load_images(**source, cache_dir=folder / "built", max_samples=count, progress=False)

        def images_of_cache():
            for _ in range(10):
                read_all(cached)

        work = {"cache": (10 * (count // BATCH) * BATCH, images_of_cache)}
        for name, source in sources.items():
            work[f"{name}, building the cache"] = (count, lambda source=source: building(source))
            stream = stream_images(**source, max_samples=count)
            work[f"{name}, streamed"] = (count // BATCH * BATCH, lambda stream=stream: read_all(stream))
        work["training consumes, conv64 bf16"] = (BATCH, training_step("bf16"))
        candidates = {name: seconds_of(function) for name, (_, function) in work.items()}
        rates = {name: work[name][0] / seconds for name, seconds in in_turn(candidates, args, "routes").items()}
    consumed = rates["training consumes, conv64 bf16"]
    rows = [{"route": n, "images_per_second": rate, "over_consumption": rate / consumed} for n, rate in rates.items()]
    return {"routes": rows, "goals": [goal("cache over consumption", rates["cache"] / consumed, ">= 10")]}


if __name__ == "__main__":
    raise SystemExit(benchmark("data_routes", __doc__, measure))
