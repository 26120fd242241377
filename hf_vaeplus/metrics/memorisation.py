"""A guard against copies: how many samples lie nearer to a training image than held-out images do.

Every distance between two sets of images is won by a generator that repeats its training images with a little noise.
Held-out images say how near to the training images an image of the same law lies that nobody has copied. The
comparison of nearest distances is that of Meehan et al., "A Non-Parametric Test to Detect Data-Copying in Generative
Models", 2020, here at one quantile.
"""

import math

import torch

from .neighbours import checked, squared_distances

_ROUNDING = 1e-5  # of the length of a row: one image in two batches gives features that differ by some float32 steps


class MemorisationGuard:
    """The share of samples that are nearer to a training image than the nearest 5% of held-out images.

    Held-out images score 5%, by construction. A generator that repeats training images scores up to 100%. What is
    measured is the distance to the nearest row, in any space: codes, or features.

    Args:
        training (`torch.Tensor` of shape `(num_training >= 1, dim)`): codes or features of the images that the
            generator was trained on.
        held_out (`torch.Tensor` of shape `(num_held_out >= 2, dim)`): of images of the same law that it was not
            trained on.
        quantile (`float`): in (0, 0.5], 5% by default.

    Attributes:
        threshold (`float`): the distance below which `quantile` of the held-out images lie.
        copies (`float`): share of the held-out images at distance 0, which are training images themselves.
        reach (`float`): the share that a generator of nothing but copies would get: 1 unless more than `quantile` of
            the held-out images are training images. A guard whose reach is below 50% sees too little, and flags
            nothing.

    Raises:
        ValueError: wrong shapes, values that are not finite, or `quantile` out of range.

    Example:
        >>> guard = MemorisationGuard(training_codes, held_out_codes)
        >>> guard.compare(codes_of_samples)["share"]
    """

    def __init__(self, training: torch.Tensor, held_out: torch.Tensor, quantile: float = 0.05):
        if not 0 < quantile <= 0.5:
            raise ValueError(f"quantile must lie in (0, 0.5], got {quantile}.")
        training = checked(training, "training", 1)
        self.quantile = quantile
        self._origin = training.mean(0)
        self._training = training - self._origin
        self._rounding = _ROUNDING * float(training.square().sum(1).mean().sqrt())
        distances = self.nearest(checked(held_out, "held_out", 2, training.shape[1]))
        self.num_held_out = len(distances)
        rank = max(1, math.ceil(quantile * len(distances)))
        self.threshold = float(distances.kthvalue(rank).values)
        below, equal = (float(hit.double().mean()) for hit in self._hits(distances))
        # Of samples exactly at the threshold only a part counts, so that held-out images score `quantile` even where
        # many are at one distance, as black and white pixels are.
        self._part = max(0.0, quantile - below) / equal
        self.copies = float((distances == 0).double().mean())
        self.reach = 1.0 if self.threshold > 0 else min(1.0, self._part)

    def nearest(self, rows: torch.Tensor) -> torch.Tensor:
        """Distance of each row to the nearest training row: float64 of shape `(num_rows,)`, 0 within rounding."""
        rows = checked(rows, "rows", 1, len(self._origin)) - self._origin
        found = torch.cat([squares.amin(1) for _, squares in squared_distances(rows, self._training)])
        distances = found.clamp(min=0).sqrt()
        return distances.where(distances > self._rounding, 0.0)

    def compare(self, samples: torch.Tensor) -> dict:
        """
        Args:
            samples (`torch.Tensor` of shape `(num_samples >= 1, dim)`).

        Returns:
            `dict` of `share` (`float` in [0, 1], 5% for images of the same law that copy nothing), `limit` (twice the
            quantile, or with few images five standard errors of the share above the quantile, if that is more) and
            `flagged` (`share > limit`, never by a guard that sees too little).

        Raises:
            ValueError: wrong shape, or values that are not finite.
        """
        distances = self.nearest(samples)
        below, equal = (float(hit.double().mean()) for hit in self._hits(distances))
        share = below + self._part * equal
        variance = self.quantile * (1 - self.quantile) * (1 / len(distances) + 1 / self.num_held_out)
        limit = max(2 * self.quantile, self.quantile + 5 * math.sqrt(variance))
        return {"share": share, "limit": limit, "flagged": self.sees and share > limit}

    @property
    def sees(self) -> bool:
        """Whether copies would be flagged at all."""
        return self.reach >= 0.5

    def _hits(self, distances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return distances < self.threshold, distances == self.threshold
