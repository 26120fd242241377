"""The Wasserstein autoencoder with an MMD penalty (WAE-MMD, Tolstikhin et al. 2018), a baseline of the paper."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from .metrics.mmd import imq_mmd
from .modeling_vaeplus import GaussianPosterior, VAEPlusVAEConfig, VAEPlusVAEModel, sum_of_squares


@dataclass
class WAEMMDOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): squared_error + mmd_weight * mmd.
    squared_error (`torch.FloatTensor` of shape `()`): per sample, summed over its values, mean over the batch.
    mmd (`torch.FloatTensor` of shape `()`): unbiased squared MMD between codes and prior; it can be negative.
    reconstruction (`torch.FloatTensor` of shape `(batch, *input_shape)`).
    posterior ([`GaussianPosterior`]): a point, of variance exp(-30).
    """

    loss: torch.FloatTensor | None = None
    squared_error: torch.FloatTensor | None = None
    mmd: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    posterior: GaussianPosterior | None = None


class WAEMMDModel(VAEPlusVAEModel):
    """A [`VAEPlusVAEModel`] with a deterministic encoder and the MMD in place of the KL term.

    Its log-variance head stands at -30 and gets no gradient, so that what is saved is a `VAEPlusVAEModel` that any
    pipeline loads. gamma is not used.
    """

    def __init__(self, config: VAEPlusVAEConfig):
        super().__init__(config)
        with torch.no_grad():
            self.encoder[-1].bias[config.latent_dim :] = -30.0

    def forward(
        self, inputs: torch.Tensor, noise: torch.Tensor, mmd_weight: float = 500.0, return_dict: bool = True
    ) -> WAEMMDOutput | tuple:
        """Squared error plus penalty on one batch.

        Args:
            inputs (`torch.Tensor` of shape `(batch, *input_shape)`): pixels in [0, 1].
            noise (`torch.Tensor` of shape `(batch, latent_dim)`): standard normal: the prior's side of the MMD.
            mmd_weight (`float`): lambda. 500 is the authors' setting for CelebA (100, with the squared error on
                [-1, 1] times 0.05).
        """
        posterior = self.encode(inputs)
        reconstruction = self.decode(posterior.mean)
        squared_error = sum_of_squares(reconstruction, inputs).mean()
        mmd = imq_mmd(posterior.mean, noise).float()
        output = WAEMMDOutput(
            loss=squared_error + mmd_weight * mmd,
            squared_error=squared_error,
            mmd=mmd,
            reconstruction=reconstruction,
            posterior=posterior,
        )
        return output if return_dict else output.to_tuple()


__all__ = ["WAEMMDModel", "WAEMMDOutput"]
