"""What the uses of posteriors share: three models with their data, and results/posteriors.json.

drawings    model_cards/vaeplus-drawings, drawings of eight known factors: needs nothing
celeba128   model_cards/vaeplus-celeba128, faces: --data FOLDER
mnist       --pipeline runs/mnist/pipeline (docs/mnist.md says how to train it), --data FOLDER
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.cli.flags import CommandParser, local_path
from hf_vaeplus.cli.main import run_command
from hf_vaeplus.data.cache import ImageDataset, load_images
from hf_vaeplus.data.pixels import to_unit_range
from hf_vaeplus.data.rendered_faces import factors_of, render_faces
from hf_vaeplus.files import write_json
from hf_vaeplus.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
UNSEEN = 20_000  # index of the first drawing that training has not seen
NUM_FACTORS = 8
MAX_FACES = 10_000


@dataclass
class Data:
    """A model and its images, each uint8 `(n, C, H, W)`.

    Args:
        training: a function of a number, the first so many training images.
        unseen: a function of a number, so many images that training has not seen.
        labels: functions of a number as well, labels of the same images; `None` where there are none.
    """

    name: str
    pipe: VAEPlusPipeline
    training: Callable[[int], torch.Tensor]
    unseen: Callable[[int], torch.Tensor]
    training_labels: Callable[[int], np.ndarray] | None = None
    unseen_labels: Callable[[int], np.ndarray] | None = None


def use(name: str, description: str, measure: Callable, datasets: tuple, add_options: Callable, draw=None) -> int:
    """Run one use from the command line; returns the exit code.

    Args:
        name: of the use in the results.
        measure: `(data, args) -> dict` of numbers.
        datasets: those it is measured on.
        add_options: adds flags to the parser.
        draw: `(data, args) -> picture` for people, where `--picture` asks for one.
    """
    return run_command(lambda: _run(name, description, measure, datasets, add_options, draw))


def _run(name, description, measure, datasets, add_options, draw):
    parser = CommandParser(prog=f"{name}.py", description=description)
    parser.add_argument("dataset", choices=datasets)
    parser.add_argument("--pipeline", type=local_path, default=None, help="(default: that of model_cards/)")
    parser.add_argument("--data", type=local_path, default=None, help="folder of the images of mnist or celeba128")
    parser.add_argument("--num_images", type=int, default=1_000, help="unseen images to measure on (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--output", type=local_path, default=ROOT / "results" / "posteriors.json")
    if draw is not None:
        parser.add_argument("--picture", type=local_path, default=None, help=draw.__doc__)
    add_options(parser)
    args = parser.parse_args()
    made = provenance()
    data = open_data(args)
    found = {**made, "num_images": args.num_images, "seed": args.seed, **measure(data, args)}
    path = Path(args.output)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results.setdefault(name, {})[data.name] = found
    write_json(path, results)
    print(json.dumps(found, indent=2))
    if draw is not None and args.picture:
        draw(data, args).save(args.picture)


def open_data(args) -> Data:
    """The model and the images that the command line names."""
    source = args.pipeline or (None if args.dataset == "mnist" else ROOT / "model_cards" / f"vaeplus-{args.dataset}")
    if source is None or (args.data is None and args.dataset != "drawings"):
        raise ValueError(f"{args.dataset} needs --data" + (" and --pipeline." if args.dataset == "mnist" else "."))
    pipe = VAEPlusPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    channels, size, _ = pipe.image_shape
    if args.dataset == "drawings":
        return Data(
            args.dataset, pipe,
            lambda count: drawn(factors_of(range(count), NUM_FACTORS), size),
            lambda count: drawn(factors_of(range(UNSEEN, UNSEEN + count), NUM_FACTORS), size),
            lambda count: factors_of(range(count), NUM_FACTORS),
            lambda count: factors_of(range(UNSEEN, UNSEEN + count), NUM_FACTORS),
        )  # fmt: skip
    options = dict(train_data_dir=args.data, resolution=size, num_channels=channels, progress=False)
    splits = {"mnist": ("train", "test"), "celeba128": ("train", "validation")}[args.dataset]
    # of 30,000 faces a third takes 500 MB of cache
    limits = (None if args.dataset == "mnist" else MAX_FACES, None)
    training, unseen = (
        load_images(split=split, max_samples=limit, **options) for split, limit in zip(splits, limits, strict=True)
    )
    labels = [None, None]
    if args.dataset == "mnist":
        labels = [lambda count, images=images: np.array(images.source.labels(None)[:count])
                  for images in (training, unseen)]  # fmt: skip
    return Data(args.dataset, pipe, lambda n: _first(training, n), lambda n: _first(unseen, n), *labels)


def _first(images: ImageDataset, count: int) -> torch.Tensor:
    return images.batch(range(min(count, len(images))))["pixel_values"].contiguous()


def drawn(factors: np.ndarray, size: int) -> torch.Tensor:
    """Drawings of faces as uint8 `(n, 3, size, size)`."""
    return torch.from_numpy(render_faces(factors, size)).permute(0, 3, 1, 2).contiguous()


def nearest_training_images(training: torch.Tensor, queries: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """For each query the training image with the least squared error over the pixels seen.

    Args:
        training: uint8 `(m, C, H, W)`; queries: floats in [0, 1] `(n, C, H, W)`; seen: bools `(n, H, W)`.

    Returns:
        floats in [0, 1] `(n, C, H, W)`.
    """
    weights = seen[:, None].expand_as(queries).float().flatten(1)  # (n, d)
    targets = (weights * queries.flatten(1)).double()
    best = torch.full((len(queries),), torch.inf, dtype=torch.float64)
    place = torch.zeros(len(queries), dtype=torch.long)
    for first in range(0, len(training), 2_000):
        rows = to_unit_range(training[first : first + 2_000]).flatten(1)
        # the error without the part of the query alone: sum of w t^2 - 2 w q t
        errors = (weights @ rows.square().T).double() - 2 * (targets.float() @ rows.T).double()
        found, column = errors.min(1)
        better = found < best
        best[better], place[better] = found[better], first + column[better]
    return to_unit_range(training[place])
