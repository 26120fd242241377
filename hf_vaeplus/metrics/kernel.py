"""Kernel distance between two sets of features (Binkowski et al., "Demystifying MMD GANs", 2018).

With the features of Inception-v3 of 2015-12-05 this is KID; with others it is not called so.
"""

import torch


def kernel_distance(
    x: torch.Tensor, y: torch.Tensor, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Unbiased estimate of the squared MMD with the kernel k(a, b) = (a.b / dim + 1)^3, over random subsets.

    0 is no difference; unbiased, so that it can be negative, and so that sets of different sizes can be compared.

    Args:
        x, y (`torch.Tensor` of shape `(num_rows, dim)`): features, at least `subset_size` rows each.
        num_subsets (`int`): pairs of subsets, at least 1, each drawn without replacement.
        subset_size (`int`): rows of a subset, at least 2.
        seed (`int`): of the subsets.

    Returns:
        `(float, float)`: mean and (population) standard deviation over the subsets, computed in float64. Subsets share
        rows: the deviation is no standard error of the mean.

    Raises:
        ValueError: wrong shapes, values that are not finite, or too few rows or subsets.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"kernel_distance needs x and y of shape (num_rows, dim) with one dim, got {tuple(x.shape)} and"
            f" {tuple(y.shape)}."
        )
    if num_subsets < 1 or not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"num_subsets must be at least 1 and subset_size from 2 to the number of rows, got {num_subsets} and"
            f" {subset_size} with {len(x)} and {len(y)} rows."
        )
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features must be finite, got NaN or infinity.")
    source = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(num_subsets):
        a, b = (rows[torch.randperm(len(rows), generator=source)[:subset_size]].cpu().double() for rows in (x, y))
        within = sum(_kernel(rows, rows).sum() - _kernel_with_itself(rows).sum() for rows in (a, b))
        estimates.append(within / (subset_size * (subset_size - 1)) - 2 * _kernel(a, b).mean())
    estimates = torch.stack(estimates)
    return float(estimates.mean()), float(estimates.std(correction=0))


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _kernel_with_itself(rows: torch.Tensor) -> torch.Tensor:
    return (rows.square().mean(1) + 1) ** 3
