"""Ways to win back what the autoencoder's squared error blurs, judged against the Downsample row of Table 3.

    python examples/reproduce/sharper.py --scale cpu --train_data_dir celeba --features extractor.onnx \\
        --models runs/reproduce/table3_table4_figure2-cpu

Takes the models of `table3_table4_figure2.py` as they are and changes only what comes after the decoder's mean mu:
    spectrum   mu filtered so that its power spectrum, averaged over training images, is that of real images: what
               the pipeline does at sharpness=1
    residual   mu + stationary Gaussian noise with the spectrum of x - mu: p(x | code) with more than one gamma
    texture    a small network on mu, trained on a distance between local band energies (and patches)
    energy     the same network with noise as an input, trained on the energy score of that distance: a strictly
               proper scoring rule for p(x | code) as far as the distance sees it, without an adversary
No network trained on other data takes part, least of all the one that judges.
"""

import sys
import time
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import BATCH, held_out, mean_and_spread, preset_of, reproduce, sample_batches, uint8_batches
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.data.pixels import to_uint8
from hf_vaeplus.evaluation.evaluate import Judge, downsample
from hf_vaeplus.evaluation.features import open_extractor
from hf_vaeplus.metrics.ndb import NDB
from hf_vaeplus.modeling_vaeplus import ResidualConvBlock, VAEPlusAutoencoderModel, VAEPlusVAEModel
from hf_vaeplus.pictures import image_grid
from hf_vaeplus.training.codes import load_frozen
from hf_vaeplus.training.options import stage_options

CPU = {
    "preset": "celeba-cpu",
    "num_train": 20_000,
    "num_test": 10_000,
    "num_pairs": 8_000,
    "steps": 800,
    "batch": 64,
    "seeds": 3,
    "num_cells": 17,
    "width": 64,
}
SETTINGS = {
    "smoke": {
        **CPU,
        "preset": "tiny",
        "num_train": 160,
        "num_test": 80,
        "seeds": 1,
        "num_cells": 13,
        "num_pairs": 160,
        "steps": 3,
        "batch": 8,
        "width": 8,
    },
    "cpu": CPU,
    "gpu": {**CPU, "preset": "celeba128", "num_train": 152_770, "steps": 20_000, "width": 256},
}


