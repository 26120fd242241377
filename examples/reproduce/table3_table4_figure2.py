"""Tables 3 and 4, Figure 2: distances and bins of reconstructions and samples, VAE+ beside its baselines.

    python examples/reproduce/table3_table4_figure2.py --scale cpu --train_data_dir celeba --features extractor.onnx

cpu: CelebA at 64 x 64, 20,000 faces to train on, 10,000 others to compare with; two hours and a half on one core.
cpu128: CelebA at 128 x 128, with a short training: 1,500 steps of each autoencoder; an hour and a quarter on one core.
All three models have the same structure and as many steps: VAE+ in three stages, VAE and WAE-MMD end to end.
"""

import json
import re
import sys
import time
from functools import cache

import matplotlib.pyplot as plt
import torch
from common import BATCH, held_out, mean_and_spread, preset_of, reproduce, uint8_batches
from tqdm.auto import tqdm

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.data.pixels import to_uint8
from hf_vaeplus.evaluation.evaluate import Judge, downsample, sample_images, sample_mixture
from hf_vaeplus.evaluation.features import open_extractor
from hf_vaeplus.evaluation.summaries import summarize
from hf_vaeplus.metrics.ndb import NDB
from hf_vaeplus.modeling_vaeplus import VAEPlusAutoencoderModel, VAEPlusVAEModel
from hf_vaeplus.pictures import image_grid
from hf_vaeplus.training.codes import encode_dataset, load_frozen
from hf_vaeplus.training.options import stage_options
from hf_vaeplus.training.stages import run_stage

BASELINES = ("vae", "wae-mmd")
MMD_WEIGHT = 500.0  # at 64 x 64; as much for a pixel at other sizes
SETTINGS = {
    "smoke": {"preset": "tiny", "num_train": 160, "num_test": 80, "bins": [4, 8], "seeds": 1, "num_cells": 20},
    "cpu": {
        "preset": "celeba-cpu",
        "num_train": 20_000,
        "num_test": 10_000,
        "bins": [100, 200, 300],
        "seeds": 3,
        "num_cells": 26,
    },
    "cpu128": {
        "preset": "celeba128-cpu",
        "autoencoder_steps": 1_500,  # those of the baselines, too
        "num_train": 20_000,
        "num_test": 3_000,
        "num_bin_images": 5_000,  # all of them take k-means half an hour
        "bins": [100, 200, 300],
        "seeds": 1,
        "num_cells": 20,
    },
    "gpu": {
        "preset": "celeba128",
        "num_train": 152_770,  # of the 162,770 that CelebA's split has
        "num_test": 10_000,
        "bins": [100, 200, 300],
        "seeds": 3,
        "num_cells": 26,
    },
}


