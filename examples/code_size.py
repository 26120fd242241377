"""How long should a code be? Codes of 16 to 512 numbers at equal training time, from the error to the samples.

    OMP_NUM_THREADS=1 python examples/code_size.py --train_data_dir FOLDER --features extractor.onnx --publish

For each size an autoencoder trains for `--seconds` of processor time, then a first VAE (by the pull-back metric) and a
prior by flow matching for a fixed number of steps. All three are measured on held-out faces. The prior is not
distilled: its samples are those of the ODE, whose density is measured as well. The step of every size is timed first,
in turn and several times over, so that the machine's noise hits all alike. The same command again computes what is
missing. docs/code-size.md says what the numbers mean.
"""

import math
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from reproduce.common import BATCH, ROOT, Cells, fill_page

from hf_vaeplus.cli.flags import CommandParser, check_seed, local_path
from hf_vaeplus.cli.main import run_command
from hf_vaeplus.evaluation.evaluate import evaluate
from hf_vaeplus.evaluation.features import open_extractor
from hf_vaeplus.files import write_json
from hf_vaeplus.modeling_priors import VAEPlusPriorModel
from hf_vaeplus.progress import tqdm
from hf_vaeplus.provenance import provenance
from hf_vaeplus.training.loop import Stage, train
from hf_vaeplus.training.options import STAGES, StageOptions
from hf_vaeplus.training.randomness import derived_seed
from hf_vaeplus.training.stages import all_stage_options, build_stage, open_images, train_stages

PRIOR = dict(second_stage="flow_matching", distillation_share=0)
SCALES = {
    "smoke": dict(
        sizes=[4, 8], seconds=0.1, num_train=160, num_images=40, vae_steps=10, prior_steps=10, num_scored=10,
        num_importance_samples=2, rounds=2, trial_steps=6, held_out="train[160:]",
        preset={
            "common": dict(dataset_name="rendered-faces", resolution=32, max_train_samples=200, train_batch_size=16),
            "autoencoder": dict(model=dict(hidden_channels=[8, 16], num_blocks=1)),
            "vae": dict(model=dict(hidden_dim=32, num_blocks=1, reconstruction_space="pullback")),
            "second_stage": dict(**PRIOR, model=dict(hidden_dim=32, num_blocks=1)),
        },
    ),
    "cpu": dict(
        sizes=[16, 32, 64, 128, 256, 512], seconds=300.0, num_train=30_000, num_images=1_000, vae_steps=1_500,
        prior_steps=2_500, num_scored=60, num_importance_samples=8, rounds=5, trial_steps=24, held_out="validation",
        preset={
            "common": dict(
                dataset_name="celeba", resolution=64, random_flip=True, mixed_precision="auto", use_ema=True,
                checkpointing_steps=500,
            ),
            "autoencoder": dict(
                train_batch_size=64, learning_rate=1e-3, adam_weight_decay=0.1, max_grad_norm=300.0,
                model=dict(patch_size=8, hidden_channels=[32, 64, 128], num_blocks=1),
            ),
            "vae": dict(
                train_batch_size=64, max_grad_norm=20_000.0,
                model=dict(hidden_dim=512, num_blocks=3, reconstruction_space="pullback"),
            ),
            "second_stage": dict(**PRIOR, train_batch_size=256, model=dict(hidden_dim=512, num_blocks=3)),
        },
    ),
}  # fmt: skip
SPACES = {"codes": "by codes", "features": "by features"}  # of the guard against copies
WARM_UP = 3  # steps of a run that are not timed
HELP = {
    "sizes": "numbers in a code",
    "seconds": "processor seconds that each autoencoder trains for",
    "num_train": "training images",
    "num_images": "held-out images to measure on, and samples",
    "vae_steps": "steps of each first VAE",
    "prior_steps": "steps of each prior",
    "num_scored": "held-out images whose z the density of the prior is taken of",
}


# ---------------------------------------------------------------------------------------------------------- training


