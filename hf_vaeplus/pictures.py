"""Pictures for people: grids of images and training curves."""

import json
import math
from pathlib import Path

import torch
from PIL import Image

from .data.pixels import to_uint8


def image_grid(images: torch.Tensor, columns: int | None = None, scale: int = 1) -> Image.Image:
    """A picture of images `(count, C, H, W)` in [0, 1], row by row, one pixel of white between them.

    Args:
        columns (`int`, *optional*): images per row; by default the square root of the count, rounded up.
        scale (`int`): how many times larger small images are drawn, with bicubic interpolation.
    """
    if scale > 1:
        images = torch.nn.functional.interpolate(images.float(), scale_factor=scale, mode="bicubic")
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    pixels = to_uint8(images.detach().float().cpu())
    count, channels, height, width = pixels.shape
    canvas = torch.full((rows * columns, channels, height + 1, width + 1), 255, dtype=torch.uint8)
    canvas[:count, :, 1:, 1:] = pixels
    canvas = canvas.reshape(rows, columns, channels, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    array = canvas.reshape(rows * (height + 1), columns * (width + 1), channels).numpy()
    return Image.fromarray(array[..., 0] if channels == 1 else array)


CURVES = {
    "squared_error": "squared error per sample",
    "loss": "loss (nats)",
    "kl": "KL (nats)",
    "gamma": "gamma (variance)",
    "active_units": "active units (posterior variance < 1/2)",
    "grad_norm": "gradient norm",
}


def plot_curves(run_dirs: dict[str, Path], path: str | Path, num_factors: int | None = None) -> None:
    """One row of training curves per stage, drawn from each folder's `stats.jsonl`, written to `path` as PNG.

    Args:
        run_dirs: stage name -> output folder of that stage.
        num_factors: r, drawn as a line beside the active units where it is known.
    """
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(figsize=(3.2 * len(CURVES), 2.6 * len(run_dirs)), layout="constrained")
    axes = figure.subplots(len(run_dirs), len(CURVES), squeeze=False)
    for row, (stage, run_dir) in zip(axes, run_dirs.items(), strict=True):
        path_of_lines = Path(run_dir) / "stats.jsonl"
        text = path_of_lines.read_text(encoding="utf-8") if path_of_lines.exists() else ""  # a mixture has no steps
        lines = [json.loads(line) for line in text.splitlines()]
        if stage == "autoencoder":  # its loss is its squared error
            lines = [{"squared_error" if name == "loss" else name: line[name] for name in line} for line in lines]
        shown = [name for name in CURVES if any(line.get(name) is not None for line in lines)]
        for axis in row[len(shown) :]:
            axis.set_axis_off()
        for axis, name in zip(row, shown, strict=False):
            steps, values = zip(
                *[(line["step"], line[name]) for line in lines if line.get(name) is not None], strict=True
            )
            axis.plot(steps, values)
            axis.set_title(f"{stage}: {CURVES[name]}", fontsize=8)
            axis.tick_params(labelsize=7)
            if min(values) > 0 and max(values) > 10 * min(values) and name not in ("kl", "active_units"):
                axis.set_yscale("log")
            if name == "active_units":
                axis.set_ylim(bottom=0)
                if num_factors and stage == "vae":
                    axis.axhline(num_factors, linestyle="--", color="grey", label=f"r = {num_factors}")
                    axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)