def measure(settings, cells, args):
    preset = preset_of(settings)
    num_train = args.num_train or settings["num_train"]
    preset["common"]["max_train_samples"] = num_train
    if "autoencoder_steps" in settings:
        preset["autoencoder"]["max_train_steps"] = settings["autoencoder_steps"]
    source = {"train_data_dir": args.train_data_dir, "resume_from_checkpoint": "latest"}
    folder = {name: str(args.output_dir / name) for name in ("autoencoder", "first_vae", *BASELINES)}

    def train(name, stage, preset=preset, **overrides):
        options = stage_options(stage, preset, **{**source, "output_dir": str(args.output_dir / name), **overrides})
        started = time.perf_counter()
        run_stage(options)
        stats = json.loads((args.output_dir / name / "stats.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        return {
            "num_train": num_train,
            "last_line_of_the_log": stats,
            "seconds_of_this_call": round(time.perf_counter() - started),
        }

    seeds = range(settings["seeds"])
    cells("train-autoencoder", lambda: train("autoencoder", "autoencoder"))
    later = {"autoencoder": folder["autoencoder"]}
    cells("train-first_vae", lambda: train("first_vae", "vae", **later))
    later["vae"] = folder["first_vae"]
    for seed in seeds:
        cells(f"train-second_stage-{seed}", lambda s=seed: train(f"second_stage-{s}", "second_stage", seed=s, **later))
    for name in BASELINES:
        cells(f"train-{name}", lambda n=name: train(n, "vae", baseline(preset, n)))

    options = stage_options("autoencoder", preset, **source)
    train_images, test_images = held_out(options, num_train, settings["num_test"])
    extractor = open_extractor(args.features)

    @cache
    def judge():
        training = torch.cat([*uint8_batches(train_images, settings.get("num_bin_images"))])
        mirrored = torch.rand(len(training), generator=torch.Generator().manual_seed(0)) < 0.5
        training[mirrored] = training[mirrored].flip(-1)
        bins = []
        for num_bins in tqdm(settings["bins"], desc="k-means"):
            path = args.output_dir / f"bins-{num_bins}.safetensors"
            if not path.exists():
                NDB.fit(training, num_bins, n_init=3).save(path)  # the published 10 starts take half an hour here
            bins.append(NDB.load(path))
        return Judge(extractor, uint8_batches(test_images), bins)

    def set_of(name, batches):
        return cells(f"set-{name}", lambda: {**judge()(batches()), "extractor": extractor.description()})

    set_of("real", lambda: uint8_batches(train_images, settings["num_test"]))
    set_of("downsample", lambda: map(downsample, uint8_batches(test_images)))

    @cache
    def pipeline(name, seed=0):
        own_autoencoder = name in BASELINES
        autoencoder = None if own_autoencoder else load_frozen(VAEPlusAutoencoderModel, folder["autoencoder"])
        vae = load_frozen(VAEPlusVAEModel, folder[name if own_autoencoder else "first_vae"])
        second = None
        if name in ("vaeplus", "vaeplus-unmatched"):
            second = load_frozen(VAEPlusVAEModel, args.output_dir / f"second_stage-{seed}")
            second.config.matched_moments = name == "vaeplus"
        pipe = VAEPlusPipeline(vae, autoencoder, second)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def reconstructions(pipe):
        for pixels in uint8_batches(test_images):
            yield to_uint8(pipe.reconstruct(pixels, output_type="pt", decode_batch_size=BATCH))

    def shown(name, batches):
        for number, batch in enumerate(batches):
            if number == 0:
                image_grid(batch[:32].float() / 255, columns=8).save(args.output_dir / f"samples-{name}.png")
            yield batch

    numbers = range(settings["num_test"])
    parts = [numbers[start : start + BATCH] for start in numbers[::BATCH]]

    def samples(name, seed=0):
        bar = tqdm(parts, desc="samples", leave=False)
        return shown(f"{name}-{seed}", sample_images(pipeline(name, seed), bar, seed))

    for name in ("vaeplus", *BASELINES):
        set_of(f"{name}-reconstructed", lambda n=name: reconstructions(pipeline(n)))
        cells(f"summary-{name}", lambda n=name: summarize(pipeline(n), test_images, 2_000, BATCH))
    for name in ("vaeplus", "vaeplus-unmatched"):
        for seed in seeds:
            set_of(f"{name}-sampled-{seed}", lambda n=name, s=seed: samples(n, s))
    for name in ("vaeplus-prior", *BASELINES):
        set_of(f"{name}-sampled", lambda n=name: samples(n))

    def mixture(num_components):
        pipe = pipeline("vaeplus")
        codes = encode_dataset(train_images, pipe.autoencoder, pipe.autoencoder.encode)
        bar = tqdm(parts, desc="samples", leave=False)
        return shown(f"mixture-{num_components}", sample_mixture(pipe, codes, bar, num_components))

    for num_components in (1, 10):
        set_of(f"mixture-{num_components}-sampled", lambda n=num_components: mixture(n))


def baseline(preset: dict, name: str) -> dict:
    """The preset of one network with the structure of autoencoder and first VAE, trained as the autoencoder is."""
    autoencoder, vae = preset["autoencoder"], preset["vae"]
    model = {
        **{name: vae["model"][name] for name in ("latent_dim", "hidden_dim", "num_blocks")},
        "network": "aggregate",
        "affine_skip": False,
        "code_dim": autoencoder["model"]["latent_dim"],
        **{name: value for name, value in autoencoder["model"].items() if name in ("hidden_channels", "patch_size")},
        "num_conv_blocks": autoencoder["model"]["num_blocks"],
    }
    training = {option: value for option, value in autoencoder.items() if option != "model"}
    if name == "wae-mmd":
        training["mmd_weight"] = MMD_WEIGHT * (preset["common"]["resolution"] / 64) ** 2
    elif "max_grad_norm" in vae:  # the loss of both is a likelihood
        training["max_grad_norm"] = vae["max_grad_norm"]
    return {"common": preset["common"], "vae": {**training, "model": model}}


ROWS = {
    "Downsample": ("downsample", "downsample"),
    "WAE-MMD": ("wae-mmd-reconstructed", "wae-mmd-sampled"),
    "VAE": ("vae-reconstructed", "vae-sampled"),
    "VAE+": ("vaeplus-reconstructed", "vaeplus-sampled"),
    "VAE+ without matched moments": ("vaeplus-reconstructed", "vaeplus-unmatched-sampled"),
    "VAE+ without its second stage": ("vaeplus-reconstructed", "vaeplus-prior-sampled"),
    "autoencoder, Gaussian mixture of 10": ("vaeplus-reconstructed", "mixture-10-sampled"),
    "autoencoder, one Gaussian": ("vaeplus-reconstructed", "mixture-1-sampled"),
    "other real images": (None, "real"),
}


def table(cells):
    unit = cells["set-downsample"]["frechet"]
    bins = list(cells["set-downsample"]["ndb"])
    lines = [
        f"{cells['set-downsample']['distance']}, {cells['set-real']['num_images']} images against"
        f" {cells['set-real']['num_reference']}, in units of Downsample's {unit:.3f}:",
        "",
        "| | reconstruction | generation | generation / reconstruction |"
        + "".join(f" NDB/{k} |" for k in bins)
        + f" JS at {bins[-1]} |",
        "|---" * (5 + len(bins)) + "|",
    ]
    for title, (reconstructed, sampled) in ROWS.items():
        found = [cell for name, cell in cells.items() if re.fullmatch(f"set-{sampled}(-[0-9]+)?", name)]
        distances = [cell["frechet"] / unit for cell in found]
        row = ["", "", ""]
        if reconstructed:
            error = cells[f"set-{reconstructed}"]["frechet"] / unit
            row = [f"{error:.2f}", "", mean_and_spread([each / error for each in distances], 3)]
        row[1] = mean_and_spread(distances)
        row += [mean_and_spread([cell["ndb"][k]["ndb_over_k"] for cell in found]) for k in bins]
        row += [mean_and_spread([cell["ndb"][bins[-1]]["js"] for cell in found], 3)]
        lines.append(f"| {title} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def draw(cells, path):
    shown = {"vaeplus-0": "VAE+", "vae-0": "VAE", "wae-mmd-0": "WAE-MMD", "mixture-10": "autoencoder, mixture of 10"}
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 5.8), layout="constrained")
    for axis, (name, title) in zip(axes.flat, shown.items(), strict=True):
        axis.imshow(plt.imread(path.parent / f"samples-{name}.png"))
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def add_options(parser):
    parser.add_argument("--train_data_dir", default=None, help="folder with CelebA as parquet files (not for smoke)")
    parser.add_argument("--num_train", type=int, help="so many images to train on (default: what the scale says)")
    parser.add_argument("--features", default="pixels:16", help="an .onnx file, fid:WEIGHTS, or pixels:SIZE")


if __name__ == "__main__":
    sys.exit(reproduce("table3_table4_figure2", __doc__, SETTINGS, measure, table, draw, add_options))