def options_of(size: int, settings: dict, folder: Path, steps: int, **overrides) -> dict[str, StageOptions]:
    """The options of the three stages for codes of `size` numbers; the autoencoder trains for `steps`."""
    own = {
        "autoencoder": ("latent_dim", steps),
        "vae": ("latent_dim", settings["vae_steps"]),
        "second_stage": (None, settings["prior_steps"]),
    }
    preset = {"common": settings["preset"]["common"]}
    for stage, (name, max_train_steps) in own.items():
        section = settings["preset"][stage]
        model = section["model"] | ({name: size} if name else {})
        preset[stage] = {**section, "max_train_steps": max_train_steps, "model": model}
    split = f"train[:{settings['num_train']}]"
    return all_stage_options(preset, folder, split=split, seed=settings["seed"], **overrides)


def train_and_time(stage: Stage, options: StageOptions) -> dict:
    """Train by the real loop.

    Returns:
        `dict` of `steps`, of `processor_seconds` for all of them, and of `seconds_per_step`, the mean over the steps
        of this call without the first ones. The latter two are `None` where too few steps were left to train.
    """
    ticks = []

    def prepare(*given):
        ticks.append(time.process_time() / torch.get_num_threads())
        return stage.prepare(*given)

    train(replace(stage, prepare=prepare), options)
    timed = ticks[WARM_UP:]
    per_step = (timed[-1] - timed[0]) / (len(timed) - 1) if len(timed) > 1 else None
    steps = options.max_train_steps
    return {"steps": steps, "processor_seconds": per_step and per_step * steps, "seconds_per_step": per_step}


def time_in_turn(sizes: list[int], settings: dict, images, **overrides) -> dict[int, float]:
    """Processor seconds of one step of each autoencoder: the median over rounds in which each size has its turn."""
    found = {size: [] for size in sizes}
    for _ in tqdm(range(settings["rounds"]), desc="time of a step"):
        for size, seconds in found.items():
            with tempfile.TemporaryDirectory() as folder:
                steps = WARM_UP + settings["trial_steps"]
                options = options_of(size, settings, Path(folder), steps, **overrides)["autoencoder"]
                stage = replace(build_stage(options, images), preview=None, finish=None)
                seconds.append(train_and_time(stage, options)["seconds_per_step"])
    return {size: median(seconds) for size, seconds in found.items()}


# --------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def densities(prior: VAEPlusPriorModel, z: torch.Tensor) -> dict:
    """How well a prior predicts z, beside N(0, I) and the Gaussian with the moments of the training data.

    Args:
        prior: its dimensions that are not active are N(0, 1), in the Gaussian as well.
        z (`torch.Tensor` of shape `(num_scored >= 2, latent_dim)`): one sample of the posterior of each image.

    Returns:
        `dict`, in nats: `nll`, the mean of -log p(z) by name of p; `nll_per_active_dimension`, that of the active
        dimensions alone, divided by their number; `gain`, of the prior over the Gaussian, with its `standard_error`;
        `is_exact`, whether the density of the prior is no estimate; `num_scored`.
    """
    active = list(prior.config.active_dims or range(z.shape[1]))
    standard = _log_normal(z)
    rest = standard - _log_normal(z[:, active])
    gaussian = _log_normal(prior.whitened(z)) - prior.input_root.double().diagonal().log().sum() + rest
    learned = torch.cat([prior.log_prob(part).double() for part in tqdm(z.split(50), desc="densities")])
    log_probs = {"N(0, I)": standard, "Gaussian": gaussian, "prior": learned}
    gain = learned - gaussian
    return {
        "num_scored": len(z),
        "is_exact": prior.log_prob_is_exact,
        "nll": {name: -float(each.mean()) for name, each in log_probs.items()},
        "nll_per_active_dimension": {
            name: -float((each - rest).mean()) / len(active) for name, each in log_probs.items()
        },
        "gain": float(gain.mean()),
        "standard_error": float(gain.std()) / math.sqrt(len(z)),
    }


