"""Table 2 and Figure 1: a learnable gamma against gamma fixed at its final value, from the same start.

    python examples/reproduce/table2_figure1.py --scale cpu --train_data_dir celeba

cpu: CelebA at 64 x 64 and 128 x 128, 20,000 faces to train on, 5,000 others to measure on, convolutional VAE on
pixels with kappa = 256 and 672, 3 seeds each; an hour on one core. Reported: squared error of the posterior mean,
squared MMD between q(z) and N(0, I), and the size of the gradient with respect to z at every step.
"""

import shutil
import sys
from statistics import mean

import matplotlib.pyplot as plt
import torch
from common import BATCH, held_out, mean_and_spread, measure_posteriors, reproduce

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.metrics.mmd import imq_mmd
from hf_vaeplus.modeling_vaeplus import VAEPlusVAEModel
from hf_vaeplus.training.loop import train
from hf_vaeplus.training.options import stage_options
from hf_vaeplus.training.stages import build_stage

CELEBA = {"dataset_name": "celeba", "random_flip": True}
NETWORK = {"hidden_channels": [64, 128], "latent_dim": 256}
CPU = {
    "num_train": 20_000,
    "num_test": 5_000,
    "seeds": 3,
    "num_cells": 12,
    "options": {"train_batch_size": 64, "mixed_precision": "bf16", "use_ema": True},
    "sizes": {  # one network on one grid of 8 x 8 patches
        "64": {**CELEBA, "max_train_steps": 2_000, "model": {**NETWORK, "patch_size": 8}},
        "128": {**CELEBA, "max_train_steps": 1_400, "model": {**NETWORK, "latent_dim": 672, "patch_size": 16}},
    },
}
SETTINGS = {
    "smoke": {
        "num_train": 256,
        "num_test": 100,
        "seeds": 1,
        "num_cells": 2,
        "options": {"max_train_steps": 120, "train_batch_size": 16},
        "sizes": {
            "32": {
                "dataset_name": "rendered-faces",
                "model": {"patch_size": 8, "hidden_channels": [16], "latent_dim": 8},
            }
        },
    },
    "cpu": CPU,
    "gpu": {
        **CPU,
        "options": {**CPU["options"], "max_train_steps": 40_000},
        "sizes": {
            "64": {**CELEBA, "model": {"num_conv_blocks": 2, "latent_dim": 256}},
            "128": {
                **CELEBA,
                "model": {
                    "patch_size": 4,
                    "hidden_channels": [128, 256, 256, 256],
                    "num_conv_blocks": 2,
                    "latent_dim": 256,
                },
            },
        },
    },
}
FIRST = 100  # iterations over which the gradients are compared


def measure(settings, cells, args):
    sizes = args.sizes or [*settings["sizes"]]
    if unknown := set(sizes) - settings["sizes"].keys():
        raise ValueError(f"--sizes {min(unknown)} is not of this scale: choose from {', '.join(settings['sizes'])}.")
    for size in sizes:
        special = settings["sizes"][size]
        for seed in args.seeds or range(settings["seeds"]):
            _compare(f"{size}-{seed}", size, special, seed, settings, cells, args)


def _compare(name, size, special, seed, settings, cells, args):
    def run(kind, **gamma):
        folder = args.output_dir / f"{name}-{kind}"
        shutil.rmtree(folder, ignore_errors=True)  # of a cell that was interrupted: its list of gradients is lost
        options = {**settings["options"], **special, "train_data_dir": args.train_data_dir, "resolution": int(size)}
        options["model"] = {"network": "conv", "affine_skip": False, **special["model"], **gamma}
        options["max_train_samples"] = settings["num_train"]
        once = {"checkpointing_steps": 10**9, "logging_steps": 10, "output_dir": str(folder)}
        options = stage_options("vae", {"vae": options}, seed=seed, **once)
        model, gradients = train_and_watch(options)
        return {**judge(model, options, settings), "gradients": [float(f"{each:.4g}") for each in gradients]}

    learnable = cells(f"{name}-learnable", lambda: run("learnable", gamma="learned"))
    cells(f"{name}-fixed", lambda: run("fixed", gamma="fixed", gamma_init=learnable["gamma"]))


