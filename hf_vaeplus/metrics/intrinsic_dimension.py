"""How many dimensions a cloud of points fills: two estimators from the distances to nearest neighbours.

Both assume that the density hardly changes between a point and its neighbours. In many dimensions that needs more
points than anyone has, and points at the border lack neighbours on one side: both estimators then say too little.
[`corrected_dimensions`] undoes this bias by what they say of as many points of known laws.
"""

import numpy as np
import torch

# What the estimators say of points of a uniform cube and of a standard normal, by `table_cell`: means over draws, 20
# of 500 points down to 3 of 5,000. Rows: number of points. Columns: dimensions.
TABLE_DIMENSIONS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
TABLE_POINTS = (500, 1_000, 2_000, 5_000)
TWO_NN_OF = {
    "cube": (
        (1.01, 1.99, 3.75, 5.36, 6.75, 9.57, 12.37, 16.76, 21.15, 28.42, 34.22),
        (1.01, 1.95, 3.79, 5.44, 6.9, 9.84, 12.7, 17.43, 22.02, 29.64, 36.04),
        (0.99, 1.98, 3.9, 5.5, 7.12, 9.98, 12.81, 18.08, 22.44, 30.4, 37.28),
        (0.99, 1.97, 3.88, 5.6, 7.15, 10.12, 13.01, 17.97, 23.06, 31.27, 38.56),
    ),
    "normal": (
        (1.02, 1.99, 4.08, 5.96, 7.93, 11.08, 13.38, 18.15, 21.98, 28.19, 34.58),
        (1.03, 1.99, 3.95, 6.05, 8.14, 11.17, 13.89, 18.72, 22.96, 30.07, 35.75),
        (1.02, 1.98, 4, 6.01, 7.93, 11.22, 14.28, 19.19, 23.8, 31.31, 37.01),
        (1, 2.01, 4.02, 6.06, 8, 11.46, 14.57, 19.81, 24.58, 32.87, 38.89),
    ),
}
LEVINA_BICKEL_OF = {  # 10 neighbours
    "cube": (
        (0.89, 1.72, 3.2, 4.61, 5.83, 8.21, 10.43, 14.12, 17.4, 22.98, 27.59),
        (0.89, 1.74, 3.28, 4.67, 5.96, 8.39, 10.75, 14.64, 18.15, 24.05, 29.19),
        (0.89, 1.74, 3.33, 4.75, 6.1, 8.54, 10.92, 15.14, 18.73, 25.02, 30.54),
        (0.89, 1.75, 3.39, 4.83, 6.21, 8.75, 11.21, 15.57, 19.53, 26.23, 32),
    ),
    "normal": (
        (0.89, 1.81, 3.58, 5.12, 6.63, 9.07, 11.12, 14.7, 17.71, 22.76, 26.85),
        (0.89, 1.78, 3.6, 5.27, 6.78, 9.42, 11.57, 15.47, 18.63, 24.11, 28.66),
        (0.89, 1.78, 3.6, 5.3, 6.87, 9.64, 11.97, 16.03, 19.55, 25.23, 30.16),
        (0.89, 1.78, 3.6, 5.34, 6.99, 9.91, 12.47, 16.78, 20.53, 26.81, 31.91),
    ),
}


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
    points = points.cpu().float().contiguous()
    first = {row.tobytes(): number for number, row in reversed(list(enumerate(points.numpy())))}
    points = points[sorted(first.values())]
    if not len(points) > num_neighbours:
        raise ValueError(f"{num_neighbours} neighbours need more different points than that, got {len(points)}.")
    points = points - points.mean(0)
    squares, found = points.square().sum(1), []
    for start in range(0, len(points), 100):
        rows = torch.arange(start, min(start + 100, len(points)))
        near = squares[rows, None] + squares - 2 * points[rows] @ points.T
        near[torch.arange(len(rows)), rows] = torch.inf
        chosen = near.topk(num_neighbours, largest=False).indices
        # Once more from the differences: the difference of two large squares has lost its last digits.
        found.append((points[rows, None] - points[chosen]).norm(dim=2).double().sort(1).values)
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


def corrected_dimensions(distances: torch.Tensor) -> dict:
    """The dimension by both estimators, without the bias that they have for as many points of known laws.

    A cube has sharp borders on all sides and a normal distribution has none; data lie between. So each estimator gives
    two numbers, the dimension of the cube and of the normal distribution of which it would say the same.

    Args:
        distances (`torch.Tensor` of shape `(n, 10)`): of [`nearest_distances`].

    Returns:
        `dict` with `two_nn` and `levina_bickel` (as they are), `low`, `high` and `middle` (smallest, largest and mean
        of the four corrected numbers, at most 64, where the tables end) and `num_points`. Below 500 and above 5,000
        points the tables' nearest row counts.
    """
    count = len(distances)
    raw = {"two_nn": two_nn(distances), "levina_bickel": levina_bickel(distances)}
    found = []
    for estimate, tables in zip(raw.values(), (TWO_NN_OF, LEVINA_BICKEL_OF), strict=True):
        for table in tables.values():
            said = [np.interp(np.log(count), np.log(TABLE_POINTS), column) for column in zip(*table, strict=True)]
            found.append(float(np.interp(estimate, [0.0, *said], [0.0, *TABLE_DIMENSIONS])))
    middle = sum(found) / len(found)
    return {**raw, "low": min(found), "high": max(found), "middle": middle, "num_points": count}


def table_cell(law: str, dim: int, num_points: int, draws: int, seed: int = 0) -> tuple[float, float]:
    """A cell of the tables: means of `two_nn` and `levina_bickel` over draws from the law, "cube" or "normal"."""
    draw = {"cube": torch.rand, "normal": torch.randn}[law]
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        distances = nearest_distances(draw(num_points, dim, generator=generator), 10)
        found.append((two_nn(distances), levina_bickel(distances)))
    return tuple(float(column) for column in np.mean(found, axis=0))
