"""What was tried to make training and loading faster, each in turn with what is used: the tables of docs/lab-notes.md.

    python benchmarks/attempts.py

A training step is a bare forward, backward and AdamW. Compiled variants warm up before they are timed.
"""

import statistics
import tempfile
from pathlib import Path

import common  # `now` is looked up there: --processor_time replaces it
import numpy as np
import torch
import torch._inductor.config
from common import benchmark, in_turn, seconds_of, synthetic_images
from train_throughput import ADAMW, CASES, build

from hf_vaeplus.data.pixels import to_unit_range
from hf_vaeplus.training.randomness import GlobalBatchSampler, Noise

USED = "used: bf16 autocast, channels last"


def step_of(case, batch_size, autocast=True, channels_last=True, inside="none", compiled=None, whole_optimizer=False):
    """One training step, as a function of its number.

    `inside`: precision in which oneDNN may compute float32. `compiled`: options of `torch.compile` for the model.
    """
    model, prepare = build(case)
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=not whole_optimizer)
    forward = model if compiled is None else torch.compile(model, options=compiled)
    update = torch.compile(optimizer.step) if whole_optimizer else optimizer.step
    size, channels = CASES[case][0], 1 if case == "mlp" else 3
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (batch_size, channels, size, size), dtype=torch.uint8, generator=generator)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    noise = Noise(0, batch_size, torch.device("cpu"))

    def step(number: int):
        torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = inside
        arguments = prepare({"pixel_values": pixels}, noise.at(number, slice(batch_size)), number)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = forward(**arguments).loss
        loss.backward()
        update()
        optimizer.zero_grad()

    return step


def steps(args, case: str) -> list[dict]:
    size, batch_size = CASES[case]
    batch_size = args.pick(2, batch_size, batch_size)
    count = args.pick(1, 2, 3) if case != "mlp" else args.pick(2, 30, 60)
    variants = {
        USED: {},
        "bf16 autocast, default layout": {"channels_last": False},
        "float32, bf16 inside oneDNN": {"autocast": False, "inside": "bf16"},
        "float32, channels last": {"autocast": False},
        "float32, default layout": {"autocast": False, "channels_last": False},
    }
    if args.pick(False, False, True):
        torch._inductor.config.force_disable_caches = True  # a user's first run has none
        variants["compiled model"] = {"compiled": {}}
        variants["compiled model, C++ wrapper"] = {"compiled": {"cpp_wrapper": True}}
        variants["compiled model and optimizer"] = {"compiled": {}, "whole_optimizer": True}
    first_steps = {}

    def candidate(name, settings):
        start = common.now()
        step = step_of(case, batch_size, **settings)
        step(0)
        step(1)
        first_steps[name] = common.now() - start
        return seconds_of(lambda: step(0), count, statistics.mean)

    seconds = in_turn({name: candidate(name, settings) for name, settings in variants.items()}, args, case)
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "none"
    return [
        {
            "case": f"{case}, batch {batch_size}",
            "variant": name,
            "ms_per_step": 1e3 * each,
            "over_used": each / seconds[USED],
            "first_two_steps_s": first_steps[name],
        }
        for name, each in seconds.items()
    ]


def gathers(args, folder: Path, batch_size: int = 128, size: int = 32) -> list[dict]:
    """Batches of a cache in random order, scaled to floats, by other means than `ImageDataset.batch`."""
    counts = args.pick([256, 512], [10_000, 100_000], [10_000, 1_000_000])
    data = {count: synthetic_images(folder / str(count), count, size, 1) for count in counts}
    mapped = {}
    for count, images in data.items():
        values = torch.from_file(str(images.path), shared=False, size=count * size**2, dtype=torch.uint8)
        mapped[count] = values.view(count, size, size, 1)

    def in_order_of_the_file(count, indices):
        order = np.argsort(indices)
        batch = np.empty((len(indices), size, size, 1), np.uint8)
        batch[order] = data[count].images[np.asarray(indices)[order]]
        return torch.from_numpy(batch)

    ways = {
        "used: np.take": lambda count, indices: data[count].batch(indices)["pixel_values"],
        "torch.index_select, mapped file": lambda count, indices: mapped[count].index_select(0, torch.tensor(indices)),
        "indexing a tensor, mapped file": lambda count, indices: mapped[count][torch.tensor(indices)],
        "in the order of the file": in_order_of_the_file,
    }
    batches = args.pick(2, 1_000, 3_000)

    def read(way, count):
        for indices in GlobalBatchSampler(count, batch_size, 0, 0, 1, 0, batches):
            to_unit_range(ways[way](count, indices))

    pairs = [(way, count) for way in ways for count in counts]
    seconds = in_turn({pair: seconds_of(lambda pair=pair: read(*pair)) for pair in pairs}, args, "gathers")
    rates = {pair: batch_size * batches / each for pair, each in seconds.items()}
    few, many = counts
    return [
        {
            "gather": way,
            f"images_per_second_of_{few}": rates[way, few],
            f"images_per_second_of_{many}": rates[way, many],
            "ratio": rates[way, many] / rates[way, few],
        }
        for way in ways
    ]


def measure(args) -> dict:
    with tempfile.TemporaryDirectory(prefix="vaeplus-bench-") as folder:
        found = {"gathers": gathers(args, Path(folder))}
    return found | {"steps": [row for case in ("conv64", "mlp") for row in steps(args, case)]}


if __name__ == "__main__":
    raise SystemExit(benchmark("attempts", __doc__, measure))
