"""Lower bounds of log p(x) from log importance weights log p(x, z_k) - log q(z_k | x), with z_k ~ q(z | x).

[`~hf_vaeplus.VAEPlusPipeline.log_importance_weights`] makes them, with the decoder variance that was learned.
"""

import math

import torch


def elbo(log_weights: torch.Tensor) -> torch.Tensor:
    """The evidence lower bound (Eq. 2), estimated by the mean of the log weights: never above `importance_weighted`.

    Args:
        log_weights (`torch.Tensor` of shape `(K >= 1, batch)`): nats.

    Returns:
        `torch.Tensor` of shape `(batch,)`: nats per image, float64.

    Raises:
        ValueError: another shape.
    """
    _check(log_weights)
    return log_weights.double().mean(0)


def importance_weighted(log_weights: torch.Tensor) -> torch.Tensor:
    """log of the mean weight: in expectation below log p(x), and closer to it the larger K (Burda et al. 2016, Eq. 8).

    Args:
        log_weights (`torch.Tensor` of shape `(K >= 1, batch)`): nats.

    Returns:
        `torch.Tensor` of shape `(batch,)`: nats per image, float64.

    Raises:
        ValueError: another shape.
    """
    _check(log_weights)
    return log_weights.double().logsumexp(0) - math.log(len(log_weights))


def _check(log_weights: torch.Tensor):
    if log_weights.ndim != 2 or len(log_weights) < 1:
        raise ValueError(f"log_weights must have shape (K >= 1, batch), got {tuple(log_weights.shape)}.")
