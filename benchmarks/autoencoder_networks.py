"""Which autoencoder network is worth its time: squared error on held-out images after equal compute.

    python benchmarks/autoencoder_networks.py --train_data_dir FOLDER --seconds 120

Every candidate's step is timed first, in turn and several times over, so that the machine's noise hits all alike; then
each trains for as many steps as fit into `--seconds` at its own pace. Writes results/bench_autoencoder_networks.json.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from hf_vaeplus import VAEPlusAutoencoderConfig, VAEPlusAutoencoderModel
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.pixels import to_unit_range
from hf_vaeplus.files import write_json
from hf_vaeplus.modeling_vaeplus import ResidualConvBlock
from hf_vaeplus.provenance import provenance
from hf_vaeplus.training.randomness import GlobalBatchSampler


class NormedBlock(ResidualConvBlock):
    """The library's block with group normalisation before each convolution."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.norms = nn.ModuleList(nn.GroupNorm(channels // 16, channels) for _ in range(2))
        nn.init.zeros_(self.outer.weight)

    def forward(self, hidden):
        inner = self.inner(F.silu(self.norms[0](hidden)))
        return hidden + self.outer(F.silu(self.norms[1](inner)))


class DepthwiseBlock(nn.Module):
    """ConvNeXt's block: depthwise 7x7, norm, four times wider, back."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.GroupNorm(1, channels)
        self.wide, self.outer = nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)
        nn.init.zeros_(self.outer.weight)

    def forward(self, hidden):
        return hidden + self.outer(F.gelu(self.wide(self.norm(self.mix(hidden)))))


def with_block(model: VAEPlusAutoencoderModel, block) -> VAEPlusAutoencoderModel:
    for half in (model.encoder, model.decoder):
        for position, layer in enumerate(half):
            if isinstance(layer, ResidualConvBlock):
                half[position] = block(layer.inner.in_channels)
    return model


def strided_2016(model: VAEPlusAutoencoderModel) -> VAEPlusAutoencoderModel:
    """DCGAN-like: strided 4x4 convolutions with batch norm, no residual connections."""
    size, widths, latent_dim = model.config.image_size, (3, 64, 128, 256, 512), model.config.latent_dim
    grid = size // 16
    down, up = [], [nn.Linear(latent_dim, 512 * grid**2), nn.Unflatten(1, (512, grid, grid))]
    for inner, outer in zip(widths, widths[1:], strict=False):
        down += [nn.Conv2d(inner, outer, 4, 2, 1), nn.BatchNorm2d(outer), nn.LeakyReLU(0.2)]
    for inner, outer in zip(widths[:0:-1], widths[-2::-1], strict=True):
        up += [nn.BatchNorm2d(inner), nn.ReLU(), nn.ConvTranspose2d(inner, outer, 4, 2, 1)]
    model.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(512 * grid**2, latent_dim))
    model.decoder = nn.Sequential(*up)
    return model


def candidates(size: int) -> dict:
    def network(patch_size, hidden_channels, num_blocks):
        return VAEPlusAutoencoderModel(
            VAEPlusAutoencoderConfig(
                image_size=size, patch_size=patch_size, hidden_channels=hidden_channels, num_blocks=num_blocks
            )
        )

    if size > 64:
        # At 128 pixels a patch of 8 costs as much as a patch of 4 at 64.
        shapes = (
            (8, (64, 128, 256), 2),
            (8, (128, 256, 256), 1),
            (8, (128, 256, 256), 2),
            (8, (192, 384, 384), 1),
            (8, (256, 256), 2),
            (4, (64, 128, 256), 2),
            (4, (64, 128, 256, 256), 1),
        )
        return {
            f"patch {patch}, {'-'.join(map(str, widths))}, {blocks} block{'s' * (blocks > 1)}": partial(
                network, patch, widths, blocks
            )
            for patch, widths, blocks in shapes
        }
    base = (4, (128, 256, 256), 2)
    return {
        "patch 4, 128-256-256, 2 blocks": lambda: network(*base),
        "group norm": lambda: with_block(network(*base), NormedBlock),
        "depthwise": lambda: with_block(network(*base), DepthwiseBlock),
        "1 block": lambda: network(4, (128, 256, 256), 1),
        "4 blocks": lambda: network(4, (128, 256, 256), 4),
        "narrow, 64-128-256": lambda: network(4, (64, 128, 256), 2),
        "512 at the bottom": lambda: network(4, (128, 256, 512), 2),
        "two scales, 256-256": lambda: network(4, (256, 256), 2),
        "patch 8, 256-256": lambda: network(8, (256, 256), 2),
        "patch 2, 64-128-256-256, 1 block": lambda: network(2, (64, 128, 256, 256), 1),
        "strided 4x4, batch norm (2016)": lambda: strided_2016(network(*base)),
    }


def trainer(model, rate: float, total: int):
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total, pct_start=0.05)

    def step(images: torch.Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure_cost(makers: dict, images: torch.Tensor, rounds: int = 7) -> dict:
    """Median seconds of a training step of each, interleaved."""
    steps = {name: trainer(make(), 1e-4, 100) for name, make in makers.items()}
    seconds = {name: [] for name in makers}
    for _ in tqdm(range(rounds + 2), desc="cost of a step"):
        for name, step in steps.items():
            start = time.perf_counter()
            step(images)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}


@torch.no_grad()
def validation_error(model, dataset) -> float:
    model.eval()
    errors = []
    for start in range(0, len(dataset), 100):
        images = dataset.pixels(start, start + 100)
        errors.append(model(images).loss.item() * len(images))
    return sum(errors) / len(dataset)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--train_data_dir", required=True, help="folder of pictures, or of train-* and validation-* parquet"
    )
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--crop", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=120, help="training time of each candidate")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--only", nargs="*", default=[""], help="candidates whose name begins with one of these")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/bench_autoencoder_networks.json")
    args = parser.parse_args()

    made = provenance()
    source = dict(train_data_dir=args.train_data_dir, resolution=args.resolution, crop=args.crop)
    train = load_images(**source, split="train", random_flip=True)
    validation = load_images(**source, split="validation")
    makers = {n: make for n, make in candidates(args.resolution).items() if n.startswith(tuple(args.only))}
    example = train.pixels(0, args.batch_size)
    cost = measure_cost(makers, example)
    rows = []
    for name, make in makers.items():
        for rate in args.learning_rates:
            torch.manual_seed(args.seed)
            model, total = make(), max(1, int(args.seconds / cost[name]))
            step = trainer(model, rate, total)
            sampler = GlobalBatchSampler(len(train), args.batch_size, args.seed, 0, 1, 0, total)
            for indices in tqdm(sampler, desc=f"{name}, rate {rate:g}"):
                step(to_unit_range(train.batch(indices)["pixel_values"]))
            rows.append(
                {
                    "network": name,
                    "learning_rate": rate,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "images_per_second": args.batch_size / cost[name],
                    "steps": total,
                    "validation_squared_error": validation_error(model, validation),
                }
            )
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            result = {
                **made,
                "train_images": len(train),
                "validation_images": len(validation),
                "resolution": args.resolution,
                "seconds": args.seconds,
                "batch_size": args.batch_size,
                "seed": args.seed,
                "rows": rows,
            }
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            write_json(Path(args.output), result)  # after every row: what ends early keeps what it has measured


if __name__ == "__main__":
    main()
