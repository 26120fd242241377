"""What a posterior q(z|x) over a data set says of each latent dimension."""

import torch

from .running import RunningMoments


def active_units(means: torch.Tensor, threshold: float = 0.01) -> int:
    """Latent dimensions whose posterior mean varies over the data by more than `threshold` (Burda et al., 2015).

    Early in training with a small gamma a pure noise dimension can pass this test too: report it beside
    `active_units_by_variance`.

    Args:
        means (`torch.Tensor` of shape `(num_samples, latent_dim)`): posterior means of at least two samples.
    """
    _check(means)
    return int((means.double().var(0) > threshold).sum())


def active_units_by_variance(logvars: torch.Tensor, threshold: float = 0.5) -> int:
    """Latent dimensions whose posterior variance, averaged over the data, is below `threshold`.

    Args:
        logvars (`torch.Tensor` of shape `(num_samples, latent_dim)`): log of the posterior variances.
    """
    _check(logvars)
    return int((logvars.double().exp().mean(0) < threshold).sum())


def kl_per_dimension(means: torch.Tensor, logvars: torch.Tensor) -> torch.Tensor:
    """KL[q(z_j|x) || N(0, 1)] averaged over the data, in nats: float64 of shape `(latent_dim,)`.

    Args:
        means, logvars (`torch.Tensor` of shape `(num_samples, latent_dim)`).
    """
    _check(means)
    _check(logvars)
    return _kl(means.double(), logvars.double()).mean(0)


class PosteriorStatistics:
    """The figures of this file from posteriors that arrive in batches, and the moments of the aggregate q(z).

    Equal to the functions on all rows at once, in float64 on the CPU; memory does not grow with the rows.

    Args:
        latent_dim (`int`).

    Example:
        >>> statistics = PosteriorStatistics(latent_dim=64)
        >>> for batch in batches:
        ...     posterior = pipe.encode(batch)
        ...     statistics.update(posterior.mean, posterior.logvar)
        >>> statistics.active_units(), statistics.kl_per_dimension().sum()
    """

    def __init__(self, latent_dim: int):
        self._means = RunningMoments(latent_dim)
        self._variances = RunningMoments(latent_dim, covariance=False)
        self._kls = RunningMoments(latent_dim, covariance=False)

    def update(self, mean: torch.Tensor, logvar: torch.Tensor) -> None:
        """Add a batch of posteriors.

        Args:
            mean, logvar (`torch.Tensor` of shape `(batch >= 1, latent_dim)`): finite.

        Raises:
            ValueError: wrong shapes, or values that are not finite. The statistics are then as before.
        """
        if mean.shape != logvar.shape:
            raise ValueError(
                f"mean and logvar must have one shape, got {tuple(mean.shape)} and {tuple(logvar.shape)}."
            )
        mean, logvar = mean.cpu().double(), logvar.cpu().double()
        # The KL is finite only where all else is: first, so that a refused batch leaves nothing behind.
        self._kls.update(_kl(mean, logvar))
        self._means.update(mean)
        self._variances.update(logvar.exp())

    @property
    def count(self) -> int:
        """Number of posteriors seen."""
        return self._means.count

    def active_units(self, threshold: float = 0.01) -> int:
        """As the function of this name. Raises ValueError with fewer than two posteriors."""
        return int((self._means.variance > threshold).sum())

    def active_units_by_variance(self, threshold: float = 0.5) -> int:
        """As the function of this name. Raises ValueError before the first posterior, as the next two do."""
        return int((self._variances.mean < threshold).sum())

    def kl_per_dimension(self) -> torch.Tensor:
        """As the function of this name: nats, float64 of shape `(latent_dim,)`."""
        return self._kls.mean

    def aggregate_mean(self) -> torch.Tensor:
        """Mean of q(z) = E_x q(z|x): float64 of shape `(latent_dim,)`."""
        return self._means.mean

    def aggregate_covariance(self) -> torch.Tensor:
        """Covariance of q(z) = E_x q(z|x), Cov[mean] + E[variance]: float64 of shape `(latent_dim, latent_dim)`.

        Unbiased: Cov is divided by n - 1. The nearer to the identity, the better the prior N(0, I) fits. Raises
        ValueError with fewer than two posteriors.
        """
        return self._means.covariance + self._variances.mean.diag()


def _kl(means: torch.Tensor, logvars: torch.Tensor) -> torch.Tensor:
    return 0.5 * (means.square() + logvars.exp() - 1 - logvars)


def _check(statistics: torch.Tensor):
    if statistics.ndim != 2 or len(statistics) < 2:
        raise ValueError(
            f"posterior statistics must have shape (num_samples >= 2, latent_dim), got {tuple(statistics.shape)}."
        )
