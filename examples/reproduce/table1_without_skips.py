"""The last line of Table 1, all units switched off without skips: which plain networks do that.

    python examples/reproduce/table1_without_skips.py --scale cpu --train_data_dir mnist

cpu: MNIST, kappa = 200, plain encoder and decoder, 512 units, one seed, 2,000 steps; a minute or two a cell on
one core. Varied: how gamma is treated, how the weights start, how deep the decoder is.
"""

import sys

import torch
from common import reproduce
from table1 import MNIST, NETWORK, SKIPS, run


def torch_start(model):
    """Weights and biases uniform in +-1 / sqrt(fan_in), a third of the variance that keeps a signal's size."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()


FROM_ONE = {"gamma": "learned", "gamma_init": 1.0}
VARIANTS = {  # name -> fields of the config, start
    "as in Table 1 (gamma analytic)": ({}, None),
    "gamma learnt from 1": (FROM_ONE, None),
    "gamma fixed at 1": ({"gamma": "fixed", "gamma_init": 1.0}, None),
    "torch's start, gamma analytic": ({}, torch_start),
    "torch's start, gamma learnt from 1": (FROM_ONE, torch_start),
    "20 layers": ({"num_blocks": 9}, None),
    "20 layers, torch's start, gamma learnt from 1": ({"num_blocks": 9, **FROM_ONE}, torch_start),
    "20 layers, gamma learnt from 1": ({"num_blocks": 9, **FROM_ONE}, None),
}
CPU = {
    "latent_dim": 200,
    "num_cells": len(VARIANTS),
    "num_likelihood": 250,
    "num_importance_samples": 16,
    "options": {
        **MNIST,
        "max_train_steps": 2_000,
        "train_batch_size": 128,
        "max_grad_norm": 5_000.0,
        "mixed_precision": "bf16",
        "use_ema": True,
    },
    "model": {"hidden_dim": 512},
}
SETTINGS = {
    "smoke": {
        **CPU,
        "latent_dim": 8,
        "num_likelihood": 50,
        "num_importance_samples": 4,
        "options": {"dataset_name": "digits", "resolution": 8, "num_channels": 1, "max_train_steps": 10},
        "model": {"hidden_dim": 16},
    },
    "cpu": CPU,
    "gpu": {**CPU, "options": {**CPU["options"], "max_train_steps": 20_000}, "model": {"hidden_dim": 1024}},
}


def measure(settings, cells, args):
    for name, (changes, start) in VARIANTS.items():
        model = {**NETWORK, **SKIPS["plain"], **settings["model"], "latent_dim": settings["latent_dim"], **changes}
        options = {**settings["options"], "train_data_dir": args.train_data_dir, "model": model}
        folder = args.output_dir / name.replace(" ", "-")
        cells(name, lambda o=options, f=folder, s=start: run(o, 0, f, settings, s))


def table(cells):
    lines = [
        "| plain networks | squared error | KL | gamma | active by variance | by Burda's count |",
        "|---" * 6 + "|",
    ]
    for name in VARIANTS:
        if name in cells:
            cell = cells[name]
            numbers = f"{cell['squared_error']:.2f} | {cell['kl']:.1f} | {cell['gamma']:.3g}"
            counts = f"{cell['active_units_by_variance']} | {cell['active_units']}"
            lines.append(f"| {name} | {numbers} | {counts} |")
    return "\n".join(lines)


def add_options(parser):
    parser.add_argument("--train_data_dir", default=None, help="folder with MNIST's four idx files (not for smoke)")


if __name__ == "__main__":
    sys.exit(reproduce("table1_without_skips", __doc__, SETTINGS, measure, table, add_options=add_options))
