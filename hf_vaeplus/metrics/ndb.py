"""Number of statistically different bins (Richardson and Weiss, "On GANs and GMMs", 2018)."""

import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from .running import RunningMoments

_BLOCK = 1000  # images that are float64 at one time


@dataclass(frozen=True, eq=False)
class NDB:
    r"""
    Voronoi bins of a reference set, and how many of them a set of samples fills differently. K-means makes the bins.

    centres (`torch.Tensor` of shape `(num_bins, dim)`): float64, mean image of each bin on [0, 1] pixels: what
        figures show.
    mean, scale (`torch.Tensor` of shape `(dim,)`): float64, taken off and divided by before distances; 0 and 1
        without whitening.
    dims (`torch.Tensor` of shape `(num_used,)`): int64, the pixels that distances are measured on.
    counts (`torch.Tensor` of shape `(num_bins,)`): int64, reference images per bin.

    Example:
        >>> ndb = NDB.fit(reference, num_bins=100)
        >>> counts = sum(ndb.count(batch) for batch in batches)  # add those of other processes too
        >>> ndb.compare(counts)["ndb_over_k"]
    """

    centres: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    dims: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def fit(
        cls,
        reference: torch.Tensor,
        num_bins: int,
        whiten: bool = True,
        max_dims: int = 1000,
        seed: int = 0,
        n_init: int = 10,
        max_iter: int = 100,
    ) -> "NDB":
        """Cluster a reference set. The defaults are those of the authors' CelebA script (`eitanrich/gans-n-gmms`).

        There the reference is the training set, each image mirrored with probability 1/2: that is left to the caller.
        One rule fills the bins of reference and samples, the nearest centre; the authors count the reference by its
        k-means labels, which differ for a few images where k-means stopped early.

        Args:
            reference (`torch.Tensor` of shape `(num_images, *dims)`): uint8, or floats in [0, 1].
            num_bins (`int`): K, at least 2; published with 100, 200 and 300.
            whiten (`bool`): divide every pixel by its standard deviation + 1e-6, after taking off its mean.
            max_dims (`int`): with more pixels, a random sixth of them is used for distances, chosen by `seed`.
            seed (`int`): of those pixels and of k-means.
            n_init, max_iter (`int`): k-means++ starts, and iterations of each.

        Raises:
            ValueError: fewer images than bins, fewer different images than bins, or wrong pixels.
        """
        if not 2 <= num_bins <= len(reference):
            raise ValueError(f"num_bins must be from 2 to the {len(reference)} reference images, got {num_bins}.")
        dim = reference[0].numel()
        mean, scale = torch.zeros(dim, dtype=torch.float64), torch.ones(dim, dtype=torch.float64)
        if whiten:
            moments = RunningMoments(dim, covariance=False)
            for block in reference.split(_BLOCK):
                moments.update(_rows(block))
            mean = moments.mean
            scale = (moments.variance * (len(reference) - 1) / len(reference)).sqrt() + 1e-6  # NumPy's std
        dims = torch.arange(dim)
        if dim > max_dims:
            dims = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))[: dim // 6].sort().values

        # float32: k-means reads this array some hundred times.
        points = torch.cat([_points(block, mean, scale, dims).float() for block in reference.split(_BLOCK)])
        kmeans = KMeans(num_bins, n_init=n_init, max_iter=max_iter, random_state=seed, copy_x=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of too few different points: raised below
            labels = torch.from_numpy(kmeans.fit(points.numpy()).labels_).long()
        sizes = labels.bincount(minlength=num_bins)
        if not bool(sizes.all()):
            raise ValueError(
                f"reference has {int((sizes > 0).sum())} different images, fewer than num_bins={num_bins}."
            )
        sums = torch.zeros(num_bins, dim, dtype=torch.float64)
        for block, bins in zip(reference.split(_BLOCK), labels.split(_BLOCK), strict=True):
            sums.index_add_(0, bins, _rows(block))
        ndb = cls(sums / sizes[:, None], mean, scale, dims, sizes)
        return replace(ndb, counts=ndb.count(reference))

    def assign(self, images: torch.Tensor) -> torch.Tensor:
        """Bin of each image, that of the nearest centre: int64 of shape `(batch,)`.

        Args:
            images (`torch.Tensor` of shape `(batch, *dims)`): pixels as in the reference.

        Raises:
            ValueError: images of another size, or wrong pixels.
        """
        if images.ndim < 2 or images[0].numel() != len(self.mean):
            raise ValueError(f"images must hold {len(self.mean)} values each, got shape {tuple(images.shape)}.")
        centres, half_norms = self._whitened_centres
        nearest = []
        for block in images.split(_BLOCK):
            points = _points(block, self.mean, self.scale, self.dims)
            nearest.append((half_norms - points @ centres.T).argmin(1))  # half the squared distance less |point|^2 / 2
        return torch.cat(nearest)

    @cached_property
    def _whitened_centres(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres as `_points` are, and half their squared norms: made once, not for every batch."""
        centres = (self.centres[:, self.dims] - self.mean[self.dims]) / self.scale[self.dims]
        return centres, 0.5 * centres.square().sum(1)

    def count(self, images: torch.Tensor) -> torch.Tensor:
        """Images per bin, int64 of shape `(num_bins,)`: counts of batches and processes add up. See [`NDB.assign`]."""
        return self.assign(images).bincount(minlength=len(self.counts))

    def compare(self, counts: torch.Tensor, alpha: float = 0.05) -> dict:
        """[`compare_bins`] of the reference and the `counts` of all samples."""
        return compare_bins(self.counts, counts, alpha)

    def save(self, path: Path) -> None:
        """Write the bins as safetensors: k-means on a large reference takes minutes."""
        save_file({name: getattr(self, name) for name in self.__dataclass_fields__}, path)

    @classmethod
    def load(cls, path: Path) -> "NDB":
        """Bins that [`NDB.save`] wrote. Raises ValueError for another file's tensors."""
        with safe_open(path, "pt") as file:
            if set(file.keys()) != set(cls.__dataclass_fields__):
                raise ValueError(f"{path} holds {sorted(file.keys())}, expected {sorted(cls.__dataclass_fields__)}.")
            return cls(**{name: file.get_tensor(name) for name in file.keys()})


def compare_bins(reference_counts: torch.Tensor, counts: torch.Tensor, alpha: float = 0.05) -> dict:
    """Compare two histograms: bin by bin with a two-proportion z-test, as a whole with the Jensen-Shannon divergence.

    With p the pooled proportion (p1 n1 + p2 n2) / (n1 + n2) of a bin, z = (p1 - p2) / sqrt(p (1 - p) (1/n1 + 1/n2));
    the bin is different where the two-tailed probability of z is below `alpha`. Two sets of one law differ in about
    `alpha` of the bins. A bin that is empty in both never counts. The test is a normal approximation: it wants some
    ten images in a bin.

    Args:
        reference_counts, counts (`torch.Tensor` of shape `(num_bins,)`): integers, at least one image in each set.
        alpha (`float`): level of the test, in (0, 1).

    Returns:
        `dict` with `ndb` (`int`), `ndb_over_k` (`float` in [0, 1]), `js` (`float` in [0, ln 2], in nats), `p_values`,
        `reference_proportions` and `proportions` (float64 of shape `(num_bins,)`).

    Raises:
        ValueError: shapes that differ, negative or fractional counts, an empty set, or `alpha` outside (0, 1).
    """
    if reference_counts.shape != counts.shape or counts.ndim != 1:
        raise ValueError(
            "reference_counts and counts must have one shape (num_bins,), got"
            f" {tuple(reference_counts.shape)} and {tuple(counts.shape)}."
        )
    for name, values in (("reference_counts", reference_counts), ("counts", counts)):
        if values.is_floating_point() or bool((values < 0).any()) or not bool(values.any()):
            raise ValueError(
                f"{name} must be integers >= 0 and not all 0, got {values.dtype} with sum {values.sum()}."
            )
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}.")
    n1, n2 = int(reference_counts.sum()), int(counts.sum())
    p1, p2 = reference_counts.double() / n1, counts.double() / n2
    pooled = (reference_counts + counts).double() / (n1 + n2)
    error = (pooled * (1 - pooled) * (1 / n1 + 1 / n2)).sqrt()
    z = torch.where(error > 0, (p1 - p2) / error, 0.0)  # no error: the bin is empty in both, or holds everything
    p_values = torch.special.erfc(z.abs() / math.sqrt(2))
    different = int((p_values < alpha).sum())
    middle = 0.5 * (p1 + p2)
    # xlogy twice, because 0 log(0 / 0) would be NaN.
    js = 0.5 * sum((torch.xlogy(p, p) - torch.xlogy(p, middle)).sum() for p in (p1, p2))
    return {
        "ndb": different,
        "ndb_over_k": different / len(counts),
        "js": float(js),
        "p_values": p_values,
        "reference_proportions": p1,
        "proportions": p2,
    }


def _rows(images: torch.Tensor, dims: torch.Tensor | slice = slice(None)) -> torch.Tensor:
    """Images as float64 rows in [0, 1], or `dims` of them."""
    rows = images.flatten(1).cpu()[:, dims].double()
    if images.dtype == torch.uint8:
        return rows / 255
    if not images.is_floating_point() or not bool(((rows >= 0) & (rows <= 1)).all()):
        raise ValueError(
            f"images must be uint8, or floats in [0, 1] without NaN, got {images.dtype} from {rows.min():.4g} to"
            f" {rows.max():.4g}: rescale them."
        )
    return rows


def _points(images: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, dims: torch.Tensor) -> torch.Tensor:
    return (_rows(images, dims) - mean[dims]) / scale[dims]
