"""Sliced 2-Wasserstein distance between two sets of features, with the scale of MIND.

With the features of Inception-v3 of 2015-12-05 this is MIND (Berthet et al., "MIND: Monge Inception Distance for
Generative Models Evaluation", arXiv 2605.06797, 2026); with others it is not called so.
"""

import numpy as np
import torch

from .neighbours import checked

_BLOCK = 100  # directions at a time


def sliced_wasserstein(x: torch.Tensor, y: torch.Tensor, num_projections: int = 1000, seed: int = 0) -> float:
    """3 dim times the mean, over random unit directions u, of the squared 2-Wasserstein distance of u.x and u.y.

    In one dimension optimal transport pairs the sorted values, so that whole distributions are compared and not their
    moments alone. A shift by d adds about 3 |d|^2, because (u.d)^2 is |d|^2 / dim on average. Never negative, and
    biased upward, the more the fewer the rows: compare with other real images at equal numbers of rows.

    Args:
        x, y (`torch.Tensor` of shape `(num_rows, dim)`): features. Sets of different sizes are compared exactly, each
            row with the weight 1 / num_rows.
        num_projections (`int`): directions, at least 1; 1,000 in torch-fidelity's MIND, whose seed is 2020.
        seed (`int`): of the directions.

    Returns:
        `float` in squared units of the features, computed in float64.

    Raises:
        ValueError: wrong shapes, values that are not finite, or no direction.
    """
    if num_projections < 1:
        raise ValueError(f"num_projections must be at least 1, got {num_projections}.")
    x = checked(x, "x", 1)
    y = checked(y, "y", 1, x.shape[1])
    origin = y.mean(0)
    x, y = x - origin, y - origin
    # Quantile functions are steps: between two neighbouring multiples of 1 / len(x) and 1 / len(y) both are constant.
    # In units of 1 / (len(x) len(y)) all is a whole number.
    edges = torch.cat([torch.arange(len(x) + 1) * len(y), torch.arange(1, len(y)) * len(x)]).unique()
    weights = edges.diff().double() / (len(x) * len(y))
    of_x, of_y = edges[:-1] // len(y), edges[:-1] // len(x)
    dim, total = x.shape[1], 0.0
    # All at once and in float32: these are the directions that torch-fidelity draws with this seed.
    drawn = torch.randn(num_projections, dim, generator=torch.Generator().manual_seed(seed))
    for block in drawn.split(_BLOCK):
        directions = block.double()
        directions /= directions.norm(dim=1, keepdim=True)
        # NumPy sorts several times faster, because it keeps no indices.
        a, b = (torch.from_numpy(np.sort((directions @ rows.T).numpy())) for rows in (x, y))  # (size, num_rows)
        total += float(((a[:, of_x] - b[:, of_y]).square() @ weights).sum())
    return 3 * dim * total / num_projections


def sliced_wasserstein_of_halves(rows: torch.Tensor, num_splits: int = 20, seed: int = 0) -> torch.Tensor:
    """The distance between two random halves of one set: what the distance of two sets of one law varies in.

    Args:
        rows (`torch.Tensor` of shape `(num_rows >= 2, dim)`): features of real images, twice as many as a set has.
        num_splits (`int`): at least 2; each has 100 directions of its own.
        seed (`int`): of the halves and the directions.

    Returns:
        `torch.Tensor` of shape `(num_splits,)`: float64.

    Raises:
        ValueError: as [`sliced_wasserstein`].
    """
    checked(rows, "rows", 2)
    source, half, found = torch.Generator().manual_seed(seed), len(rows) // 2, []
    for split in range(num_splits):
        order = torch.randperm(len(rows), generator=source)
        found.append(sliced_wasserstein(rows[order[:half]], rows[order[half : 2 * half]], 100, seed + split))
    return torch.tensor(found, dtype=torch.float64)