class Finisher(nn.Module):
    """mu -> mu + a correction, on a grid of 4 x 4 patches; `noise_channels` numbers of noise a pixel go in as well."""

    def __init__(self, channels: int, width: int, noise_channels: int, num_blocks: int = 3):
        super().__init__()
        self.noise_channels = noise_channels
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(16 * (channels + noise_channels), width, 3, padding=1),
            *[ResidualConvBlock(width) for _ in range(num_blocks)],
            nn.SiLU(),
            nn.Conv2d(width, 16 * channels, 3, padding=1),
            nn.PixelShuffle(4),
        )
        nn.init.zeros_(self.layers[-2].weight)
        for block in self.layers[2 : 2 + num_blocks]:
            nn.init.zeros_(block.outer.weight)

    def forward(self, mean: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        shape = (len(mean), self.noise_channels, *mean.shape[2:])
        noise = torch.randn(shape, generator=generator)
        return mean + self.layers(torch.cat([mean, noise], 1))


def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sum over scales of: Euclidean distances of patches, and of the local energies of derivatives.

    Each term is a metric of negative type on what it sees, so that the energy score with it is proper.
    """
    total = 0.0
    for _ in range(3):
        patches = [F.unfold(each, 8, stride=8) for each in (x, y)]
        total = total + (patches[0] - patches[1]).square().sum(1).add(1e-6).sqrt().mean()
        total = total + 2 * (_energies(x) - _energies(y)).square().sum(1).add(1e-6).sqrt().mean()
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return total


def _energies(x: torch.Tensor) -> torch.Tensor:
    """Root mean square of first and second derivatives over 4 x 4 windows: how rough each place is, not where."""
    bands = [
        x[..., 1:-1, 2:] - x[..., 1:-1, :-2],
        x[..., 2:, 1:-1] - x[..., :-2, 1:-1],
        4 * x[..., 1:-1, 1:-1] - x[..., 1:-1, 2:] - x[..., 1:-1, :-2] - x[..., 2:, 1:-1] - x[..., :-2, 1:-1],
        x[..., 2:, 2:] - x[..., :-2, :-2],
        x[..., 2:, :-2] - x[..., :-2, 2:],
    ]
    return (F.avg_pool2d(torch.cat(bands, 1).square(), 4, stride=2) + 1e-5).sqrt()


def train_finisher(means, images, settings, noise_channels, path) -> dict:
    """Train on pairs of decoder mean and image; the energy score where there is noise, the distance where not."""
    torch.manual_seed(0)
    count = settings["num_pairs"]
    pairs = [images.pixels(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    all_means = torch.cat([means(part) for part in tqdm(pairs, desc="decoder means", leave=False)])
    all_images = torch.cat(pairs)
    net = Finisher(images.num_channels, settings["width"], noise_channels).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, settings["steps"])
    generator, started, losses = torch.Generator().manual_seed(0), time.perf_counter(), []
    for _ in tqdm(range(settings["steps"]), desc=path.stem, leave=False):
        rows = torch.randint(count, (settings["batch"],), generator=generator)
        target, mean = all_images[rows], all_means[rows]
        with torch.autocast("cpu", torch.bfloat16):
            first = net(mean, generator)
            second = net(mean, generator) if noise_channels else None
        loss = distance(first.float(), target)
        if noise_channels:  # the energy score: 2 E d(x, y) - E d(y, y')
            loss = loss + distance(second.float(), target) - distance(first.float(), second.float())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, path)
    last = losses[-max(1, len(losses) // 10) :]
    return {"loss": sum(last) / len(last), "seconds": round(time.perf_counter() - started)}


def measure(settings, cells, args):
    preset = preset_of(settings)
    num_train = args.num_train or settings["num_train"]
    options = stage_options("autoencoder", preset, train_data_dir=args.train_data_dir)
    train_images, test_images = held_out(options, num_train, settings["num_test"])
    models = Path(args.models)
    autoencoder = load_frozen(VAEPlusAutoencoderModel, models / "autoencoder")
    vae = load_frozen(VAEPlusVAEModel, models / "first_vae")

    @cache
    def pipeline(seed=0):
        pipe = VAEPlusPipeline(vae, autoencoder, load_frozen(VAEPlusVAEModel, models / f"second_stage-{seed}"))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @torch.no_grad()
    def means(pixels):
        """Decoder means of the whole model for real images: what the finishing steps are fitted on."""
        pipe = pipeline()
        return pipe.decode(pipe.encode(pixels, BATCH).mean, "pt", BATCH)

    @cache
    def reconstructed():
        return [means(batch.float() / 255) for batch in uint8_batches(test_images)]

    @cache
    def sampled(seed=0):
        return [*sample_batches(pipeline(seed), settings["num_test"], seed)]

    @cache
    def residual_power():
        """Mean over training images of |F (x - mu)|^2: (channels, height, width // 2 + 1)."""
        total, count = 0.0, min(len(train_images), 5_000)
        for start in tqdm(range(0, count, BATCH), desc="spectra", leave=False):
            x = train_images.pixels(start, start + BATCH)
            total = total + torch.fft.rfft2((x - means(x)).double()).abs().square().sum(0)
        return total / count

    def spectrum(batch, _):
        return autoencoder.sharpen(batch)

    def residual(batch, generator):
        gain = (residual_power() / (batch.shape[2] * batch.shape[3])).sqrt()
        noise = torch.fft.rfft2(torch.randn(batch.shape, generator=generator, dtype=torch.float64))
        return batch + torch.fft.irfft2(noise * gain, s=batch.shape[2:]).float()

    @cache
    def finisher(name):
        net = Finisher(train_images.num_channels, settings["width"], noise_channels[name])
        net.load_state_dict(load_file(args.output_dir / f"{name}.safetensors"))
        return net.requires_grad_(False)

    ways = {"decoder mean": lambda batch, _: batch, "spectrum": spectrum, "residual": residual}
    noise_channels = {"texture": 0, "energy": 4}
    for name in noise_channels:
        ways[name] = lambda batch, generator, n=name: finisher(n)(batch, generator)

    @cache
    def judge():
        bins = [NDB.load(path) for path in sorted(models.glob("bins-*.safetensors"))]
        return Judge(open_extractor(args.features), uint8_batches(test_images), bins)

    def changed(name, way, batches):
        generator = torch.Generator().manual_seed(0)
        for number, batch in enumerate(batches):
            batch = way(batch, generator).clamp(0, 1)
            if number == 0:
                image_grid(batch[:32], columns=8).save(args.output_dir / f"{name}.png")
            yield to_uint8(batch)

    cells("downsample", lambda: judge()(map(downsample, uint8_batches(test_images))))
    for name, way in ways.items():
        learnt = name in noise_channels
        if learnt:
            fit = (means, train_images, settings, noise_channels[name], args.output_dir / f"{name}.safetensors")
            cells(f"train-{name}", lambda fit=fit: train_finisher(*fit))
        sources = {"reconstructed": reconstructed, "sampled": sampled}
        for seed in range(1, 1 if learnt or name == "residual" else settings["seeds"]):
            sources[f"sampled-{seed}"] = partial(sampled, seed)
        for kind, batches in sources.items():
            cell = f"{name}-{kind}"
            cells(cell, lambda c=cell, w=way, b=batches: judge()(tqdm(changed(c, w, b()), desc=c, leave=False)))


def table(cells):
    unit = cells["downsample"]["frechet"]
    bins = list(cells["downsample"]["ndb"])
    lines = [
        f"{cells['downsample']['distance']}, {cells['downsample']['num_images']} images, in units of Downsample's"
        f" {unit:.3f}:",
        "",
        "| after the decoder | reconstruction | generation |" + "".join(f" NDB/{k} |" for k in bins),
        "|---" * (3 + len(bins)) + "|",
    ]
    for name in [name.removesuffix("-sampled") for name in cells if name.endswith("-sampled")]:
        found = [cell for key, cell in cells.items() if key.startswith(f"{name}-sampled")]
        row = [f"{cells[f'{name}-reconstructed']['frechet'] / unit:.2f}"]
        row += [mean_and_spread([cell["frechet"] / unit for cell in found])]
        row += [mean_and_spread([cell["ndb"][k]["ndb_over_k"] for cell in found]) for k in bins]
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def add_options(parser):
    parser.add_argument("--train_data_dir", default=None, help="folder with CelebA as parquet files (not for smoke)")
    parser.add_argument("--num_train", type=int, help="as for table3_table4_figure2.py")
    parser.add_argument("--features", default="pixels:16", help="an .onnx file, fid:WEIGHTS, or pixels:SIZE")
    parser.add_argument("--models", required=True, help="--output_dir of table3_table4_figure2.py")


if __name__ == "__main__":
    sys.exit(reproduce("sharper", __doc__, SETTINGS, measure, table, add_options=add_options))
