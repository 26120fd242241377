"""Named directions of z from labelled images: what an edit changes, and what it leaves.

    python examples/posteriors/directions.py drawings
    python examples/posteriors/directions.py mnist --pipeline runs/mnist/pipeline --data ../shared/data/mnist
    python examples/posteriors/directions.py celeba128 --data ../shared/data/celeba128

The drawings' labels are the factors they were drawn from. The others' are measured on the pictures themselves: ink,
slant, width and height of a digit; brightness, warmth, side of the light and background of a face. `--save` writes the
directions beside the pipeline, where `vaeplus demo` finds them.
"""

import sys

import torch
from common import Data, drawn, use

from hf_vaeplus.data.pixels import to_unit_range
from hf_vaeplus.data.rendered_faces import FACTOR_NAMES
from hf_vaeplus.directions import find_directions, load_directions, save_directions
from hf_vaeplus.pictures import image_grid


def of_digits(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Labels of grey images `(n, 1, H, W)` of ink, from the moments of the ink."""
    ink = images[:, 0].double()
    total = ink.sum((1, 2)).clamp(min=1e-6)
    y = torch.linspace(-1, 1, ink.shape[1], dtype=torch.float64)[:, None]
    x = y.T

    def mean(values):
        return (ink * values).sum((1, 2)) / total

    dx, dy = x - mean(x)[:, None, None], y - mean(y)[:, None, None]
    return {
        "ink": ink.mean((1, 2)),
        "slant": -mean(dx * dy) / mean(dy * dy),
        "width": mean(dx * dx).sqrt(),
        "height": mean(dy * dy).sqrt(),
    }


def of_photographs(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Labels of colour images `(n, 3, H, W)`, from their light."""
    light = images.double().mean(1)
    half = light.shape[2] // 2
    corners = torch.cat([light[:, : half // 2, : half // 2], light[:, : half // 2, -half // 2 :]], 2)  # the upper two
    return {
        "brightness": light.mean((1, 2)),
        "warmth": (images[:, 0] - images[:, 2]).double().mean((1, 2)),
        "light from the right": light[:, :, half:].mean((1, 2)) - light[:, :, :half].mean((1, 2)),
        "bright background": corners.mean((1, 2)) - light.mean((1, 2)),
    }


def measure(data: Data, args) -> dict:
    images, unseen = data.training(args.num_training), data.unseen(args.num_images)
    if data.name == "drawings":
        names = [name.replace("_", " ") for name in FACTOR_NAMES]
        labels = dict(zip(names, torch.from_numpy(data.training_labels(len(images))).T, strict=False))
    else:
        label = of_digits if data.name == "mnist" else of_photographs
        labels = label(to_unit_range(images))
    directions = find_directions(data.pipe.encode(images, 500).mean, labels)
    if args.save:
        save_directions(directions, data.pipe, data.pipe.name_or_path)
    z = data.pipe.encode(unseen).mean
    if data.name == "drawings":
        found = edited_drawings(data, directions, labels, z, args)
    else:
        spread = {name: values.std() for name, values in labels.items()}
        found = {name: measured_change(data.pipe, z, directions[name], label, spread, name) for name in directions}
    return {"num_training": len(images), "directions": found}


def edited_drawings(data: Data, directions, labels, z, args) -> dict:
    """How much nearer an edited reconstruction lies to the drawing with that factor changed than without the edit."""
    factors = torch.from_numpy(data.unseen_labels(len(z)))
    found = {}
    for column, (name, direction) in enumerate(directions.items()):
        step = torch.where(factors[:, column] > 0, -0.5, 0.5)  # stays within [-1, 1]
        changed = factors.clone()
        changed[:, column] += step
        target = to_unit_range(drawn(changed.numpy(), data.pipe.image_shape[1]))
        moved = z + (step / labels[name].std())[:, None] * direction
        errors = [(data.pipe.decode(each, "pt") - target).square().flatten(1).sum(1).mean() for each in (z, moved)]
        found[name] = {"squared error before": float(errors[0]), "after": float(errors[1]),
                       "of the change": 1 - float(errors[1] / errors[0])}  # fmt: skip
    return found


def measured_change(pipe, z, direction, label, spread, name) -> dict:
    """What one standard deviation more changes, in standard deviations of each label: of `name` 1, of the others 0."""
    before, after = (label(pipe.decode(each, "pt")) for each in (z, z + direction))
    changes = {each: float((after[each] - before[each]).mean() / spread[each]) for each in spread}
    return {"change": changes.pop(name), "largest change of another": max(map(abs, changes.values()))}


def draw(data: Data, args):
    """a sample of the model along each direction, from -3 to 3 standard deviations"""
    directions = load_directions(data.pipe, data.pipe.name_or_path)
    z = data.pipe.encode(data.pipe(1, torch.Generator().manual_seed(args.seed)).images).mean
    stops = torch.linspace(-3, 3, 9)[:, None]
    frames = data.pipe.decode(torch.cat([z + stops * direction for direction in directions.values()]), "pt")
    print("\n".join(directions))  # the rows
    return image_grid(frames, columns=len(stops), scale=max(1, 64 // frames.shape[-1]))


def add_options(parser):
    parser.add_argument("--num_training", type=int, default=5_000, help="labelled images (default: 5000)")
    parser.add_argument("--save", action="store_true", help="write the directions beside the pipeline")


if __name__ == "__main__":
    sys.exit(use("directions", __doc__, measure, ("drawings", "mnist", "celeba128"), add_options, draw))
