"""Precision, recall, density and coverage of samples, by balls around nearest neighbours in feature space.

Precision and recall: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models",
2019. Density and coverage: Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", 2020.
"""

import torch

from .neighbours import checked, squared_distances

# A point on the sphere of a ball is outside, as in the authors' code. Copies of images lie there exactly, and rounding
# must not decide.
_SLACK = 1e-12


NAMES = ("precision", "recall", "density", "coverage")


class PRDC:
    """The balls of a reference set. The ball of a row reaches to its k-th nearest other row of the same set.

    Args:
        reference (`torch.Tensor` of shape `(num_reference, dim)`): features of real images, more rows than k.
        num_neighbours (`int`): k, at least 1; 5 in the paper of 2020, 3 in that of 2019.

    Raises:
        ValueError: wrong shapes, values that are not finite, or too few rows.

    Example:
        >>> balls = PRDC(reference)  # made once
        >>> balls.compare(samples)["coverage"]
    """

    def __init__(self, reference: torch.Tensor, num_neighbours: int = 5):
        if num_neighbours < 1:
            raise ValueError(f"num_neighbours must be at least 1, got {num_neighbours}.")
        self.num_neighbours = num_neighbours
        reference = checked(reference, "reference", num_neighbours + 1)
        self._origin = reference.mean(0)
        self._reference = reference - self._origin
        self._radii = self._squared_radii(self._reference)

    def compare(self, samples: torch.Tensor) -> dict:
        """All four, exact, in float64. Memory grows with the rows and not with their pairs.

        Precision and recall grow with the number of rows, and an outlier of the set that makes the balls has a huge
        ball. Density and coverage use the balls of the reference alone.

        Args:
            samples (`torch.Tensor` of shape `(num_samples, dim)`): features, more rows than k.

        Returns:
            `dict` of `precision` (share of the samples inside a ball of the reference), `recall` (share of the
            reference inside a ball of the samples), `density` (balls of the reference that a sample lies in, over k,
            on average: about 1 for samples of the law of the reference, and not bounded by it) and `coverage` (share
            of the balls of the reference that hold a sample: about 1 - 2^-k for as many samples of its law). They are
            means of what is there as well: `balls` (int64 of shape `(num_samples,)`, of the reference, around each
            sample), `covered` and `recalled` (`bool` of shape `(num_reference,)`).

        Raises:
            ValueError: as the class.
        """
        samples = checked(samples, "samples", self.num_neighbours + 1, len(self._origin)) - self._origin
        radii = self._squared_radii(samples)
        balls = torch.zeros(len(samples), dtype=torch.int64)  # of the reference, that each sample lies in
        covered, recalled = [], []
        for block, distances in squared_distances(self._reference, samples, _SLACK):
            inside = distances < self._radii[block, None]
            balls += inside.sum(0)
            covered.append(inside.any(1))
            recalled.append((distances < radii).any(1))
        covered, recalled = torch.cat(covered), torch.cat(recalled)
        return {
            "precision": float((balls > 0).double().mean()),
            "recall": float(recalled.double().mean()),
            "density": float(balls.double().mean()) / self.num_neighbours,
            "coverage": float(covered.double().mean()),
            "balls": balls,
            "covered": covered,
            "recalled": recalled,
        }

    def _squared_radii(self, rows: torch.Tensor) -> torch.Tensor:
        radii = []
        for block, distances in squared_distances(rows, rows):
            distances[torch.arange(len(distances)), torch.arange(len(rows))[block]] = torch.inf  # no row is its own
            radii.append(distances.topk(self.num_neighbours, largest=False).values[:, -1])
        return torch.cat(radii)


def standard_errors_below(samples: dict, real: dict) -> dict[str, float]:
    """How far the four numbers of samples lie below those of other real images, in standard errors of the difference.

    Recall and coverage are compared row by row of the reference, as McNemar's test does, and precision and density as
    means of two independent sets. Neighbours make rows depend on each other a little: two sets of real images lie
    within five standard errors, not within three.

    Args:
        samples, real: what [`PRDC.compare`] of one reference returned.

    Returns:
        `dict` of `precision`, `recall`, `density` and `coverage`: negative for a number above that of real images,
        infinite for a difference without any spread.
    """
    balls, found = [each["balls"].double() for each in (real, samples)], {}
    for name, (a, b) in {"precision": [(each > 0).double() for each in balls], "density": balls}.items():
        variance = a.var(correction=0) / len(a) + b.var(correction=0) / len(b)
        found[name] = _in_errors(a.mean() - b.mean(), variance)
    for name, rows in (("recall", "recalled"), ("coverage", "covered")):
        difference = real[rows].double() - samples[rows].double()
        found[name] = _in_errors(difference.mean(), difference.var(correction=0) / len(difference))
    return {name: found[name] for name in NAMES}


def _in_errors(difference: torch.Tensor, variance: torch.Tensor) -> float:
    return float(difference / variance.sqrt()) if difference else 0.0
