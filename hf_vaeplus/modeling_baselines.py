"""Models that the paper compares VAE+ with, or argues about, where no config value says it.

    `WAEMMDModel`               the Wasserstein autoencoder with an MMD penalty (Tolstikhin et al. 2018), Table 3
    `PenalizedAutoencoderModel` the h-penalised autoencoder of Eq. (6), Theorem 3

They share the configs' checks, the weight initialization and the safe loading of `modeling_vaeplus.py`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.utils import ModelOutput

from .metrics.mmd import imq_mmd
from .modeling_vaeplus import (
    MLP,
    GaussianPosterior,
    VAEPlusConfig,
    VAEPlusPreTrainedModel,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
    _check_shape,
    _upcast,
    sum_of_squares,
)

# ------------------------------------------------------------------------------------------------------- configs


@strict
class PenalizedAutoencoderConfig(VAEPlusConfig):
    """Configuration of [`PenalizedAutoencoderModel`].

    Args:
        input_shape (`tuple[int, ...]`): shape of one input; d is the product.
        latent_dim (`int`): kappa, the number of rows of Z.
        network (`"mlp" | "affine"`): encoder and decoder are MLPs (residual and plain), or affine.
        hidden_dim, num_blocks (`int`): width, and blocks of two layers each, of either MLP.
        penalty (`"identity" | "sqrt" | "log" | "power"`): h(u) = u, sqrt(u), log(u + penalty_eps), u^penalty_power.
        penalty_eps (`float`): of `"log"`, in the squared unit of the inputs; bounds its gradient by 1 / penalty_eps.
        penalty_power (`float`): of `"power"`, in (0, 1]: beyond 1 the gradient at zero vanishes.
        constraint (`"orthonormal" | "unit_columns"`): the set Theta of decoders, see [`ConstrainedLinear`].
            `"orthonormal"` makes either decoder 1-Lipschitz; `"unit_columns"` is for the affine one alone.
        active_threshold (`float`): a latent dimension counts as active when the mean of its squares exceeds this.

    Raises:
        ValueError: an unknown, non-positive or inconsistent field.
    """

    model_type = "vaeplus_penalized_autoencoder"

    input_shape: list[int] | tuple[int, ...] = (64,)
    latent_dim: int = 64
    network: Literal["mlp", "affine"] = "mlp"
    hidden_dim: int = 128
    num_blocks: int = 1
    penalty: Literal["identity", "sqrt", "log", "power"] = "sqrt"
    penalty_eps: float | int = 1e-4
    penalty_power: float | int = 0.25
    constraint: Literal["orthonormal", "unit_columns"] = "orthonormal"
    active_threshold: float | int = 1e-4

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.input_shape = tuple(self.input_shape)
        self._check_positive("input_shape", "latent_dim", "hidden_dim")
        self._check_positive("num_blocks", limit=1000)
        self._check_positive("penalty_eps", "penalty_power", "active_threshold")
        if self.penalty_power > 1:
            raise ValueError(f"PenalizedAutoencoderConfig.penalty_power must be at most 1, got {self.penalty_power}.")
        if self.network == "mlp" and self.constraint == "unit_columns":
            raise ValueError(
                "constraint='unit_columns' bounds affine decoders only: network='mlp' needs constraint='orthonormal'."
            )

    @property
    def input_dim(self) -> int:
        """d, the number of values in one input."""
        return math.prod(self.input_shape)


# ------------------------------------------------------------------------------------------------------- outputs


@dataclass
class PenalizedAutoencoderOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): Eq. (6), reconstruction_term + penalty; negative for small arguments of
        the log.
    reconstruction_term (`torch.FloatTensor` of shape `()`): h of the squared error per value.
    penalty (`torch.FloatTensor` of shape `()`): sum of h(mean square of a latent dimension), over d.
    squared_error (`torch.FloatTensor` of shape `()`): squared error per sample, summed over its values.
    active_units (`torch.FloatTensor` of shape `()`): latent dimensions whose mean square exceeds `active_threshold`.
    reconstruction (`torch.FloatTensor` of shape `(batch, *input_shape)`).
    latents (`torch.FloatTensor` of shape `(batch, latent_dim)`): Z, transposed.
    """

    loss: torch.FloatTensor | None = None
    reconstruction_term: torch.FloatTensor | None = None
    penalty: torch.FloatTensor | None = None
    squared_error: torch.FloatTensor | None = None
    active_units: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None


