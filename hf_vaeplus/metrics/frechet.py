"""Frechet distance between Gaussians fitted to two sets of features (Dowson and Landau, 1982).

With the features of Inception-v3 of 2015-12-05 this is FID (Heusel et al., 2017); with others it is not called so.
"""

import torch

from .running import RunningMoments


def frechet_distance(a: RunningMoments, b: RunningMoments) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), in squared units of the features.

    With symmetric factors cov = F F^T the last trace is the sum of the singular values of F_a^T F_b: no complex square
    root of a matrix is needed, and covariances may be singular, as they are with fewer rows than dimensions. The
    distance is biased upward, the more the fewer the rows: compare at equal numbers of rows.

    Args:
        a, b ([`~hf_vaeplus.metrics.running.RunningMoments`]): of at least two rows each, of one dimension.

    Returns:
        `float` >= 0, computed in float64.

    Raises:
        ValueError: dimensions that differ, fewer than two rows, or moments without a covariance.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"a and b must have features of one dimension, got {len(a.mean)} and {len(b.mean)}.")
    covariances = a.covariance, b.covariance
    factors = [_factor(covariance) for covariance in covariances]
    cross = torch.linalg.svdvals(factors[0].T @ factors[1]).sum()
    distance = (a.mean - b.mean).square().sum() + sum(covariance.trace() for covariance in covariances) - 2 * cross
    return max(0.0, float(distance))  # rounding can leave -1e-16 of the traces


def frechet_rounding(reference: RunningMoments) -> float:
    """The distance from a reference up to which it may be rounding alone, say because images have 8 bits.

    Returns:
        `float`: 1e-6 of the mean squared norm of the features. Downsampled pictures that show anything lie beyond
        5e-5 of it, and those that are flat or smooth within 8e-7.
    """
    return 1e-6 * float(reference.covariance.trace() + reference.mean.square().sum())


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """F of shape `(dim, rank)` with covariance = F F^T. Eigenvalues within rounding of 0 are dropped.

    Kept, an eigenvalue of 1e-16 in a dimension that the rows do not fill would become 1e-8 under the square root.
    """
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
