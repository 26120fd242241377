"""Anomalies found by the scores of single pictures, as areas under the ROC curve.

    python examples/posteriors/anomalies.py drawings
    python examples/posteriors/anomalies.py mnist --pipeline runs/mnist/pipeline --data ../shared/data/mnist
    python examples/posteriors/anomalies.py celeba128 --data ../shared/data/celeba128 --num_images 500

Half of the unseen images stay as they are. Into each of the others an anomaly is planted. `squared_error`,
`log_likelihood` and `latent_distance` are those of `vaeplus score`. `local_error` is the largest error in any window
of the picture, beside the errors of 1,000 training images in the same window: it finds what is small.
"""

import sys
from collections.abc import Callable

import torch
from common import Data, use
from sklearn.metrics import roc_auc_score
from torch.nn.functional import avg_pool2d

from hf_vaeplus.data.pixels import to_unit_range
from hf_vaeplus.evaluation.scores import SCORES, score_images, unusualness


def patch(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A square of one colour, with sides of a quarter of the picture, anywhere."""
    size = image.shape[-1]
    side = size // 4
    top, left = torch.randint(size - side + 1, (2,), generator=generator).tolist()
    image[:, top : top + side, left : left + side] = _colour(image, generator)
    return image


def scratch(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A straight line through the picture, one twentieth of it wide."""
    size = image.shape[-1]
    angle, offset = torch.rand(2, generator=generator).tolist()
    angle, offset = torch.tensor(torch.pi * angle), 0.5 * (offset - 0.5)
    centres = (torch.arange(size) + 0.5) / size - 0.5
    distance = (centres[:, None] * angle.cos() + centres * angle.sin() - offset).abs()
    return torch.where(distance < 0.025, _colour(image, generator), image)


def swapped(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The upper and the lower half have changed places."""
    return image.roll(image.shape[-1] // 2, dims=1)


def _colour(image, generator) -> torch.Tensor:
    if len(image) == 1:  # a picture of ink: white as ink
        return torch.full((1, 1, 1), 255, dtype=torch.uint8)
    return torch.randint(256, (3, 1, 1), generator=generator, dtype=torch.uint8)


ANOMALIES: dict[str, Callable] = {"patch": patch, "scratch": scratch, "halves swapped": swapped}


def error_maps(pipe, images: torch.Tensor) -> torch.Tensor:
    """Squared errors of reconstructions `(n, 1, H, W)`, summed over channels."""
    again = pipe.reconstruct(images, "pt", preprocess=False)
    return (again - to_unit_range(images)).square().sum(1, keepdim=True)


class LocalError:
    """The largest error in any window of a sixth of a side, in standard deviations of the usual one there (of logs).

    Args:
        usual: error maps `(n, 1, H, W)` of training images.
    """

    def __init__(self, usual: torch.Tensor):
        self.floor = 0.1 * usual.mean()  # where no error is usual, a little one is none
        windows = self._windows(usual)
        self.mean, spread = windows.mean(0), windows.std(0)
        self.spread = spread + 0.1 * spread.mean()

    def __call__(self, maps: torch.Tensor) -> torch.Tensor:
        return ((self._windows(maps) - self.mean) / self.spread).flatten(1).amax(1)

    def _windows(self, maps):
        side = max(2, maps.shape[-1] // 6)
        return (avg_pool2d(maps, side, 1).clamp(min=0) + self.floor).log()


def measure(data: Data, args) -> dict:
    images = data.unseen(2 * args.num_images)
    normal, others = images.split(len(images) // 2)
    local_error = LocalError(error_maps(data.pipe, data.training(1_000)))

    def scored(images: torch.Tensor) -> list[dict]:
        batch = [{} for _ in images], images
        rows, _ = score_images(data.pipe, [batch], args.num_importance_samples, args.seed)
        local = local_error(error_maps(data.pipe, images))
        return [row | {"local_error": value} for row, value in zip(rows, local.tolist(), strict=True)]

    auroc, rows = {}, scored(normal)
    for name, plant in ANOMALIES.items():
        strange = scored(planted(others, plant, args.seed))
        is_strange = [False] * len(rows) + [True] * len(strange)
        auroc[name] = {
            score: float(roc_auc_score(is_strange, [unusualness(row, score) for row in rows + strange]))
            for score in (*SCORES, "local_error") if score in rows[0]
        }  # fmt: skip
    return {"num_importance_samples": args.num_importance_samples, "auroc": auroc}


def planted(images: torch.Tensor, plant: Callable, seed: int) -> torch.Tensor:
    """Each image with the anomaly that its own noise draws."""
    generators = (torch.Generator().manual_seed(seed + number) for number in range(len(images)))
    return torch.stack([plant(image.clone(), each) for image, each in zip(images, generators, strict=True)])


def add_options(parser):
    parser.add_argument("--num_importance_samples", type=int, default=16, help="of the likelihood (default: 16)")


if __name__ == "__main__":
    sys.exit(use("anomalies", __doc__, measure, ("drawings", "mnist", "celeba128"), add_options))