@dataclass
class WAEMMDOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): squared_error + mmd_weight * mmd.
    squared_error (`torch.FloatTensor` of shape `()`): per sample, summed over its values, mean over the batch.
    mmd (`torch.FloatTensor` of shape `()`): unbiased squared MMD between codes and prior; it can be negative.
    reconstruction (`torch.FloatTensor` of shape `(batch, *input_shape)`).
    posterior_mean, posterior_logvar (`torch.FloatTensor` of shape `(batch, latent_dim)`): as in `VAEPlusVAEOutput`, of
        a point: the variance is exp(-30).
    """

    loss: torch.FloatTensor | None = None
    squared_error: torch.FloatTensor | None = None
    mmd: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    posterior_mean: torch.FloatTensor | None = None
    posterior_logvar: torch.FloatTensor | None = None

    @property
    def posterior(self) -> GaussianPosterior:
        return GaussianPosterior(self.posterior_mean, self.posterior_logvar)


# ---------------------------------------------------------------------------------------------------- mathematics


def penalty_function(u: torch.Tensor, penalty: str, eps: float = 1e-4, power: float = 0.25) -> torch.Tensor:
    """h of Eq. (6), elementwise on u >= 0: u, sqrt(u), log(u + eps) or u^power. `eps` serves the log alone.

    sqrt and u^power have an infinite gradient at zero, which automatic differentiation would turn into nan (infinity
    times the zero gradient of a square). There, at u = 0 exactly, the gradient is 0 instead: one of the subgradients
    of h(||z||^2) at z = 0. It is neither smoothed nor clipped at any u > 0.
    """
    if penalty == "identity":
        return u
    if penalty == "log":
        return (u + eps).log()
    positive = u > 0
    power = 0.5 if penalty == "sqrt" else power
    return torch.where(positive, torch.where(positive, u, 1.0).pow(power), 0.0)


# ------------------------------------------------------------------------------------------------------- networks


class ConstrainedLinear(nn.Linear):
    """A linear layer that applies `constrained_weight`, not `weight`: no scale of its parameters leaves Theta.

    Args:
        constraint (`"orthonormal" | "unit_columns"`): the columns, or the rows where they are the fewer, become
            orthonormal by a QR decomposition, so every singular value is 1; or every column is divided by its norm.
            The bias is free: it shifts the output by the same amount for every input, so it cannot make up for
            shrunken inputs.
    """

    def __init__(self, in_dim: int, out_dim: int, constraint: str = "orthonormal"):
        super().__init__(in_dim, out_dim)
        self.constraint = constraint

    @property
    def constrained_weight(self) -> torch.Tensor:
        """`(out_dim, in_dim)`."""
        if self.constraint == "unit_columns":
            return F.normalize(self.weight, dim=0)
        weight = _upcast(self.weight)  # no decompositions in half precision
        is_wide = self.in_features > self.out_features
        orthonormal = torch.linalg.qr(weight.T if is_wide else weight).Q
        return (orthonormal.T if is_wide else orthonormal).to(self.weight.dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.constrained_weight, self.bias)


class LipschitzMLP(nn.Sequential):
    """(batch, in_dim) -> (batch, out_dim), 1-Lipschitz: the singular values of every layer are 1 and ELU's slope is at
    most 1. So the outputs never vary more than the inputs: the total variance of f(z) is at most that of z."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_blocks: int):
        hidden = [hidden_dim] * (2 * num_blocks + 1)
        layers = [
            layer
            for before, after in zip([in_dim, *hidden[:-1]], hidden, strict=True)
            for layer in (ConstrainedLinear(before, after), nn.ELU())
        ]
        super().__init__(*layers, ConstrainedLinear(hidden_dim, out_dim))


# --------------------------------------------------------------------------------------------------------- models


