"""How many dimensions a cloud of points fills: two estimators from the distances to nearest neighbours.

Both assume that the density hardly changes between a point and its neighbours. In many dimensions that needs more
points than anyone has, and points at the border lack neighbours on one side: both estimators then say too little.
[`dimension_of_cube`] undoes this bias as it is for a cube filled evenly by as many points.
"""

import numpy as np
import torch

# What the estimators say of points drawn evenly from a cube, by `cube_estimates`: means over 20 draws, 10 of 2,000 and
# 4 of 5,000 points. Rows: number of points. Columns: dimensions of the cube.
CUBE_DIMENSIONS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CUBE_POINTS = (500, 1_000, 2_000, 5_000)
CUBE_TWO_NN = (
    (1.01, 1.99, 3.75, 5.36, 6.75, 9.57, 12.37, 16.76, 21.15, 28.42, 34.22),
    (1.01, 1.95, 3.79, 5.44, 6.9, 9.84, 12.7, 17.43, 22.02, 29.64, 36.04),
    (0.99, 1.98, 3.9, 5.5, 7.12, 9.98, 12.81, 18.08, 22.44, 30.4, 37.28),
    (0.99, 1.97, 3.88, 5.6, 7.15, 10.12, 13.01, 17.97, 23.06, 31.27, 38.56),
)
CUBE_LEVINA_BICKEL = (
    (0.89, 1.72, 3.2, 4.61, 5.83, 8.21, 10.43, 14.12, 17.4, 22.98, 27.59),
    (0.89, 1.74, 3.28, 4.67, 5.96, 8.39, 10.75, 14.64, 18.15, 24.05, 29.19),
    (0.89, 1.74, 3.33, 4.75, 6.1, 8.54, 10.92, 15.14, 18.73, 25.02, 30.54),
    (0.89, 1.75, 3.39, 4.83, 6.21, 8.75, 11.21, 15.57, 19.53, 26.23, 32),
)


def nearest_distances(points: torch.Tensor, num_neighbours: int) -> torch.Tensor:
    """Euclidean distances of every point to its nearest neighbours, the nearest first.

    Args:
        points (`torch.Tensor` of shape `(n, dim)`): finite; copies of a point are left out.
        num_neighbours (`int`): k, at least 1.

    Returns:
        `torch.Tensor` of shape `(m, k)`: float64, positive, of the m <= n different points.

    Raises:
        ValueError: wrong shape, or not more than k different points.
    """
    if points.ndim != 2 or num_neighbours < 1:
        raise ValueError(f"points must have shape (n, dim) and num_neighbours be positive, got {tuple(points.shape)}.")
    points = torch.unique(points.cpu().float(), dim=0)
    if not len(points) > num_neighbours:
        raise ValueError(f"{num_neighbours} neighbours need more different points than that, got {len(points)}.")
    points = points - points.mean(0)
    squares, found = points.square().sum(1), []
    for start in range(0, len(points), 200):
        rows = torch.arange(start, min(start + 200, len(points)))
        near = squares[rows, None] + squares - 2 * points[rows] @ points.T
        near[torch.arange(len(rows)), rows] = torch.inf
        chosen = near.topk(num_neighbours, largest=False).indices
        # Once more from the differences: the difference of two large squares has lost its last digits.
        between = points[rows, None].double() - points[chosen].double()
        found.append(between.square().sum(2).sqrt().sort(1).values)
    return torch.cat(found).clamp(min=torch.finfo(torch.float32).tiny)


def two_nn(distances: torch.Tensor, kept: float = 0.9) -> float:
    """The dimension from the ratio mu of the two nearest distances (Facco et al., 2017): -log(1 - F(mu)) = d log mu.

    Args:
        distances (`torch.Tensor` of shape `(n, k >= 2)`): of [`nearest_distances`].
        kept (`float`): share of the points, those with the smallest ratios, that the line is fitted to.
    """
    ratios = (distances[:, 1] / distances[:, 0]).log().sort().values
    count = max(1, int(kept * len(ratios)))
    rank = torch.arange(1, count + 1, dtype=torch.float64)
    ratios, tail = ratios[:count], -torch.log1p(-rank / (len(ratios) + 1))
    return float((ratios * tail).sum() / ratios.square().sum())


def levina_bickel(distances: torch.Tensor) -> float:
    """The maximum likelihood estimate from k neighbours (Levina and Bickel, 2005), joined over points as by MacKay and
    Ghahramani: 1 / d is the mean of log(T_k / T_j) over points and neighbours j < k, with k - 2 in place of k - 1.

    Args:
        distances (`torch.Tensor` of shape `(n, k >= 3)`): of [`nearest_distances`].
    """
    logs = distances.log()
    return float((distances.shape[1] - 2) / (logs[:, -1:] - logs[:, :-1]).sum(1).mean())


def dimension_of_cube(estimate: float, num_points: int, table: tuple) -> float:
    """The dimension of the cube of which an estimator would say `estimate`, given as many points.

    Args:
        estimate (`float`): of `two_nn`, or of `levina_bickel` with 10 neighbours.
        num_points (`int`): the points it was made from; below 500 and above 5,000 the nearest of these counts.
        table: `CUBE_TWO_NN` or `CUBE_LEVINA_BICKEL`.

    Returns:
        `float` between 0 and 64, where the table ends.
    """
    known = np.log(CUBE_POINTS)
    said = [np.interp(np.log(num_points), known, column) for column in zip(*table, strict=True)]
    return float(np.interp(estimate, [0.0, *said], [0.0, *CUBE_DIMENSIONS]))


def cube_estimates(dim: int, num_points: int, draws: int, seed: int = 0) -> tuple[float, float]:
    """A cell of the two tables: means of `two_nn` and `levina_bickel` over draws from the unit cube."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        distances = nearest_distances(torch.rand(num_points, dim, generator=generator), 10)
        found.append((two_nn(distances), levina_bickel(distances)))
    return tuple(float(column) for column in np.mean(found, axis=0))
