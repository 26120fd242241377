"""Features in, numbers and warnings out: distances, neighbours, copies.

A distance alone can be won by copies of the training images, and by noise of the right mean and covariance. Each
number is therefore compared with that of other real images, and what differs is said in a sentence.
"""

import torch

from ..metrics.frechet import frechet_distance, frechet_rounding
from ..metrics.memorisation import MemorisationGuard
from ..metrics.prdc import NAMES, PRDC, standard_errors_below
from ..metrics.running import RunningMoments
from ..metrics.sliced import sliced_wasserstein, sliced_wasserstein_of_halves

NUM_NEIGHBOURS = 5
STANDARD_ERRORS = 5  # between two numbers that are said to differ
RELEVANT = 0.95  # of what other real images have: a number above this share of theirs is not worth a warning


class FeatureComparison:
    """How far sets of features are from those of real images.

    Args:
        reference (`torch.Tensor` of shape `(num_reference >= 2, dim)`): of held-out images.
        training (`torch.Tensor` of shape `(num_training, dim)`, *optional*): of the images that the generator was
            trained on, for the guard against copies.

    Raises:
        ValueError: wrong shapes, or values that are not finite.
    """

    def __init__(self, reference: torch.Tensor, training: torch.Tensor | None = None):
        self.reference = reference
        self._moments = _moments_of(reference)
        self.rounding = frechet_rounding(self._moments)
        self._balls = PRDC(reference, NUM_NEIGHBOURS) if len(reference) > NUM_NEIGHBOURS else None
        self.guard = None if training is None else MemorisationGuard(training, reference)

    def __call__(self, features: torch.Tensor) -> dict:
        """
        Args:
            features (`torch.Tensor` of shape `(num_rows >= 2, dim)`).

        Returns:
            `dict` with `frechet`, `sliced_wasserstein`, `prdc` (of [`~hf_vaeplus.metrics.prdc.PRDC.compare`]; `None`
            with fewer than 6 rows) and `memorised` (of
            [`~hf_vaeplus.metrics.memorisation.MemorisationGuard.compare`]; `None` without training images).
        """
        return {
            "frechet": frechet_distance(self._moments, _moments_of(features)),
            "sliced_wasserstein": sliced_wasserstein(self.reference, features),
            "prdc": self._balls.compare(features) if self._balls and len(features) > NUM_NEIGHBOURS else None,
            "memorised": None if self.guard is None else self.guard.compare(features),
        }

    def sliced_limit(self, real: torch.Tensor) -> float:
        """The sliced distance that other real images stay below.

        Args:
            real (`torch.Tensor` of shape `(num_rows, dim)`): of real images that are not the reference.

        Returns:
            `float`: five standard deviations over random halves of all real images above their mean; or above the
            distance of `real` itself where that is more, because images in the order of a folder are seldom mixed.
        """
        halves = sliced_wasserstein_of_halves(torch.cat([self.reference, real]))
        expected = max(float(halves.mean()), sliced_wasserstein(self.reference, real))
        return expected + STANDARD_ERRORS * float(halves.std())


def warnings_of(found: dict, real: dict | None, sliced_limit: float | None) -> list[str]:
    """What is wrong with a set of samples, a sentence each; empty for what cannot be told from real images.

    Args:
        found: what [`FeatureComparison`] returned for the samples.
        real: the same for real images that are not the reference; without them only copies are found.
        sliced_limit: by [`FeatureComparison.sliced_limit`], of these real images.
    """
    told = []
    if found["memorised"] and found["memorised"]["flagged"]:
        told.append(copies_sentence(found["memorised"]))
    if real is None:
        return told
    if found["prdc"] and real["prdc"]:
        below = standard_errors_below(found["prdc"], real["prdc"])
        for name in NAMES:
            ours, theirs = found["prdc"][name], real["prdc"][name]
            if below[name] > STANDARD_ERRORS and ours < RELEVANT * theirs:
                told.append(f"{_MEANINGS[name]}: {name} {ours:.3f}, other real images {theirs:.3f}.")
    if found["sliced_wasserstein"] > sliced_limit:
        told.append(
            f"features are distributed in another way: sliced distance {found['sliced_wasserstein']:.4g}, other real"
            f" images up to {sliced_limit:.4g}."
        )
    return told


_MEANINGS = {
    "precision": "samples lie where there are no real images",
    "recall": "some real images have no samples near them",
    "density": "samples lie where real images are rare",
    "coverage": "some real images have no samples near them",
}


def copies_sentence(memorised: dict) -> str:
    return (
        f"samples repeat training images: {memorised['share']:.1%} are nearer to one than 95% of held-out images are,"
        f" expected 5%, at most {memorised['limit']:.0%}."
    )


def _moments_of(features: torch.Tensor) -> RunningMoments:
    moments = RunningMoments(features.shape[1])
    moments.update(features)
    return moments
