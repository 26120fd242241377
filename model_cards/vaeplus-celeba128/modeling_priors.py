"""Second stages with a density: tractable models of the latents z, each in place of the paper's second VAE.

Section 4 lets any tractable generative model stand as second stage, once the regularisation is balanced. Here are

    `VAEPlusFlowMatchingModel`  an ODE from noise to z (Lipman et al. 2023), distilled to one pass
    `VAEPlusCouplingFlowModel`  an invertible network (Dinh et al. 2017) of splines (Durkan et al. 2019)
    `VAEPlusMixtureModel`       a mixture of Gaussians of full covariance

Each gives `sample(latents, noise)`, as `VAEPlusVAEModel` does for the pipeline, and `log_prob(z)` in nats. They learn
the *active* dimensions of z alone: the others are N(0, 1) by construction, so they are drawn and scored as that. The
active ones are whitened by the moments of the training data.

With a `condition` in the config they model p(z | condition), of the null class p(z) (Ho and Salimans 2021).

An exported Hub repository carries this file beside `modeling_vaeplus.py`, the only file that it imports.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from .modeling_vaeplus import (
    ConditionFeatures,
    VAEPlusConditionalConfig,
    VAEPlusPreTrainedModel,
    _check_shape,
    _upcast,
    start_at_zero,
)

logger = logging.get_logger(__name__)

_LOG_2PI = math.log(2 * math.pi)

# ------------------------------------------------------------------------------------------------------- configs


class VAEPlusPriorConfig(VAEPlusConditionalConfig):
    """Fields that the second stages of this file share.

    Args:
        latent_dim (`int`): number of dimensions of z, and of the noise that it is made from.
        active_dims (`tuple[int, ...]`, *optional*): the dimensions that are learned, in rising order; all if not
            given. The others are N(0, 1).
        condition, id2label: see [`VAEPlusConditionalConfig`].

    Raises:
        ValueError: an unknown or non-positive field, or active dimensions that z does not have.
    """

    latent_dim: int = 64
    active_dims: list[int] | tuple[int, ...] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_positive("latent_dim", limit=2**14)  # the whitening has its square
        if self.active_dims is not None:
            self.active_dims = tuple(self.active_dims)
            numbers = sorted(set(self.active_dims) & set(range(self.latent_dim)))
            if not numbers or numbers != list(self.active_dims):
                raise ValueError(
                    f"{type(self).__name__}.active_dims must be numbers below latent_dim={self.latent_dim} in rising"
                    f" order, got {self.active_dims}."
                )

    @property
    def input_shape(self) -> tuple[int]:
        """Shape of one z."""
        return (self.latent_dim,)

    @property
    def num_active(self) -> int:
        """Number of dimensions that are learned."""
        return self.latent_dim if self.active_dims is None else len(self.active_dims)


@strict
class VAEPlusFlowMatchingConfig(VAEPlusPriorConfig):
    """Configuration of [`VAEPlusFlowMatchingModel`].

    Args:
        latent_dim, active_dims, condition, id2label: see [`VAEPlusPriorConfig`].
        hidden_dim, num_blocks (`int`): width and residual blocks of the network.
        num_inference_steps (`int`): Heun steps of the ODE, two passes of the network each, for samples and for
            densities.
        distillation_steps (`int`): Heun steps of the ODE that one pass is distilled from; 0 for a model that is not
            distilled, whose samples take `num_inference_steps` steps.
        distillation_guidance (`float`): `guidance_scale` of the ODE that one pass is distilled from, with a condition.
        max_exact_dim (`int`): up to so many active dimensions `log_prob` takes the trace of the exact Jacobian; beyond
            that it estimates the trace (Hutchinson).

    Raises:
        ValueError: an unknown, non-positive or inconsistent field.
    """

    model_type = "vaeplus_flow_matching"

    hidden_dim: int = 512
    num_blocks: int = 3
    num_inference_steps: int = 16
    distillation_steps: int = 8
    distillation_guidance: float | int = 1.0
    max_exact_dim: int = 512

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_positive("hidden_dim", "max_exact_dim")
        self._check_positive("num_blocks", "num_inference_steps", limit=1000)
        if not 0 <= self.distillation_steps <= 1000:
            raise ValueError(
                f"VAEPlusFlowMatchingConfig.distillation_steps must be 0 to 1000, got {self.distillation_steps}."
            )
        scale = self.distillation_guidance
        if not 0 <= scale < math.inf or (scale != 1 and self.condition is None):
            raise ValueError(
                "VAEPlusFlowMatchingConfig.distillation_guidance must be at least 0 and finite, and 1 without a"
                f" condition, got {scale}."
            )


@strict
class VAEPlusCouplingFlowConfig(VAEPlusPriorConfig):
    """Configuration of [`VAEPlusCouplingFlowModel`].

    Args:
        latent_dim, active_dims, condition, id2label: see [`VAEPlusPriorConfig`].
        hidden_dim, num_blocks (`int`): width and hidden layers of the MLP in each coupling.
        num_couplings (`int`): transformations, each of one half of the dimensions given the other.
        num_bins (`int`): of each monotone rational-quadratic spline on [-5, 5]; outside it is the identity.

    Raises:
        ValueError: an unknown or non-positive field.
    """

    model_type = "vaeplus_coupling_flow"

    hidden_dim: int = 256
    num_blocks: int = 2
    num_couplings: int = 12
    num_bins: int = 8

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_positive("hidden_dim")
        self._check_positive("num_blocks", "num_couplings", "num_bins", limit=1000)


@strict
class VAEPlusMixtureConfig(VAEPlusPriorConfig):
    """Configuration of [`VAEPlusMixtureModel`].

    Args:
        latent_dim, active_dims, condition, id2label: see [`VAEPlusPriorConfig`].
        num_components (`int`): Gaussians, with classes as condition those of each class.

    Raises:
        ValueError: an unknown or non-positive field.
    """

    model_type = "vaeplus_mixture"

    num_components: int = 10

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self._check_positive("num_components", limit=10_000)
        if self.condition not in (None, "classes"):
            raise ValueError(
                f"a mixture takes classes as condition, not {self.condition}: choose another second stage for them."
            )
        if self.num_gaussians * self.num_active**2 > 2**30:
            raise ValueError(
                f"VAEPlusMixtureConfig: {self.num_gaussians} covariances of {self.num_active} dimensions are too many"
                " numbers: take fewer num_components."
            )

    @property
    def num_gaussians(self) -> int:
        """Of all classes together; those of one class follow each other."""
        return self.num_components * (1 if self.condition is None else len(self.label_ids))


# ------------------------------------------------------------------------------------------------------- outputs


@dataclass
class VAEPlusPriorOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): mean over the batch. Of a flow or a mixture: -log p(z), nats. Of flow
        matching: squared error of the velocity, summed over the active dimensions; while it is distilled, of the one
        pass against the end of the ODE, in whitened units.
    """

    loss: torch.FloatTensor | None = None


