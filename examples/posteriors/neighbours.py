"""Nearest neighbours in code space, beside those in pixels.

    python examples/posteriors/neighbours.py drawings
    python examples/posteriors/neighbours.py mnist --pipeline runs/mnist/pipeline --data ../shared/data/mnist

The nearest training image of an unseen one should show the same: the same digit, or a face with nearly the same
factors. It is looked for among posterior means, some numbers an image, and among pixels.
"""

import sys

from common import Data, use
from sklearn.neighbors import NearestNeighbors


def measure(data: Data, args) -> dict:
    training, queries = data.training(args.num_training), data.unseen(args.num_images)
    labels, wanted = data.training_labels(len(training)), data.unseen_labels(len(queries))
    spaces = {
        "code space": [data.pipe.encode(images, 500).mean for images in (training, queries)],
        "pixels": [images.flatten(1).float() / 255 for images in (training, queries)],
    }
    found = {}
    for name, (known, asked) in spaces.items():
        place = (
            NearestNeighbors(n_neighbors=1, algorithm="brute").fit(known.numpy()).kneighbors(asked.numpy())[1][:, 0]
        )
        found[name] = {"numbers": known.shape[1]} | agreement(labels[place], wanted)
    return {"num_training": len(training), **found}


def agreement(found, wanted) -> dict:
    """Share of equal labels or, of factors, the mean squared distance beside that of two drawings taken at random."""
    if wanted.ndim == 1:
        return {"same label": float((found == wanted).mean())}
    squares = ((found - wanted) ** 2).sum(1).mean()
    return {"squared distance of factors": float(squares), "of random pairs": 2 * wanted.shape[1] / 3}


def add_options(parser):
    parser.add_argument("--num_training", type=int, default=20_000, help="training images to look in")


if __name__ == "__main__":
    sys.exit(use("neighbours", __doc__, measure, ("drawings", "mnist"), add_options))
