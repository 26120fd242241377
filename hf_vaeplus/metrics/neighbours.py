"""Euclidean distances between all rows of two sets, block by block, in float64."""

import math
from collections.abc import Iterator

import torch

_BLOCK_VALUES = 2**23  # distances at a time: 64 MiB


def checked(rows: torch.Tensor, name: str, at_least: int, dim: int | None = None) -> torch.Tensor:
    """`rows` as float64 on the CPU.

    Raises:
        ValueError: not of shape `(num_rows >= at_least, dim)`, or values that are not finite.
    """
    if rows.ndim != 2 or len(rows) < at_least or rows.shape[1] != (dim or rows.shape[1]):
        raise ValueError(
            f"{name} must have shape (num_rows >= {at_least}, {'dim' if dim is None else dim}), got"
            f" {tuple(rows.shape)}."
        )
    rows = rows.detach().cpu().double()
    if not bool(rows.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity.")
    return rows


def squared_distances(x: torch.Tensor, y: torch.Tensor, slack: float = 0.0) -> Iterator[tuple[slice, torch.Tensor]]:
    """|x_i - y_j|^2 for a block of rows i and all j at a time.

    By one matrix product for each block, |x|^2 + |y|^2 - 2 x.y: its rounding is some 1e-15 of |x|^2 + |y|^2. Take off
    a common origin before, since a large one would cost precision.

    Args:
        x, y (`torch.Tensor` of shape `(num_x, dim)` and `(num_y, dim)`): float64.
        slack (`float`): so much of |x|^2 + |y|^2 is added: an upper bound of the distance, where rounding matters.

    Yields:
        `(slice, torch.Tensor of shape (rows of the block, num_y))`. Rounding can leave values just below 0.
    """
    y_norms = (1 + slack) * y.square().sum(1)
    size = math.ceil(_BLOCK_VALUES / len(y))
    for start in range(0, len(x), size):
        block = x[start : start + size]
        x_norms = (1 + slack) * block.square().sum(1, keepdim=True)
        yield slice(start, start + len(block)), torch.addmm(y_norms, block, y.T, alpha=-2).add_(x_norms)
