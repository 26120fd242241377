"""Train each stage in bf16 and fp16 as in float32, from one seed on the same data, and compare; and saved pipelines.

    python tests/faults/precision.py --output results/precision.json

fp16 runs here on the CPU, with torch's autocast and loss scaling, which the command line leaves to GPUs.
"""

import argparse
import contextlib
import json
import os
import tempfile
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.provenance import provenance
from hf_vaeplus.training import launch, loop
from hf_vaeplus.training.loop import train
from hf_vaeplus.training.options import STAGES, stage_options
from hf_vaeplus.training.stages import build_pipeline, build_stage, open_images

# What is allowed between a run and the same run in float32. `curve`: the largest difference between the two losses at
# any line of stats.jsonl, as a part of the fall of the loss. The others: relative differences over the last lines.
# Images of a saved pipeline: grey levels of 255.
TOLERANCES = {
    "bf16": {"curve": 3e-3, "squared_error": 2e-3, "gamma": 1e-3, "mean_grey_levels": 1.0, "max_grey_levels": 8.0},
    "fp16": {"curve": 5e-4, "squared_error": 5e-4, "gamma": 1e-4, "mean_grey_levels": 0.15, "max_grey_levels": 1.5},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DATA = dict(dataset_name="digits", resolution=32, num_channels=1, max_train_samples=500, train_batch_size=32)
LENGTH = dict(max_train_steps=300, logging_steps=10, lr_warmup_steps=20, checkpointing_steps=1_000)
MODELS = {
    "autoencoder": dict(latent_dim=16, hidden_channels=[8, 16], num_blocks=1),
    "vae": dict(latent_dim=8, hidden_dim=32, num_blocks=1, gamma="learned"),
    "second_stage": dict(hidden_dim=32, num_blocks=1),
}


class _HalfOnCPU(Accelerator):
    init_scale = 2.0**16  # torch's own

    def __init__(self, **options):
        super().__init__(**options)
        if self.mixed_precision == "fp16":
            self.scaler, self.native_amp = torch.amp.GradScaler("cpu", init_scale=self.init_scale), True


@contextlib.contextmanager
def fp16_on_cpu(init_scale: float = _HalfOnCPU.init_scale):
    """In it, `train` does on the CPU what it does in fp16 on a GPU: torch can, Accelerate leaves it out."""
    with (
        mock.patch.object(_HalfOnCPU, "init_scale", init_scale),
        mock.patch.object(loop, "Accelerator", _HalfOnCPU),
        mock.patch.object(launch, "refuse_fp16_on_cpu", lambda *_: None),
    ):
        yield


def compare(folder: Path, steps: int, precisions=("bf16", "fp16"), stages=STAGES) -> list[dict]:
    """A row of differences for each stage and precision, then one for each precision of the saved pipeline."""
    rows, trained = [], {}
    for stage in STAGES:
        curves = {}
        for precision in ("no", *precisions) if stage in stages else ("no",):
            output_dir = folder / f"{stage}-{precision}"
            own = dict(model=MODELS[stage], output_dir=str(output_dir), mixed_precision=precision)
            options = stage_options(stage, **{**DATA, **LENGTH, **trained, **own, "max_train_steps": steps})
            with fp16_on_cpu(init_scale=64.0):  # no step overflows: what is compared is rounding, not skipped steps
                model = train(build_stage(options), options)
            curves[precision] = [json.loads(line) for line in (output_dir / "stats.jsonl").read_text().splitlines()]
            if precision == "no":
                reference, last = options, model
        trained[stage] = reference.output_dir
        rows += [{"stage": stage, "precision": p, **_differences(curves["no"], curves[p])} for p in list(curves)[1:]]
    if set(stages) == set(STAGES):
        build_pipeline(reference, last).save_pretrained(folder / "pipeline")
        images = open_images(reference).pixels(0, 64)
        exact = _images(folder / "pipeline", torch.float32, images)
        for precision in precisions:
            distance = 255 * (_images(folder / "pipeline", DTYPES[precision], images) - exact).abs()
            found = {"mean_grey_levels": distance.mean().item(), "max_grey_levels": distance.max().item()}
            rows.append({"stage": "pipeline", "precision": precision, **found})
    return rows


def _differences(exact: list[dict], other: list[dict]) -> dict[str, float]:
    losses = [torch.tensor([line["loss"] for line in lines]) for lines in (exact, other)]
    found = {"curve": ((losses[1] - losses[0]).abs().max() / (losses[0].max() - losses[0].min())).item()}
    for name in ("squared_error", "gamma"):
        if name in exact[0]:
            ends = [sum(line[name] for line in lines[-5:]) for lines in (exact, other)]
            found[name] = abs(ends[1] / ends[0] - 1)
    return found


def _images(path: Path, dtype: torch.dtype, images: torch.Tensor) -> torch.Tensor:
    """Samples and reconstructions, in the range [0, 1]."""
    pipe = VAEPlusPipeline.from_pretrained(path, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    samples = pipe(64, torch.Generator().manual_seed(0), output_type="pt").images
    return torch.cat([samples, pipe.reconstruct(images, output_type="pt")]).float()


def beyond_tolerance(rows: list[dict]) -> list[str]:
    """What differs by more than `TOLERANCES` allow, in words."""
    return [
        f"{row['stage']} in {row['precision']}: {name} differs by {row[name]:.3g}, allowed is {allowed}"
        for row in rows
        for name, allowed in TOLERANCES[row["precision"]].items()
        if not row.get(name, 0) <= allowed
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {**provenance(), "steps": args.steps, "tolerances": TOLERANCES}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VAEPLUS_CACHE"] = f"{folder}/cache"
        found["differences"] = rows = compare(Path(folder), args.steps)
    print(json.dumps(found, indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    if beyond := beyond_tolerance(rows):
        raise SystemExit("\n".join(beyond))


if __name__ == "__main__":
    main()
