"""Table 1: reconstruction error, likelihood and active units on MNIST as kappa grows, with and without skips.

    python examples/reproduce/table1.py --scale cpu --train_data_dir mnist

cpu: feed-forward encoder of 6 layers, residual decoder of 3 blocks of 2 layers plus affine skip, 512 units, gamma
analytic, 3 seeds; 4 minutes a cell on one core. Without skips: a plain decoder of the same depth. Squared
errors are those of the 10,000 test images, on pixels in [0, 1]; likelihoods of the first 2,000.
"""

import json
import sys

import matplotlib.pyplot as plt
import torch
from common import mean_and_spread, measure_posteriors, reproduce
from tqdm.auto import tqdm

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.metrics.likelihood import elbo, importance_weighted
from hf_vaeplus.metrics.reconstruction import squared_error
from hf_vaeplus.training.loop import train
from hf_vaeplus.training.options import stage_options
from hf_vaeplus.training.stages import build_stage

PAPER = {  # kappa -> reconstruction error, NLL, active units
    50: (4.98, -315, 10),
    100: (3.42, -580, 15),
    200: (2.74, -718, 20),
    400: (2.57, -743, 22),
    784: (2.78, -806, 22),
}
NETWORK = {"network": "mlp", "encoder_residual": False, "encoder_blocks": 2, "num_blocks": 3}
MNIST = {"dataset_name": "mnist", "resolution": 28}
CPU = {
    "kappas": [50, 100, 200, 400, 784],
    "seeds": 3,
    "plain_seeds": 3,
    "num_cells": 30,
    "num_likelihood": 2_000,
    "num_importance_samples": 64,
    "options": {
        **MNIST,
        "max_train_steps": 8_000,
        "train_batch_size": 128,
        "learning_rate": 1.0e-3,  # 2e-3 is faster up to kappa = 200; beyond, the latents' noise throws the fit back
        "max_grad_norm": 5_000.0,  # only a guard against spikes
        "mixed_precision": "bf16",
        "use_ema": True,
    },
    "model": {"hidden_dim": 512},
}
SETTINGS = {
    "smoke": {
        **CPU,
        "kappas": [4, 8],
        "seeds": 1,
        "num_cells": 4,
        "num_likelihood": 50,
        "num_importance_samples": 4,
        "options": {"dataset_name": "digits", "resolution": 8, "num_channels": 1, "max_train_steps": 30},
        "model": {"hidden_dim": 32},
    },
    "cpu": CPU,
    "gpu": {
        **CPU,
        "num_likelihood": 10_000,
        "options": {**CPU["options"], "max_train_steps": 100_000, "learning_rate": 3.0e-4},
        "model": {"hidden_dim": 1024},
    },
}
SKIPS = {
    "skips": {"decoder_residual": True, "affine_skip": True},
    "plain": {"decoder_residual": False, "affine_skip": False},
}


def measure(settings, cells, args):
    for seed in range(settings["seeds"]):
        for name in SKIPS if seed < settings["plain_seeds"] else ["skips"]:
            for kappa in args.kappas or settings["kappas"]:
                cell = f"{name}-{kappa}-{seed}"
                model = {**NETWORK, **settings["model"], **SKIPS[name], "latent_dim": kappa, "latent_init_scale": 0.1}
                options = {**settings["options"], "train_data_dir": args.train_data_dir, "model": model}
                cells(cell, lambda o=options, s=seed, c=cell: run(o, s, args.output_dir / c, settings))


def run(options, seed, folder, settings, start=None) -> dict:
    """Train one VAE and measure it on the test images; `start(model)` changes where it begins."""
    options = stage_options(
        "vae", {"vae": options}, seed=seed, output_dir=str(folder), resume_from_checkpoint="latest"
    )
    stage = build_stage(options)
    if start is not None:
        start(stage.model)
    model = train(stage, options)
    last = json.loads((folder / "stats.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    source = dict(train_data_dir=options.train_data_dir, resolution=options.resolution, num_channels=1)
    split = "test" if options.dataset_name == "mnist" else "train"
    images = load_images(options.dataset_name, **source, split=split, cache_dir=options.cache_dir)
    pipe = VAEPlusPipeline(model.cpu())
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    measured, latents = measure_posteriors(pipe, images, generator, batch_size=500)
    of_samples = squared_error(pipe.decode(latents, "pt", 500), images.pixels(0, len(images)))
    bounds = []
    for start in tqdm(range(0, settings["num_likelihood"], 250), desc="likelihood", leave=False):
        pixels = images.pixels(start, min(start + 250, settings["num_likelihood"]))
        weights = pipe.log_importance_weights(pixels, settings["num_importance_samples"], generator, 500)
        bounds.append(torch.stack([elbo(weights), importance_weighted(weights)]))
    negative_elbo, nll = (-torch.cat(bounds, 1).mean(1)).tolist()
    return {
        **measured,
        "squared_error_of_samples": float(of_samples.mean()),
        "nll": nll,
        "negative_elbo": negative_elbo,
        "train_squared_error_of_samples": last["squared_error"],
    }


def groups(cells):
    """(skips or plain, kappa) -> cells of all seeds."""
    found = {}
    for name, cell in cells.items():
        kind, kappa, _ = name.split("-")
        found.setdefault((kind, int(kappa)), []).append(cell)
    return dict(sorted(found.items(), key=lambda item: (item[0][0] == "plain", item[0][1])))


def table(cells):
    lines = [
        "| | kappa | squared error (paper) | NLL (paper) | -ELBO | active by variance (paper) | by Burda's count |",
        "|---" * 7 + "|",
    ]
    for (kind, kappa), runs in groups(cells).items():
        error, nll, units = PAPER.get(kappa, ("", "", "")) if kind == "skips" else ("", "", 0)
        row = [
            f"{mean_and_spread([run['squared_error'] for run in runs])} ({error})",
            f"{mean_and_spread([run['nll'] for run in runs], 0)} ({nll})",
            mean_and_spread([run["negative_elbo"] for run in runs], 0),
            f"{mean_and_spread([run['active_units_by_variance'] for run in runs], 1)} ({units})",
            mean_and_spread([run["active_units"] for run in runs], 1),
        ]
        lines.append(f"| {'with skips' if kind == 'skips' else 'without'} | {kappa} | " + " | ".join(row) + " |")
    return "\n".join(lines).replace(" ()", "")


def draw(cells, path):
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    names = ("squared_error", "nll", "active_units_by_variance")
    titles = ("squared error, test", "NLL, test (nats)", "active units by variance")
    for number, (axis, name, title) in enumerate(zip(axes, names, titles, strict=True)):
        for kind, label in (("skips", "with skips"), ("plain", "without")):
            points = [(kappa, cell[name]) for (k, kappa), runs in groups(cells).items() if k == kind for cell in runs]
            if points:
                axis.plot(*zip(*points, strict=True), "o", ms=4, label=label)
        axis.plot(list(PAPER), [row[number] for row in PAPER.values()], "k--", lw=1, label="paper")
        axis.set(title=title, xlabel="kappa", xscale="log")
    axes[0].set_yscale("log")
    axes[0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def add_options(parser):
    parser.add_argument("--train_data_dir", default=None, help="folder with MNIST's four idx files (not for smoke)")
    parser.add_argument("--kappas", type=int, nargs="+", help="only these (default: all of the scale)")


if __name__ == "__main__":
    sys.exit(reproduce("table1", __doc__, SETTINGS, measure, table, draw, add_options))