class PenalizedAutoencoderModel(VAEPlusPreTrainedModel):
    """Deterministic autoencoder with a penalty h on its error and on every latent dimension (Eq. 6, Theorem 3):

        h( 1/(dn) sum_i ||x_i - f(z_i)||^2 ) + 1/d sum_k h( 1/n ||z_k||^2 )    with z_i = g(x_i) and f in Theta.

    The scale of the inputs counts, so they are not standardised inside.

    Example:
        >>> model = PenalizedAutoencoderModel(PenalizedAutoencoderConfig(input_shape=(16,), latent_dim=24))
        >>> model(inputs).loss.backward()
    """

    config_class = PenalizedAutoencoderConfig
    main_input_name = "inputs"

    def __init__(self, config: PenalizedAutoencoderConfig):
        super().__init__(config)
        input_dim, latent_dim = config.input_dim, config.latent_dim
        if config.network == "affine":
            self.encoder = nn.Linear(input_dim, latent_dim)
            self.decoder = ConstrainedLinear(latent_dim, input_dim, config.constraint)
        else:
            self.encoder = MLP(input_dim, config.hidden_dim, latent_dim, config.num_blocks, residual=True)
            self.decoder = LipschitzMLP(latent_dim, config.hidden_dim, input_dim, config.num_blocks)
        self.post_init()

    def encode(self, inputs: torch.Tensor) -> torch.Tensor:
        """Latents `(batch, latent_dim)` of inputs `(batch, *input_shape)`.

        Raises:
            ValueError: wrong shape, or integers instead of floats.
        """
        _check_shape("inputs", inputs, self.config.input_shape)
        return self.encoder(inputs.to(self.dtype).flatten(1))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """f(z), of shape `(batch, *input_shape)`, of latents `(batch, latent_dim)`.

        Raises:
            ValueError: wrong shape, or integers instead of floats.
        """
        _check_shape("latents", latents, (self.config.latent_dim,))
        return self.decoder(latents.to(self.dtype)).reshape(-1, *self.config.input_shape)

    def forward(
        self, inputs: torch.Tensor, smoothing: float = 0.0, return_dict: bool = True, return_loss: bool = True
    ) -> PenalizedAutoencoderOutput | tuple:
        """Eq. (6) of a batch: n is the batch size, so with batches smaller than the data set both arguments of h are
        batch statistics, and as h is concave their mean is a little below the energy of the whole set.

        Args:
            inputs (`torch.Tensor` of shape `(batch, *input_shape)`).
            smoothing (`float`): replaces h(u) by h(u + smoothing). Lowered to 0 during training it is the homotopy
                that Section 5 describes; 0 is Eq. (6).
            return_loss (`bool`): without it only reconstruction and latents are returned.

        Raises:
            ValueError: wrong shape, or integers instead of floats.
        """
        config = self.config
        latents = self.encode(inputs)
        reconstruction = self.decode(latents)
        if not return_loss:
            output = PenalizedAutoencoderOutput(reconstruction=reconstruction, latents=latents)
            return output if return_dict else output.to_tuple()
        squared_error = sum_of_squares(reconstruction, inputs).mean()
        mean_squares = _upcast(latents).square().mean(0)  # (latent_dim,): ||z_k||^2 / n

        def h(u):
            return penalty_function(u + smoothing, config.penalty, config.penalty_eps, config.penalty_power)

        reconstruction_term = h(squared_error / config.input_dim)
        penalty = h(mean_squares).sum() / config.input_dim
        output = PenalizedAutoencoderOutput(
            loss=reconstruction_term + penalty,
            reconstruction_term=reconstruction_term,
            penalty=penalty,
            squared_error=squared_error,
            active_units=(mean_squares.detach() > config.active_threshold).sum().float(),
            reconstruction=reconstruction,
            latents=latents,
        )
        return output if return_dict else output.to_tuple()


class WAEMMDModel(VAEPlusVAEModel):
    """A [`VAEPlusVAEModel`] with a deterministic encoder and the MMD in place of the KL term.

    Its log-variance head stands at -30 and gets no gradient, so that what is saved is a `VAEPlusVAEModel` that any
    pipeline loads. gamma is not used.
    """

    def __init__(self, config: VAEPlusVAEConfig):
        super().__init__(config)
        with torch.no_grad():
            self.encoder[-1].bias[config.latent_dim :] = -30.0
        self.log_gamma.requires_grad_(False)  # a learned one: DistributedDataParallel would wait for its gradient

    def forward(
        self,
        inputs: torch.Tensor,
        noise: torch.Tensor | None = None,
        mmd_weight: float = 500.0,
        return_dict: bool = True,
        return_loss: bool = True,
    ) -> WAEMMDOutput | tuple:
        """Squared error plus penalty on one batch.

        Args:
            inputs (`torch.Tensor` of shape `(batch, *input_shape)`): pixels in [0, 1].
            noise (`torch.Tensor` of shape `(batch, latent_dim)`, *optional*): standard normal: the prior's side of the
                MMD; drawn if not given.
            mmd_weight (`float`): lambda. 500 is the authors' setting for CelebA (100, with the squared error on
                [-1, 1] times 0.05).
            return_loss (`bool`): without it only reconstruction and posterior are returned.
        """
        posterior = self.encode(inputs)
        reconstruction = self.decode(posterior.mean)
        parts = dict(reconstruction=reconstruction, posterior_mean=posterior.mean, posterior_logvar=posterior.logvar)
        if not return_loss:
            output = WAEMMDOutput(**parts)
            return output if return_dict else output.to_tuple()
        noise = torch.randn_like(posterior.mean) if noise is None else noise
        squared_error = sum_of_squares(reconstruction, inputs).mean()
        mmd = imq_mmd(posterior.mean, noise).float()
        output = WAEMMDOutput(
            loss=squared_error + mmd_weight * mmd,
            squared_error=squared_error,
            mmd=mmd,
            **parts,
        )
        return output if return_dict else output.to_tuple()


__all__ = [
    "WAEMMDModel",
    "WAEMMDOutput",
    "PenalizedAutoencoderConfig",
    "PenalizedAutoencoderModel",
    "PenalizedAutoencoderOutput",
    "penalty_function",
]
