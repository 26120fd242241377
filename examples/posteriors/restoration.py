"""Holes filled and noise taken off by a search for the most probable z, beside the nearest training image.

    python examples/posteriors/restoration.py drawings
    python examples/posteriors/restoration.py mnist --pipeline runs/mnist/pipeline --data ../shared/data/mnist
    python examples/posteriors/restoration.py celeba128 --data ../shared/data/celeba128 --num_images 100

The squared error of a hole is that of its pixels, and that of a noisy picture is that of all pixels. The nearest
training image has the least squared error where pixels are seen.
"""

import sys

import torch
from common import Data, nearest_training_images, use

from hf_vaeplus.data.pixels import to_unit_range
from hf_vaeplus.pictures import image_grid


def damages(images: torch.Tensor, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Damage -> images `(n, C, H, W)` in [0, 1], what is seen of them `(n, H, W)`, standard deviation of the noise."""
    count, _, size, _ = images.shape
    generator = torch.Generator().manual_seed(seed)
    nothing_missing = torch.ones(count, size, size, dtype=torch.bool)
    side = size // 2
    corners = torch.randint(size - side + 1, (count, 2), generator=generator)
    hole = nothing_missing.clone()
    for mask, (top, left) in zip(hole, corners.tolist(), strict=True):
        mask[top : top + side, left : left + side] = False
    lower_half = nothing_missing.clone()
    lower_half[:, size // 2 :] = False
    scattered = torch.rand(count, size, size, generator=generator) < 0.25
    noisy = (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    return {
        "hole, a quarter of the pixels": (images, hole, 0.0),
        "lower half missing": (images, lower_half, 0.0),
        "75% of the pixels missing": (images, scattered, 0.0),
        "noise of 0.3": (noisy, nothing_missing, 0.3),
    }


def measure(data: Data, args) -> dict:
    images, training = to_unit_range(data.unseen(args.num_images)), data.training(args.num_training)
    found = {}
    for name, (damaged, seen, noise_std) in damages(images, args.seed).items():
        judged = torch.ones_like(seen) if noise_std else ~seen
        judged = judged[:, None].expand_as(images)
        left = torch.where(seen[:, None], damaged, 0.0)  # what the hole hides stays hidden
        candidates = {
            "search": data.pipe.restore(left, seen, noise_std, args.num_steps, "pt"),
            "encoder alone": data.pipe.reconstruct(left, "pt"),
            "nearest training image": nearest_training_images(training, left, seen),
            "mean training image": to_unit_range(training[:5_000]).mean(0).expand_as(images),
        }
        errors = {
            each: float((judged * (candidate - images)).square().flatten(1).sum(1).mean())
            for each, candidate in candidates.items()
        }
        found[name] = errors | {"better than nearest": 1 - errors["search"] / errors["nearest training image"]}
    return {"num_training": len(training), "num_steps": args.num_steps, "squared_error": found}


def draw(data: Data, args):
    """drawings alone: rows of damaged pictures, what the search and the nearest training image make of them, and the
    truth"""
    if data.name != "drawings":
        raise ValueError("pictures of people and digits are not drawn: --picture is for drawings.")
    images, training = to_unit_range(data.unseen(8)), data.training(args.num_training)
    rows = []
    for damaged, seen, noise_std in damages(images, args.seed).values():
        left = torch.where(seen[:, None], damaged, 0.5)
        restored = data.pipe.restore(left, seen, noise_std, args.num_steps, "pt")
        rows += [left, restored, nearest_training_images(training, left, seen), images]
    return image_grid(torch.cat(rows), columns=8, scale=2)


def add_options(parser):
    parser.add_argument("--num_training", type=int, default=20_000, help="training images to look for the nearest in")
    parser.add_argument("--num_steps", type=int, default=200, help="of the search (default: 200)")


if __name__ == "__main__":
    sys.exit(use("restoration", __doc__, measure, ("drawings", "mnist", "celeba128"), add_options, draw))
