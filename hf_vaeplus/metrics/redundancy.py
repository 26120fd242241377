"""Whether latent dimensions say again what the others have said."""

import math

import torch


def determined_share(codes: torch.Tensor, share: float = 0.5, max_points: int = 900, seed: int = 0) -> float:
    """The share of the variance of some latent dimensions that the others determine, by regression.

    Codes that fill their space give about 0. Codes on a surface of fewer dimensions than they have numbers, the
    redundancy of an under-regularised model (Section 2), give about 1 once `share` of the numbers fix a point on it.

    A random `share` of the dimensions, standardised, predicts each of the others by kernel ridge regression with a
    Gaussian kernel as wide as the median distance. It is fitted to two thirds of the points and judged on the rest;
    of four ridges the best counts, and the result is the mean over three choices of dimensions.

    Args:
        codes (`torch.Tensor` of shape `(n >= 30, dim)`): say posterior means of the active dimensions.
        share (`float`): in (0, 1).
        max_points (`int`): only so many points are used, the first ones.
        seed (`int`): of the choices.

    Returns:
        `float` in [0, 1]; 0 for fewer than two dimensions that vary.

    Raises:
        ValueError: wrong shape.
    """
    if codes.ndim != 2 or len(codes) < 30:
        raise ValueError(f"codes must have shape (n >= 30, dim), got {tuple(codes.shape)}.")
    codes = codes[:max_points].cpu().double()
    codes = codes[:, codes.std(0) > 1e-6 * codes.std(0).max()]
    if codes.shape[1] < 2:
        return 0.0
    codes = (codes - codes.mean(0)) / codes.std(0)
    count, dim = codes.shape
    fitted, known = 2 * count // 3, min(dim - 1, max(1, round(share * dim)))
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(3):
        order = torch.randperm(dim, generator=generator)
        given, wanted = codes[:, order[:known]], codes[:, order[known:]]
        squared = torch.cdist(given, given).square()
        kernel = torch.exp(-squared / (2 * squared.median()))
        values, axes = torch.linalg.eigh(kernel[:fitted, :fitted])
        middle = wanted[:fitted].mean(0)
        projected, across = axes.T @ (wanted[:fitted] - middle), kernel[fitted:, :fitted] @ axes
        total = (wanted[fitted:] - middle).square().sum()
        missed = [
            (across @ (projected / (values + ridge)[:, None]) + middle - wanted[fitted:]).square().sum()
            for ridge in (1e-4, 1e-2, 0.1, 1.0)
        ]
        found.append(max(0.0, 1 - float(min(missed) / total)))
    return math.fsum(found) / len(found)
