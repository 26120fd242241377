"""What every reproduction shares: one command line, work that resumes, and numbers that reach the pages by program.

A reproduction is a set of *cells* (one setting, one seed: seconds to an hour each) whose results are small dicts. A
finished cell is a JSON file in `--output_dir`; the same command again computes what is missing. From all cells come
`results.json`, a table and a plot; `--publish` copies them to `results/`, `docs/images/` and, between the markers
`<!-- name -->` and `<!-- /name -->`, into `docs/paper.md`.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from hf_vaeplus.cli.flags import CommandParser, local_path
from hf_vaeplus.cli.main import run_command
from hf_vaeplus.metrics.latents import PosteriorStatistics
from hf_vaeplus.metrics.reconstruction import squared_error
from hf_vaeplus.provenance import provenance
from hf_vaeplus.training.options import load_preset
from hf_vaeplus.training.randomness import derived_seed
from hf_vaeplus.training.stages import open_images

ROOT = Path(__file__).resolve().parents[2]
BATCH = 250  # images at a time, in all that is not training


class Cells:
    """Results by name, each computed once and kept as `output_dir/cells/<name>.json`."""

    def __init__(self, output_dir: Path, settings: dict, total: int):
        provenance()  # now: the commit of the code that was loaded
        self.output_dir, self.results = output_dir, {}
        self.bar = tqdm(total=total, desc=output_dir.name, unit="cell")
        (output_dir / "cells").mkdir(parents=True, exist_ok=True)
        written = output_dir / "settings.json"
        settings = json.loads(json.dumps(settings))
        if written.exists() and json.loads(written.read_text(encoding="utf-8")) != settings:
            raise ValueError(
                f"{output_dir} holds the cells of other settings (see settings.json): choose another --output_dir."
            )
        written.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def __call__(self, name: str, compute: Callable[[], dict]) -> dict:
        """The result `name`: read if it is there, else `compute()`, with where and when it was computed."""
        path = self.output_dir / "cells" / f"{name}.json"
        if not path.exists():
            self.bar.set_postfix_str(name)
            result = {**compute(), "provenance": provenance()}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, path)
        self.results[name] = json.loads(path.read_text(encoding="utf-8"))
        self.bar.update()
        return self.results[name]

    def read_all(self):
        """Take what is finished, oldest first, and compute nothing."""
        paths = sorted((self.output_dir / "cells").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        if not paths:
            raise ValueError(f"{self.output_dir} holds no finished cell: run without --so_far first.")
        self.results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def preset_of(settings: dict) -> dict:
    """The preset that `settings` name, a file beside the scripts or one of the package, with a second VAE."""
    name = settings["preset"]
    beside = Path(__file__).with_name(f"{name}.yaml")
    preset = load_preset(beside if beside.is_file() else name)
    preset["second_stage"]["second_stage"] = "vae"
    return preset


def reproduce(
    name: str,
    description: str,
    settings: dict[str, dict],
    measure: Callable,
    table: Callable[[dict], str],
    draw: Callable[[dict, Path], None] | None = None,
    add_options: Callable | None = None,
) -> int:
    """Run one reproduction from the command line; returns the exit code.

    Args:
        name: of the result: `results/<name>.json`.
        description: what is reproduced, first lines of `--help`.
        settings: scale -> settings, JSON values; `num_cells` says how many cells there will be.
        measure: `(settings, cells, args)`; calls `cells(cell_name, compute)` for every cell.
        table: cells -> Markdown.
        draw: `(cells, path)`: writes a PNG.
        add_options: adds flags to the parser. Those that change results belong into the cell's name or result.
    """
    return run_command(lambda: _run(name, description, settings, measure, table, draw, add_options))


def _run(name, description, settings, measure, table, draw, add_options):
    parser = CommandParser(prog=f"{name}.py", description=description)
    scales = "smoke: seconds; cpu...: two cores; gpu: a GPU"
    parser.add_argument("--scale", choices=list(settings), default="cpu", help=scales)
    parser.add_argument(
        "--output_dir", type=local_path, default=None, help=f"finished work (default: runs/reproduce/{name}-<scale>)"
    )
    parser.add_argument("--so_far", action="store_true", help="compute nothing: table and plot of the finished cells")
    parser.add_argument("--publish", action="store_true", help="copy numbers, table and plot to results/ and docs/")
    if add_options:
        add_options(parser)
    args = parser.parse_args()
    output_dir = Path(args.output_dir or f"runs/reproduce/{name}-{args.scale}")
    args.output_dir = output_dir
    chosen = settings[args.scale]
    cells = Cells(output_dir, chosen, chosen["num_cells"])
    if args.so_far:
        cells.read_all()
    else:
        measure(chosen, cells, args)
    cells.bar.close()
    results = {**provenance(), "scale": args.scale, "settings": chosen, "cells": cells.results}
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    markdown = table(cells.results)
    (output_dir / "table.md").write_text(markdown + "\n", encoding="utf-8")
    if draw:
        draw(cells.results, output_dir / f"{name}.png")
    print(f"\n{markdown}\n\nsaved in {output_dir}: results.json table.md{f' {name}.png' if draw else ''}")
    if args.publish:
        _publish(name, output_dir, markdown, has_picture=draw is not None)


def _publish(name: str, output_dir: Path, markdown: str, has_picture: bool):
    fill_page("paper.md", name, markdown)
    shutil.copy(output_dir / "results.json", ROOT / "results" / f"{name}.json")
    if has_picture:
        shutil.copy(output_dir / f"{name}.png", ROOT / "docs" / "images" / f"{name}.png")


def fill_page(page: str, name: str, markdown: str):
    """Put `markdown` between the markers `<!-- name -->` and `<!-- /name -->` of a page in docs/.

    Raises:
        ValueError: the page does not have this pair of markers exactly once.
    """
    path = ROOT / "docs" / page
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text, count = place.subn(lambda match: match[1] + markdown + "\n" + match[2], path.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{path} must have one place between <!-- {name} --> and <!-- /{name} -->, found {count}.")
    path.write_text(text, encoding="utf-8")


def mean_and_spread(values: list[float], digits: int = 2) -> str:
    """`mean ± (max - min) / 2` of a few seeds, for a table."""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def held_out(options, num_train: int, num_test: int) -> tuple:
    """The images that `options` name, none of them mirrored: the first `num_train`, and the `num_test` after them."""
    options = replace(options, max_train_samples=num_train + num_test, random_flip=False)
    return tuple(open_images(replace(options, split=f"train[{rows}]")) for rows in (f":{num_train}", f"{num_train}:"))


def uint8_batches(images, count: int | None = None) -> Iterator[torch.Tensor]:
    """The first `count` images, or all, with a progress bar: uint8 of shape `(batch, C, H, W)`."""
    count = len(images) if count is None else count
    for start in tqdm(range(0, count, BATCH), desc="real", leave=False):
        yield images.batch(range(start, min(start + BATCH, count)))["pixel_values"]


def sample_batches(pipe, count: int, seed: int) -> Iterator[torch.Tensor]:
    """Samples of a pipeline before they are rounded, with a progress bar: float32 in [0, 1]."""
    for start in tqdm(range(0, count, BATCH), desc="samples", leave=False):
        generator = torch.Generator().manual_seed(derived_seed(seed, 4, start))
        yield pipe(min(BATCH, count - start), generator, decode_batch_size=BATCH, output_type="pt").images


def measure_posteriors(pipe, images, generator: torch.Generator, batch_size: int) -> tuple[dict, torch.Tensor]:
    """What posterior and posterior mean of the first VAE say of `images`, and one posterior sample of each image."""
    statistics, errors, latents = PosteriorStatistics(pipe.vae.config.latent_dim), [], []
    for start in tqdm(range(0, len(images), batch_size), desc="measuring", leave=False):
        pixels = images.pixels(start, start + batch_size)
        posterior = pipe.encode(pixels, batch_size)
        statistics.update(posterior.mean, posterior.logvar)
        errors.append(squared_error(pipe.decode(posterior.mean, "pt", batch_size), pixels))
        latents.append(posterior.sample(generator=generator))
    measured = {
        "squared_error": float(torch.cat(errors).mean()),
        "kl": float(statistics.kl_per_dimension().sum()),
        "active_units": statistics.active_units(),
        "active_units_by_variance": statistics.active_units_by_variance(),
        "gamma": float(pipe.vae.decoder_log_variance.detach().exp()),
    }
    return measured, torch.cat(latents)