# ------------------------------------------------------------------------------------------------------- networks


class TimedBlock(nn.Module):
    """x + W2 silu(W1 (norm(x) (1 + scale(t)) + shift(t))); W2 and scale, shift start at zero."""

    def __init__(self, width: int, time_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = start_at_zero(nn.Linear(time_dim, 2 * width))
        self.inner = nn.Linear(width, width)
        self.outer = start_at_zero(nn.Linear(width, width))

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(embedding).chunk(2, dim=-1)
        return hidden + self.outer(F.silu(self.inner(self.norm(hidden) * (1 + scale) + shift)))


class VelocityNetwork(nn.Module):
    """(batch, dim), a time in [0, 1] -> (batch, dim), at the start 0. A condition joins the embedding of time.

    There is no norm before the exit: it would bound the velocity, and data has longer tails than noise.
    """

    num_frequencies, time_dim = 8, 128

    def __init__(self, dim: int, hidden_dim: int, num_blocks: int, condition_width: int = 0):
        super().__init__()
        self.time = nn.Linear(2 * self.num_frequencies, self.time_dim)
        self.condition = nn.Linear(condition_width, self.time_dim) if condition_width else None
        self.entry = nn.Linear(dim, hidden_dim)
        self.offset = nn.Linear(self.time_dim, hidden_dim)  # or the norms would turn sharply around x = 0
        self.blocks = nn.ModuleList([TimedBlock(hidden_dim, self.time_dim) for _ in range(num_blocks)])
        self.exit = start_at_zero(nn.Linear(hidden_dim, dim))

    def forward(self, x: torch.Tensor, time: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
        """`time` has shape `(batch, 1)`, or `(1, 1)` for all; `features` are of the condition."""
        angles = math.pi * time * torch.arange(1, self.num_frequencies + 1, device=x.device, dtype=time.dtype)
        embedding = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        embedding = F.silu(embedding if features is None else embedding + self.condition(features))
        hidden = self.entry(x) + self.offset(embedding)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        return self.exit(hidden)


# --------------------------------------------------------------------------------------------------------- models


class VAEPlusPriorModel(VAEPlusPreTrainedModel):
    """Base of the second stages with a density.

    A subclass models y = root^-1 (z - mean) of the active dimensions, of mean 0 and covariance I over the training
    data, by `_sample` and `_log_prob`.
    """

    main_input_name = "inputs"
    log_prob_takes_one_pass = True

    def __init__(self, config: VAEPlusPriorConfig):
        super().__init__(config)
        self.register_buffer("input_mean", torch.zeros(config.num_active))
        self.register_buffer("input_root", torch.eye(config.num_active))  # lower triangular
        self.condition_features = None if config.condition is None else ConditionFeatures(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VAEPlusPriorModel):
            init.zeros_(module.input_mean)
            init.eye_(module.input_root)
            module._init_own_weights()

    def _init_own_weights(self):
        pass

    @property
    def log_prob_is_exact(self) -> bool:
        """Whether `log_prob` is no estimate; an ODE's is exact up to the steps of its solver."""
        return True

    def set_input_moments(self, mean: torch.Tensor, covariance: torch.Tensor) -> None:
        """Whiten the active dimensions by the moments of z. Variances below 1e-6 of their mean count as that.

        Args:
            mean (`torch.Tensor` of shape `(latent_dim,)`), covariance (`torch.Tensor` of shape `(latent_dim,) * 2`).

        Raises:
            ValueError: wrong shapes, or values that are not finite or no covariance.
        """
        dim = self.config.latent_dim
        if mean.shape != (dim,) or covariance.shape != (dim, dim):
            raise ValueError(
                f"mean and covariance must have shapes {(dim,)} and {(dim, dim)}, got {tuple(mean.shape)} and"
                f" {tuple(covariance.shape)}."
            )
        rows = self._active
        mean, covariance = mean[rows].cpu().double(), covariance[rows][:, rows].cpu().double()
        if not (mean.isfinite().all() and covariance.isfinite().all() and covariance.trace() > 0):
            raise ValueError("mean and covariance must be finite, and not all of z constant: see whether z is.")
        variances, axes = torch.linalg.eigh(covariance)
        variances = variances.clamp(min=1e-6 * float(variances.mean()))
        self.input_mean.copy_(mean)
        self.input_root.copy_(torch.linalg.cholesky((axes * variances) @ axes.T))

    @property
    def _active(self) -> slice | list[int]:
        return slice(None) if self.config.active_dims is None else list(self.config.active_dims)

    @property
    def _inactive(self) -> list[int]:
        active = self.config.active_dims
        return [] if active is None else sorted(set(range(self.config.latent_dim)) - set(active))

    def sample(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        **options,
    ) -> torch.Tensor:
        """z that the model makes up of noise.

        Args:
            latents (`torch.Tensor` of shape `(batch, latent_dim)`): u, standard normal. Where a dimension is not
                active, z is u.
            noise (`torch.Tensor` of shape `(batch, latent_dim)`, *optional*): standard normal, independent of the
                latents; only a mixture uses it, to choose the component.
            condition (`torch.Tensor`, *optional*): here and below, of each z what
                [`VAEPlusConditionalConfig.to_condition`] returns. A conditional model takes none for the null class.
            options: of flow matching, see [`VAEPlusFlowMatchingModel`].

        Returns:
            float32 `torch.Tensor` of shape `(batch, latent_dim)`.

        Raises:
            ValueError: wrong shapes, or integers instead of floats.
        """
        _check_shape("latents", latents, self.config.input_shape)
        if noise is not None:
            _check_shape("noise", noise, self.config.input_shape)
        z = _upcast(latents).clone()
        y = z[:, self._active].to(self._weight_dtype)
        y = _upcast(self._sample(y, noise, self._features_of(condition, y), **options))
        z[:, self._active] = y @ _upcast(self.input_root).T + _upcast(self.input_mean)
        return z

    def log_prob(
        self, z: torch.Tensor, generator: torch.Generator | None = None, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """log p(z), or log p(z | condition), in nats, with the density of N(0, 1) for dimensions that are not active.

        Args:
            z (`torch.Tensor` of shape `(batch, latent_dim)`).
            generator (`torch.Generator`, *optional*): of what `log_prob_is_exact` calls an estimate.

        Returns:
            float32 `torch.Tensor` of shape `(batch,)`; float64 of a model in float64.

        Raises:
            ValueError: wrong shape, or integers instead of floats.
        """
        y = self.whitened(z)
        log_prob = _upcast(self._log_prob(y, generator, self._features_of(condition, y)))
        rest = _log_normal(_upcast(z)[:, self._inactive])
        return log_prob - _upcast(self.input_root).diagonal().log().sum() + rest

    @property
    def _weight_dtype(self) -> torch.dtype:
        return self.input_mean.dtype

    def whitened(self, z: torch.Tensor) -> torch.Tensor:
        """y, of shape `(batch, num_active)`, of z of shape `(batch, latent_dim)`."""
        _check_shape("z", z, self.config.input_shape)
        root = _upcast(self.input_root)
        difference = z[:, self._active].to(root) - _upcast(self.input_mean)
        y = torch.linalg.solve_triangular(root, difference.T, upper=False).T
        return y.to(self._weight_dtype)

    def _sample(
        self, latents: torch.Tensor, noise: torch.Tensor | None, features: torch.Tensor | None
    ) -> torch.Tensor:
        raise NotImplementedError

    def _log_prob(
        self, y: torch.Tensor, generator: torch.Generator | None, features: torch.Tensor | None
    ) -> torch.Tensor:
        raise NotImplementedError

    def forward(
        self,
        inputs: torch.Tensor,
        return_dict: bool = True,
        return_loss: bool = True,
        condition: torch.Tensor | None = None,
    ) -> VAEPlusPriorOutput | tuple:
        """-log p(z), mean over the batch.

        Args:
            inputs (`torch.Tensor` of shape `(batch, latent_dim)`): z.
            condition: see `sample`.
        """
        output = VAEPlusPriorOutput(loss=-self.log_prob(inputs, condition=condition).mean())
        return output if return_dict else output.to_tuple()


class VAEPlusFlowMatchingModel(VAEPlusPriorModel):
    """Flow matching: dy/dt = v(y, t) carries noise at t = 0 to data at t = 1 (Lipman et al. 2023, Section 4.1, with
    straight paths y_t = (1 - t) u + t y).

    Training has two phases. First `network` learns what the velocity has beyond that of standard normal data, so a
    fresh model is the Gaussian of the data's moments. Then [`~VAEPlusFlowMatchingModel.start_distillation`] freezes it
    as `teacher`, and `network` goes on as the one pass u -> u + network(u, 1/2), which regresses the ends of the
    teacher's ODE. The density is always that of the ODE.

    Options of `sample`: `num_inference_steps` chooses the ODE, in so many steps. `guidance_scale` s of a conditional
    model follows v(null) + s (v(condition) - v(null)) in place of v(condition), by the ODE.

    Example:
        >>> model(z, noise=u, times=times).loss.backward()
        >>> z = model.sample(torch.randn(4, 64))                          # one pass, once distilled
        >>> z = model.sample(torch.randn(4, 64), num_inference_steps=16)  # the ODE
        >>> nats = model.log_prob(z)
    """

    config_class = VAEPlusFlowMatchingConfig
    log_prob_takes_one_pass = False  # but the Jacobian at each step of the ODE

    def __init__(self, config: VAEPlusFlowMatchingConfig):
        super().__init__(config)
        shape = config.num_active, config.hidden_dim, config.num_blocks, config.condition_width
        self.network = VelocityNetwork(*shape)
        self.teacher = VelocityNetwork(*shape).requires_grad_(False) if config.distillation_steps else None
        self.register_buffer("distilled", torch.zeros((), dtype=torch.bool))
        self.register_buffer("pass_mean", torch.zeros(config.num_active))
        self.register_buffer("pass_map", torch.eye(config.num_active))
        self.post_init()

    def _init_own_weights(self):
        init.zeros_(self.distilled)
        init.zeros_(self.pass_mean)
        init.eye_(self.pass_map)

    @property
    def log_prob_is_exact(self) -> bool:
        return self.config.num_active <= self.config.max_exact_dim

    @torch.no_grad()
    def start_distillation(self, trained: "VAEPlusFlowMatchingModel") -> None:
        """From here on `network` is the one pass; it starts as the velocity of `trained`, which becomes the teacher.

        Args:
            trained: the moving average of this model, or the model itself.

        Raises:
            ValueError: a model without `distillation_steps`.
        """
        if self.teacher is None:
            raise ValueError("a model with distillation_steps=0 has no room for a teacher: build it with some.")
        source = trained.network.state_dict()
        self.teacher.load_state_dict(source)
        self.network.load_state_dict(source)
        self.distilled.fill_(True)

    @torch.no_grad()
    def match_moments(
        self, generator: torch.Generator, num_samples: int = 50_000, conditions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """After the distillation, give the one pass mean and covariance of the training data, by an affine map.

        A regression learns the mean of what it cannot foresee, so the one pass lacks variance. Its density is not that
        of the model, so nothing else changes. A pass that was distilled with guidance is left as it is.

        Args:
            generator (`torch.Generator`): on the CPU, draws the u by which the moments are measured.
            num_samples (`int`): how many of them; more than there are active dimensions.
            conditions (`torch.Tensor`, *optional*): of the training data, n of them, of which each u gets one.

        Returns:
            `torch.Tensor` of shape `(num_active,)`: the variances of the one pass along its axes, of whitened z, whose
                own are 1; in rising order, float64 on the CPU.

        Raises:
            ValueError: a model that is not distilled, or too few samples.
        """
        num_active = self.config.num_active
        if not self.distilled or num_samples <= num_active:
            raise ValueError(
                f"match_moments needs a distilled model and more samples than its {num_active} active dimensions, got"
                f" distilled={bool(self.distilled)} and num_samples={num_samples}."
            )
        passed = []
        for part in torch.arange(num_samples).split(2_000):
            u = torch.randn(len(part), num_active, generator=generator).to(self.input_mean)
            rows = None
            if conditions is not None:
                rows = conditions[torch.randint(len(conditions), (len(part),), generator=generator)].to(u.device)
            passed.append(self._one_pass(u, self._features_of(rows, u)).cpu().double())
        passed = torch.cat(passed)
        variances, axes = torch.linalg.eigh(torch.cov(passed.T).reshape(num_active, num_active))
        if self.config.distillation_guidance == 1:
            self.pass_mean.copy_(passed.mean(0))
            self.pass_map.copy_((axes * variances.clamp(min=0.1).rsqrt()) @ axes.T)
        return variances

    def velocity(self, y: torch.Tensor, time: torch.Tensor, features: torch.Tensor | None = None) -> torch.Tensor:
        """v(y, t) of whitened active dimensions `(batch, num_active)` at a time in [0, 1], of shape `(1, 1)`.

        `features` are those of `condition_features`.
        """
        return self._velocity_by(self.teacher if self.distilled else self.network, y, time, features)

    @staticmethod
    def _velocity_by(network: VelocityNetwork, y, time, features=None) -> torch.Tensor:
        # E[y - u | y_t] is the first term where y and u are both N(0, I).
        return (2 * time - 1) / (time.square() + (1 - time).square()) * y + network(y, time, features)

    def _sample(self, latents, noise, features, num_inference_steps: int | None = None, guidance_scale: float = 1.0):
        # One pass stands for one scale; a scale that is asked for takes the ODE.
        if num_inference_steps is None and self.distilled and guidance_scale == 1:
            y = _upcast(self._one_pass(latents, features)) - _upcast(self.pass_mean)
            return y @ _upcast(self.pass_map).T
        velocity = self._guided(self.velocity, features, guidance_scale)
        return self._solve(velocity, latents, num_inference_steps or self.config.num_inference_steps)

    def _guided(self, velocity_of: Callable, features: torch.Tensor | None, scale: float) -> Callable:
        """The velocity of y and time with guidance (Ho and Salimans 2021, Eq. 6, with s = 1 + w)."""
        if scale == 1:
            return _given(velocity_of, features)
        if features is None:
            raise ValueError(f"guidance_scale={scale:g} needs a conditional model: leave it out.")
        null = self.condition_features(None, features)

        def velocity(y, time):
            free = velocity_of(y, time, null)
            return free + scale * (velocity_of(y, time, features) - free)

        return velocity

    def _one_pass(self, latents: torch.Tensor, features: torch.Tensor | None) -> torch.Tensor:
        time = torch.full(
            (1, 1), 0.5, device=latents.device, dtype=latents.dtype
        )  # of the velocity that it starts from
        return latents + self.network(latents, time, features)

    @staticmethod
    def _solve(velocity, y: torch.Tensor, num_steps: int) -> torch.Tensor:
        """From t = 0 to t = 1 by Heun's method."""
        for first, last in _time_steps(num_steps, y):
            slope = velocity(y, first)
            y = y + 0.5 * (last - first) * (slope + velocity(y + (last - first) * slope, last))
        return y

    def _log_prob(self, y, generator, features):
        exact, num_active = self.log_prob_is_exact, self.config.num_active
        if not exact:
            logger.warning_once(
                f"log_prob of {num_active} active dimensions is an estimate: beyond {self.config.max_exact_dim} the"
                " trace of the Jacobian is estimated (Hutchinson)."
            )
        # About so many tangents at a time: each has the size of a row of the batch.
        rows = max(1, 2**14 // num_active) if exact else len(y)
        parts = y.split(rows)
        given = [None] * len(parts) if features is None else features.split(rows)
        # Clones, because the tangents of a view are as large as all that it is a view of.
        return torch.cat([
            self._log_prob_of_rows(part.clone(), each, generator) for part, each in zip(parts, given, strict=True)
        ])  # fmt: skip

    def _log_prob_of_rows(self, y, features, generator):
        velocity = _given(self.velocity, features)
        if self.log_prob_is_exact:
            tangents = torch.eye(y.shape[1], device=y.device, dtype=y.dtype)[:, None].expand(-1, *y.shape)
        else:  # E[e^T J e] = tr J for signs e
            device = y.device if generator is None else generator.device
            signs = torch.randint(2, y.shape, generator=generator, device=device)
            tangents = (2 * signs - 1).to(y)[None]

        def with_trace(y, time):
            along = torch.func.vmap(lambda tangent: torch.func.jvp(lambda y: velocity(y, time), (y,), (tangent,))[1])(
                tangents
            )  # (tangents, batch, dim)
            return velocity(y, time), (along * tangents).sum((0, 2))

        # Backwards, from data to noise: d log p(y_t) / dt = -tr dv/dy (Chen et al. 2018, Eq. 8)
        change = torch.zeros_like(_upcast(y[:, 0]))
        for first, last in reversed(_time_steps(self.config.num_inference_steps, y)):
            step = last - first
            slope, trace = with_trace(y, last)
            next_slope, next_trace = with_trace(y - step * slope, first)
            y = y - 0.5 * step * (slope + next_slope)
            change = change + 0.5 * step.flatten() * (trace + next_trace)
        return _log_normal(_upcast(y)) - change

    def forward(
        self,
        inputs: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
        return_dict: bool = True,
        return_loss: bool = True,
        condition: torch.Tensor | None = None,
    ) -> VAEPlusPriorOutput | tuple:
        """The loss of either phase: of flow matching if there are `inputs`, of the distillation if not.

        Args:
            inputs (`torch.Tensor` of shape `(batch, latent_dim)`, *optional*): z.
            noise (`torch.Tensor` of shape `(batch, latent_dim)`): u, standard normal.
            times (`torch.Tensor` of shape `(batch, 1)`, *optional*): in (0, 1); logit-normal if not given.
            condition: see `sample`.

        Raises:
            ValueError: wrong shapes, or a distillation that was not started.
        """
        if noise is None and inputs is not None:
            noise = torch.randn_like(inputs)
        _check_shape("noise", noise, self.config.input_shape)
        latents = noise[:, self._active].to(self._weight_dtype)
        features = self._features_of(condition, latents)
        if inputs is None:
            if self.teacher is None:
                raise ValueError("forward got no inputs, and a model with distillation_steps=0 is not distilled.")
            with torch.no_grad():
                teacher = functools.partial(self._velocity_by, self.teacher)
                velocity = self._guided(teacher, features, self.config.distillation_guidance)
                target = self._solve(velocity, latents, self.config.distillation_steps)
            error = _upcast(self._one_pass(latents, features)) - _upcast(target)
        else:
            y = self.whitened(inputs)
            times = torch.randn_like(y[:, :1]).sigmoid() if times is None else times.to(y)
            velocity = self._velocity_by(self.network, torch.lerp(latents, y, times), times, features)
            error = _upcast(velocity) - _upcast(y - latents)
        output = VAEPlusPriorOutput(loss=error.square().sum(1).mean())
        return output if return_dict else output.to_tuple()


class Couplings(nn.ModuleList):
    """(batch, dim) -> (batch, dim) and the log of the determinant, through all layers; or the inverse alone."""

    def forward(self, y: torch.Tensor, inverse: bool = False, features: torch.Tensor | None = None):
        if inverse:
            for each in reversed(self):
                y = each(features).inv(y)
            return y
        log_determinant = 0.0
        for each in self:
            y, change = each(features).call_and_ladj(y)
            log_determinant = log_determinant + change
        return y, log_determinant


class VAEPlusCouplingFlowModel(VAEPlusPriorModel):
    """An invertible network of coupling layers (Dinh et al. 2017), each a monotone rational-quadratic spline of one
    half of the dimensions given the other (Durkan et al. 2019). The layers are those of zuko.

    Layer k splits the dimensions by a bit of their number, another one every second layer: so every two dimensions
    come to lie on different sides. In evaluation mode it computes in float64, where the device has that: the inverse
    of a stack of splines loses five digits.

    Raises:
        ImportError: zuko is not installed.

    Example:
        >>> model(z).loss.backward()  # -log p(z)
        >>> z = model.sample(torch.randn(4, 64))
    """

    config_class = VAEPlusCouplingFlowConfig

    def __init__(self, config: VAEPlusCouplingFlowConfig):
        super().__init__(config)
        try:
            import zuko.flows.coupling as coupling
            import zuko.transforms as transforms
        except ImportError as error:
            raise ImportError(
                "a coupling flow needs the package zuko, which is not installed here: pip install 'hf-vaeplus[flows]'"
                " or pip install 'zuko>=1.6'."
            ) from error
        num_bits = max(1, (config.num_active - 1).bit_length())
        shapes = [(config.num_bins,), (config.num_bins,), (config.num_bins - 1,)]
        self.couplings = Couplings()
        with torch.device("cpu"):  # zuko looks at its masks, which the meta device of `from_pretrained` would not hold
            for layer in range(config.num_couplings):
                bit = (torch.arange(config.num_active) >> (layer // 2 % num_bits)) & 1
                each = coupling.GeneralCouplingTransform(
                    config.num_active,
                    config.condition_width,
                    mask=bit == layer % 2,
                    univariate=transforms.MonotonicRQSTransform,
                    shapes=shapes,
                    hidden_features=[config.hidden_dim] * config.num_blocks,
                    activation=nn.SiLU,
                )
                self.couplings.append(each)
        self.post_init()

    def _init_own_weights(self):
        for each in self.couplings:  # start as the identity
            if hasattr(each, "hyper"):
                init.zeros_(each.hyper[-1].weight)
                init.zeros_(each.hyper[-1].bias)

    def _run(self, y: torch.Tensor, inverse: bool = False, features: torch.Tensor | None = None):
        if self.training or y.device.type == "mps":
            return self.couplings(y, inverse, features)
        doubled = {name: each.double() for name, each in self.couplings.named_parameters()}
        features = None if features is None else features.double()
        return torch.func.functional_call(self.couplings, doubled, (y.double(), inverse, features))

    def to_noise(self, z: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """The noise u, of shape `(batch, latent_dim)`, that `sample` makes z of, of the same shape.

        Raises:
            ValueError: wrong shape, or integers instead of floats.
        """
        y, noise = self.whitened(z), _upcast(z).clone()
        noise[:, self._active] = self._run(y, features=self._features_of(condition, y))[0].to(noise)
        return noise

    def _sample(self, latents, noise, features):
        return self._run(latents, inverse=True, features=features).to(latents)

    def _log_prob(self, y, generator, features):
        noise, log_determinant = self._run(y, features=features)
        return (_log_normal(noise) + log_determinant).to(_upcast(y))


class VAEPlusMixtureModel(VAEPlusPriorModel):
    """A mixture of Gaussians of full covariance. It is not trained by gradients: [`~VAEPlusMixtureModel.set_mixture`]
    takes what was fitted, by scikit-learn for example.

    A covariance is kept as its Cholesky factor, so it is definite in every precision. With classes as condition each
    class has components of its own, and the null class is the mixture of all of them.

    Example:
        >>> model.set_mixture(weights, means, covariances)
        >>> z = model.sample(torch.randn(4, 64), torch.randn(4, 64))
        >>> nats = model.log_prob(z)
    """

    config_class = VAEPlusMixtureConfig

    def __init__(self, config: VAEPlusMixtureConfig):
        super().__init__(config)
        shape = config.num_gaussians, config.num_active
        self.log_weights = nn.Parameter(torch.zeros(shape[0]))
        self.means = nn.Parameter(torch.zeros(shape))
        self.factors = nn.Parameter(torch.zeros(*shape, shape[1]))
        self.post_init()

    def _init_own_weights(self):
        init.constant_(self.log_weights, -math.log(self.config.num_gaussians))
        init.zeros_(self.means)
        if not getattr(self.factors, "_is_hf_initialized", False):
            self.factors.copy_(torch.eye(self.config.num_active))

    @torch.no_grad()
    def set_mixture(self, weights: torch.Tensor, means: torch.Tensor, covariances: torch.Tensor) -> None:
        """Take over a mixture of the whitened active dimensions.

        Args:
            weights (`torch.Tensor` of shape `(num_gaussians,)`): positive, of sum 1; with classes, those of a class
                have its share as their sum.
            means (`torch.Tensor` of shape `(num_gaussians, num_active)`).
            covariances (`torch.Tensor` of shape `(num_gaussians, num_active, num_active)`): positive definite.

        Raises:
            ValueError: wrong shapes, or values that are no mixture.
        """
        for name, value, own in (("weights", weights, self.log_weights), ("means", means, self.means),
                                 ("covariances", covariances, self.factors)):  # fmt: skip
            if value.shape != own.shape or not value.isfinite().all():
                raise ValueError(f"{name} must be finite and have shape {tuple(own.shape)}, got {tuple(value.shape)}.")
        factors, failed = torch.linalg.cholesky_ex(covariances.double())
        if failed.any() or not (weights > 0).all() or abs(float(weights.double().sum()) - 1) > 1e-4:
            raise ValueError("weights must be positive with sum 1, and covariances positive definite: fit them anew.")
        self.log_weights.copy_(weights.double().log())
        self.means.copy_(means)
        self.factors.copy_(factors)

    def _sample(self, latents, noise, features):
        if noise is None:
            raise ValueError("a mixture needs noise of the shape of the latents, too: it chooses the components.")
        log_weights = _upcast(self.log_weights)
        uniform = torch.special.ndtr(_upcast(noise)[:, :1].to(log_weights)).contiguous()
        bounds = log_weights.softmax(0).cumsum(0)[:-1].contiguous()
        chosen = torch.searchsorted(bounds, uniform)[:, 0]
        if features is not None:
            of_class, is_null = self._class_of(features)
            bounds = log_weights.reshape(-1, self.config.num_components).softmax(1).cumsum(1)[:, :-1].contiguous()
            within = torch.searchsorted(bounds[of_class], uniform)[:, 0]
            chosen = torch.where(is_null, chosen, of_class * self.config.num_components + within)
        return self.means[chosen] + (self.factors[chosen] @ latents[:, :, None])[:, :, 0]

    def _class_of(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The place of the class of each row, 0 for the null class, and whether it is that."""
        place = features.argmax(1)
        is_null = place == features.shape[1] - 1
        return place.masked_fill(is_null, 0), is_null

    def _log_prob(self, y, generator, features):
        factors, log_weights = _upcast(self.factors), _upcast(self.log_weights).log_softmax(0)
        difference = (_upcast(y) - _upcast(self.means)[:, None]).mT  # (components, dim, batch)
        standardised = torch.linalg.solve_triangular(factors, difference, upper=False)
        log_prob = _log_normal(standardised.mT) - factors.diagonal(dim1=1, dim2=2).log().sum(1, keepdim=True)
        joint = log_prob + log_weights[:, None]
        if features is None:
            return joint.logsumexp(0)
        of_class, is_null = self._class_of(features)
        rows = torch.arange(len(log_weights), device=y.device) // self.config.num_components
        others = (rows[:, None] != of_class) & ~is_null
        share = log_weights[:, None].masked_fill(others, -math.inf).logsumexp(0)  # of the class
        return joint.masked_fill(others, -math.inf).logsumexp(0) - share


def _given(velocity: Callable, features: torch.Tensor | None):
    """The velocity of y and time, of this condition if there is one."""
    return velocity if features is None else functools.partial(velocity, features=features)


def _time_steps(num_steps: int, like: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Beginning and end of each step from 0 to 1, each of shape `(1, 1)`."""
    times = torch.linspace(0, 1, num_steps + 1, device=like.device, dtype=like.dtype)[:, None, None]
    return list(zip(times[:-1], times[1:], strict=True))


def _log_normal(values: torch.Tensor) -> torch.Tensor:
    """log N(values | 0, I), of shape `(...,)` for values of shape `(..., dim)`."""
    return -0.5 * (values.square() + _LOG_2PI).sum(-1)


__all__ = [
    "VAEPlusCouplingFlowConfig",
    "VAEPlusCouplingFlowModel",
    "VAEPlusFlowMatchingConfig",
    "VAEPlusFlowMatchingModel",
    "VAEPlusMixtureConfig",
    "VAEPlusMixtureModel",
    "VAEPlusPriorConfig",
    "VAEPlusPriorModel",
    "VAEPlusPriorOutput",
]