def train_and_watch(options):
    """Train; the model, and at each step the mean over the batch of ||d loss of one image / dz||."""
    stage = build_stage(options)
    norms, decode = [], stage.model.decode

    def watched(latents, condition=None):
        if latents.requires_grad:
            latents.register_hook(lambda gradient: norms.append(float(gradient.norm(dim=1).mean() * len(gradient))))
        return decode(latents, condition)

    stage.model.decode = watched
    train(stage, options)
    return VAEPlusVAEModel.from_pretrained(options.output_dir).eval(), norms


def judge(model, options, settings) -> dict:
    """What is said of the trained model, measured on the images after those it was trained on."""
    pipe = VAEPlusPipeline(model)
    pipe.set_progress_bar_config(disable=True)
    _, images = held_out(options, settings["num_train"], settings["num_test"])
    generator = torch.Generator().manual_seed(0)
    measured, latents = measure_posteriors(pipe, images, generator, BATCH)
    prior = torch.randn(latents.shape, generator=generator)
    return {
        **measured,
        "mmd": float(imq_mmd(latents, prior)),
        "mmd_of_two_priors": float(imq_mmd(prior, torch.randn(latents.shape, generator=generator))),
    }


def pairs(cells):
    """size -> list of (learnable, fixed), one per seed."""
    found = {}
    for name, cell in cells.items():
        if name.endswith("-learnable"):
            pair = cell, cells[name.removesuffix("learnable") + "fixed"]
            found.setdefault(name.split("-")[0], []).append(pair)
    return found


def table(cells):
    lines = [
        "| size | gamma | squared error | MMD | KL | active units (variance, Burda) | gradient, first 100 steps |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios = []
    for size, both in pairs(cells).items():
        for title, which in (("learnable", 0), ("fixed", 1)):
            runs = [pair[which] for pair in both]
            units = (f"{min(run[name] for run in runs)} to {max(run[name] for run in runs)}"
                     for name in ("active_units_by_variance", "active_units"))  # fmt: skip
            row = [
                mean_and_spread([run["squared_error"] for run in runs]),
                mean_and_spread([run["mmd"] for run in runs], 4),
                mean_and_spread([run["kl"] for run in runs], 1),
                ", ".join(units),
                mean_and_spread([mean(run["gradients"][:FIRST]) for run in runs], 0),
            ]
            lines.append(f"| {size} | {title} | " + " | ".join(row) + " |")
        mmd = mean_and_spread([fixed["mmd"] / learnable["mmd"] for learnable, fixed in both])
        error = mean_and_spread([fixed["squared_error"] / learnable["squared_error"] for learnable, fixed in both], 3)
        size_of = mean_and_spread(
            [mean(fixed["gradients"][:FIRST]) / mean(learnable["gradients"][:FIRST]) for learnable, fixed in both], 1
        )
        ratios.append(f"{size} x {size}: fixed over learnable, MMD {mmd}, squared error {error}, gradient {size_of}.")
    return "\n".join([*lines, "", *ratios])


def draw(cells, path):
    found = pairs(cells)
    figure, axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), 3.4), squeeze=False, layout="constrained")
    for axis, (size, both) in zip(axes[0], found.items(), strict=True):
        for title, which, colour in (("learnable gamma", 0, "tab:red"), ("fixed gamma = gamma*", 1, "tab:blue")):
            for number, pair in enumerate(both):
                axis.plot(pair[which]["gradients"], color=colour, lw=0.6, label=None if number else title)
        axis.set(title=f"{size} x {size}", xlabel="step", ylabel="||d loss / dz||, mean over images", yscale="log")
        axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def add_options(parser):
    parser.add_argument("--sizes", nargs="+", help="only these (default: all of the scale)")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these (default: all of the scale)")
    parser.add_argument("--train_data_dir", default=None, help="folder with CelebA as parquet files (not for smoke)")


if __name__ == "__main__":
    sys.exit(reproduce("table2_figure1", __doc__, SETTINGS, measure, table, draw, add_options))
