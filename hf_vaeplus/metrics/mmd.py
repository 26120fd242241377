"""Maximum mean discrepancy between two sets of latents, with the kernels of "Wasserstein Auto-Encoders"."""

import functools
import math
from collections.abc import Sequence

import torch

WAE_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of the authors' code, tolstikhin/wae

_BLOCK_VALUES = 2**18  # pairs at a time: 2 MiB of float64 stay in a processor's caches


def imq_mmd(
    x: torch.Tensor, y: torch.Tensor, prior_variance: float = 1.0, scales: Sequence[float] = WAE_SCALES
) -> torch.Tensor:
    """Unbiased estimate of the squared MMD with inverse multiquadratic kernels (Tolstikhin et al. 2018, Algorithm 2).

        k(a, b) = sum over s of C / (C + ||a - b||^2),    C = s * 2 * dim * prior_variance
        MMD^2 = mean k(x_i, x_j), i != j  +  mean k(y_i, y_j), i != j  -  2 mean k(x_i, y_j)

    0 is no difference; unbiased, so that it can be negative; below twice the number of scales. Computed in float64 by
    blocks of rows: memory grows with the rows and not with their square. With gradients to `x` and `y` it is also the
    penalty of WAE-MMD training; their graph keeps every pair, which is little for a batch.

    Args:
        x (`torch.Tensor` of shape `(num_x >= 2, dim)`): latents, say of encoded data.
        y (`torch.Tensor` of shape `(num_y >= 2, dim)`): latents, say of the prior; on the device of `x`.
        prior_variance (`float`): variance per dimension of the prior, which sets the width of the kernels.
        scales (sequence of `float`): s, positive.

    Returns:
        `torch.Tensor` of shape `()`: float64 (float32 where the device has no other), on the device of `x`.

    Raises:
        ValueError: wrong shapes, or a variance or scale that is not positive.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"imq_mmd needs x and y of shape (num >= 2, dim) with one dim, got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    if not scales or not all(0 < value < math.inf for value in (prior_variance, *scales)):
        raise ValueError(
            f"prior_variance and all scales must be positive, got prior_variance={prior_variance}, scales={scales}."
        )
    widths = [scale * 2 * x.shape[1] * prior_variance for scale in scales]
    widest = _widest_float(x.device)
    x, y = x.to(widest), y.to(widest)
    # The kernel sees differences alone; a common offset would cost the precision of |a|^2 + |b|^2 - 2 ab.
    origin = y.detach().mean(0)
    x, y = x - origin, y - origin
    diagonal = len(widths)  # k(a, a)
    within_x = (_sum_of_kernels(x, None, widths) - len(x) * diagonal) / (len(x) * (len(x) - 1))
    within_y = (_sum_of_kernels(y, None, widths) - len(y) * diagonal) / (len(y) * (len(y) - 1))
    return within_x + within_y - 2 * _sum_of_kernels(x, y, widths) / (len(x) * len(y))


@functools.cache
def _widest_float(device: torch.device) -> torch.dtype:
    try:
        return torch.empty(0, dtype=torch.float64, device=device).dtype
    except TypeError:  # Apple's MPS
        return torch.float32


def _sum_of_kernels(x: torch.Tensor, y: torch.Tensor | None, widths: Sequence[float]) -> torch.Tensor:
    """Sum over all pairs and widths C of C / (C + ||x_i - y_j||^2), for float64 rows; y is x if it is None."""
    with_itself, total, start = y is None, x.new_zeros(()), 0
    y = x if with_itself else y
    norms = y.square().sum(1)
    while start < len(x):
        first = start if with_itself else 0  # the pairs of a set with itself count twice, but for the square block
        others = y[first:]
        block = x[start : start + math.ceil(_BLOCK_VALUES / len(others))]
        # By a matrix product: in float64 its rounding, 1e-16 of the squared norms, is far below every width.
        product = torch.addmm(norms[first:], block, others.T, alpha=-2)
        squared_distance = (product + block.square().sum(1, keepdim=True)).clamp(min=0)
        for width in widths:
            kernel = (squared_distance + width).reciprocal_()
            pairs = 2 * kernel.sum() - kernel[:, : len(block)].sum() if with_itself else kernel.sum()
            total = total + width * pairs
        start += len(block)
    return total