def _log_normal(y: torch.Tensor) -> torch.Tensor:
    return -0.5 * (y.double().square() + math.log(2 * math.pi)).sum(1)


def measure(pipe, held_out, training_images, extractor, settings: dict) -> dict:
    """Everything that is measured of a pipeline: by `evaluate`, as `vaeplus evaluate` does, and by `densities`."""
    started = time.process_time()
    pipe.set_progress_bar_config(disable=True)
    found = evaluate(
        pipe, held_out, [extractor], num_images=settings["num_images"], training_images=training_images,
        num_training_images=len(training_images), num_importance_samples=settings["num_importance_samples"],
        seed=settings["seed"],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(derived_seed(settings["seed"], 5))
    z = pipe.encode(held_out.pixels(0, settings["num_scored"]), BATCH).sample(generator=generator)
    found["densities"] = densities(pipe.second_stage, z)
    return {**found, "processor_seconds": (time.process_time() - started) / torch.get_num_threads()}


def row_of(size: int, cells: dict) -> dict:
    """The numbers of one size, from its finished cells; distances are in units of Downsample's."""
    trained = {stage: cells[f"{size}-{stage}"] for stage in STAGES}
    found = cells[f"{size}-evaluation"]
    sets, densities, samples = found["sets"], found["densities"], found["sets"]["second_stage"]
    (extractor,) = samples["distances"]
    distance = {name: each["distances"][extractor]["frechet_over_downsample"] for name, each in sets.items()}
    elbo = found["likelihood"]["elbo"]
    return {
        "size": size,
        "steps": {stage: each["steps"] for stage, each in trained.items()},
        "processor_seconds": {
            **{stage: each["processor_seconds"] for stage, each in trained.items()},
            "evaluation": found["processor_seconds"],
        },
        "autoencoder_squared_error": found["autoencoder_squared_error"],
        "squared_error": found["squared_error"],
        "active_units": found["vae"]["active_units"],
        "active_units_by_variance": found["vae"]["active_units_by_variance"],
        "dimensions_of_the_prior": found["second_stage"]["active_dims"],
        "gamma": found["vae"]["gamma"],
        "distance_of_downsample": sets["downsample"]["distances"][extractor]["frechet"],
        "distance_of_real_images": distance.get("real"),
        "autoencoder_distance": distance["autoencoder"],
        "reconstruction_distance": distance["reconstruction"],
        "generation_distance": distance["second_stage"],
        "generation_over_reconstruction": distance["second_stage"] / distance["reconstruction"],
        "densities": densities,
        # log p(x) >= E_q[log p(x|z) - log q(z|x) + log p(z)]: only the last term depends on the prior.
        "elbo": {"N(0, I)": elbo, "prior": elbo + densities["nll"]["N(0, I)"] - densities["nll"]["prior"]},
        "memorised": {
            name: {
                "codes": sets[name]["memorised_codes"],
                "features": sets[name]["distances"][extractor]["memorised"],
            }
            for name in ("reconstruction", "second_stage")
        },
        "warnings": samples["warnings"],
        "provenance": found["provenance"],
    }


# --------------------------------------------------------------------------------------------------------- reporting


def table(rows: list[dict]) -> str:
    """Markdown: a table of images and one of latents, a line for each size."""
    images = [
        {
            "code": f"{row['size']}",
            "steps": f"{row['steps']['autoencoder']:,}",
            "squared error": f"{row['autoencoder_squared_error']:.1f}",
            "with first VAE": f"{row['squared_error']:.1f}",
            "reconstruction": f"{row['reconstruction_distance']:.2f}",
            "generation": f"{row['generation_distance']:.2f}",
            "generation / reconstruction": f"{row['generation_over_reconstruction']:.2f}",
        }
        | {f"memorised, {title}": shares_memorised(row, space) for space, title in SPACES.items()}
        for row in rows
    ]
    latents = [
        {
            "code": f"{row['size']}",
            "active": f"{row['active_units']}",
            "-log p(z), prior": f"{row['densities']['nll']['prior']:.1f}",
            "Gaussian": f"{row['densities']['nll']['Gaussian']:.1f}",
            "gain": f"{row['densities']['gain']:.1f} ± {row['densities']['standard_error']:.1f}",
            "per active dimension, prior": f"{row['densities']['nll_per_active_dimension']['prior']:.3f}",
            "per active dimension, Gaussian": f"{row['densities']['nll_per_active_dimension']['Gaussian']:.3f}",
            "ELBO, prior": f"{row['elbo']['prior']:,.0f}",
            "ELBO, N(0, I)": f"{row['elbo']['N(0, I)']:,.0f}",
        }
        for row in rows
    ]
    return "\n\n".join(map(_markdown, (images, latents)))


def shares_memorised(row: dict, space: str) -> str:
    """The share of the samples and, in brackets, of the reconstructions of held-out images."""
    samples, reconstructions = (row["memorised"][name][space]["share"] for name in ("second_stage", "reconstruction"))
    return f"{samples:.1%} ({reconstructions:.1%})"


def _markdown(lines: list[dict]) -> str:
    cells = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def draw(rows: list[dict], path: Path):
    """The curves over the size of the code, as a PNG file."""
    panels = {
        "squared error of a held-out image": {
            "autoencoder": lambda row: row["autoencoder_squared_error"],
            "with first VAE": lambda row: row["squared_error"],
        },
        "distance to held-out images (Downsample = 1)": {
            "reconstructions": lambda row: row["reconstruction_distance"],
            "samples": lambda row: row["generation_distance"],
            "samples / reconstructions": lambda row: row["generation_over_reconstruction"],
            "other real images": lambda row: row["distance_of_real_images"],
        },
        "share that the guard takes for copies": {
            f"{title}, {SPACES[space]}": lambda row, name=name, space=space: row["memorised"][name][space]["share"]
            for name, title in (("second_stage", "samples"), ("reconstruction", "reconstructions"))
            for space in SPACES
        }
        | {"held-out images": lambda row: 0.05},
        "active dimensions": {
            "of the first VAE": lambda row: row["active_units"],
            "all": lambda row: row["size"],
        },
        "-log p(z), nats per active dimension": {
            name: lambda row, name=name: row["densities"]["nll_per_active_dimension"][name]
            for name in ("Gaussian", "prior")
        },
        "ELBO of a held-out image, nats": {
            name: lambda row, name=name: row["elbo"][name] for name in ("N(0, I)", "prior")
        },
    }
    from_zero = ("distance", "share")
    grey = ("held-out images", "all", "other real images")  # to compare with
    sizes = [row["size"] for row in rows]
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for name, value in curves.items():
            values = [value(row) for row in rows]
            if None not in values:
                style = dict(color="grey", linestyle="--") if name in grey else dict(marker="o")
                axis.plot(sizes, values, label=name, **style)
        axis.set_title(title, fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, map(str, sizes))
        if title == "active dimensions":
            axis.set_yscale("log", base=2)
            axis.set_yticks(sizes, map(str, sizes))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if title.startswith(from_zero):
            axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
    figure.supxlabel("numbers in the code", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


# ----------------------------------------------------------------------------------------------------------- command


def parse_arguments():
    parser = CommandParser(prog="code_size.py", description=__doc__)
    scales = "smoke: seconds, drawings; cpu: an hour and a half of one core, CelebA"
    parser.add_argument("--scale", choices=SCALES, default="cpu", help=scales)
    parser.add_argument("--train_data_dir", type=local_path, help="folder of CelebA as parquet files (not for smoke)")
    parser.add_argument("--features", default="pixels:16", help="an .onnx file, fid:WEIGHTS, or pixels:SIZE")
    for name, help in HELP.items():
        default = SCALES["cpu"][name]
        many = dict(nargs="+") if name == "sizes" else {}
        kind = float if name == "seconds" else int
        shown = " ".join(map(str, default)) if many else default
        parser.add_argument(f"--{name}", type=kind, **many, help=f"{help} (default: {shown}; fewer for smoke)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--output_dir", type=local_path, help="finished work (default: runs/code_size-<scale>)")
    told = "(default: results/code_size.json; for smoke in --output_dir)"
    parser.add_argument("--output", type=local_path, help=f"the numbers, written after each size {told}")
    parser.add_argument("--publish", action="store_true", help="copy table and figure to docs/")
    return parser.parse_args()


def main():
    args = parse_arguments()
    given = {name: getattr(args, name) for name in HELP if getattr(args, name) is not None}
    settings = {**SCALES[args.scale], **given, "seed": args.seed, "features": Path(args.features).name}
    for name in HELP:
        smallest = min(settings[name]) if name == "sizes" else settings[name]
        least = 2 if name in ("num_images", "num_scored") else 1
        if name == "seconds" and not 0 < smallest < math.inf:
            raise ValueError(f"--seconds must be positive, got {smallest}.")
        if name != "seconds" and smallest < least:
            raise ValueError(f"--{name} must be at least {least}, got {smallest}.")
    check_seed(args.seed)
    if args.scale == "cpu" and not args.train_data_dir:
        raise ValueError("--train_data_dir is missing: name the folder of CelebA as parquet files.")
    sizes = sorted(set(settings.pop("sizes")))  # more of them can be asked for later
    output_dir = Path(args.output_dir or f"runs/code_size-{args.scale}")
    output = Path(args.output or (output_dir if args.scale == "smoke" else ROOT / "results") / "code_size.json")
    overrides = dict(train_data_dir=args.train_data_dir, dataset_name=settings["preset"]["common"]["dataset_name"])

    # What is refused is refused before the hours.
    extractor = open_extractor(args.features)
    options = options_of(sizes[0], settings, output_dir, 1, **overrides)["autoencoder"]
    images = open_images(options)
    training_images = open_images(replace(options, random_flip=False))
    held_out = open_images(replace(options, split=settings["held_out"], random_flip=False))

    cells = Cells(output_dir, settings, total=5 * len(sizes))

    @cache
    def paces() -> dict[int, float]:
        missing = [size for size in sizes if not (output_dir / "cells" / f"{size}-pace.json").exists()]
        return time_in_turn(missing, settings, images, **overrides)

    for size in sizes:
        cells(f"{size}-pace", lambda size=size: {"seconds_per_step": paces()[size]})
    rows = []
    for size in sizes:
        folder = output_dir / str(size)
        steps = max(1, round(settings["seconds"] / cells.results[f"{size}-pace"]["seconds_per_step"]))
        options = options_of(size, settings, folder, steps, **overrides)
        for stage, each in options.items():
            cells(f"{size}-{stage}", lambda each=each: train_and_time(build_stage(each, images), each))

        def measured(options=options, folder=folder):
            pipe = train_stages(options, dict.fromkeys(options, images), folder)  # trained already: saves the pipeline
            return measure(pipe, held_out, training_images, extractor, settings)

        cells(f"{size}-evaluation", measured)
        rows.append(row_of(size, cells.results))
        report(rows, settings, extractor, len(training_images), output_dir, output)
    cells.bar.close()
    print(f"\n{table(rows)}\n\nsaved: {output} and, in {output_dir}, code-size.png and table.md")
    if args.publish:
        draw(rows, ROOT / "docs" / "images" / "code-size.png")
        fill_page("code-size.md", "code_size", table(rows))


def report(rows: list[dict], settings: dict, extractor, num_training: int, output_dir: Path, output: Path):
    """Write what is finished so far: the numbers, a table and the figure."""
    output.parent.mkdir(parents=True, exist_ok=True)
    found = {**provenance(), "settings": settings, "extractor": extractor.description(), "num_training": num_training}
    write_json(output, {**found, "rows": rows})
    (output_dir / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    draw(rows, output_dir / "code-size.png")


if __name__ == "__main__":
    sys.exit(run_command(main))
