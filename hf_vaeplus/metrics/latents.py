"""What a posterior q(z|x) over a data set says of each latent dimension."""

import torch


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
    means, logvars = means.double(), logvars.double()
    return 0.5 * (means.square() + logvars.exp() - 1 - logvars).mean(0)


def _check(statistics: torch.Tensor):
    if statistics.ndim != 2 or len(statistics) < 2:
        raise ValueError(
            f"posterior statistics must have shape (num_samples >= 2, latent_dim), got {tuple(statistics.shape)}."
        )
