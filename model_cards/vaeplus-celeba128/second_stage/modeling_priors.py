"""Autoencoder and Gaussian VAE of "On the Regularization Balance in Autoencoder-Based Generative Models" (VAE+).

The whole method is in this file, which imports nothing else of the package: an exported Hub repository carries it
alone. Two models make the three stages:

    stage 0  `VAEPlusAutoencoderModel`  image x  -> code       unregularised, sum of squared errors   (Section 4, 3.)
    stage 1  `VAEPlusVAEModel`          code     -> latents z  error measured on images through the frozen decoder
    stage 2  `VAEPlusVAEModel`          z        -> latents u  a model of the aggregate posterior q(z)

Other second stages are in `modeling_priors.py`, and detail beyond the decoder's mean in `modeling_detail.py`. Every
second stage can be conditional: a model of the latents of images of a class, or with given attributes or factors.

Conventions: pixels lie in [0, 1]; gamma is the decoder **variance** (Eq. 3); losses are sums over dimensions and
means over the batch, in nats.
"""

import contextlib
import difflib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

# ------------------------------------------------------------------------------------------------------- configs

logger = logging.get_logger(__name__)

# What the libraries themselves put into a config's keyword arguments; anything else unknown is a misspelling.
_LIBRARY_KEYS = frozenset(
    "_attn_implementation _commit_hash _name_or_path attn_implementation auto_map experts_implementation model_type"
    " name_or_path output_attentions quantization_config torch_dtype".split()
)
# The library never writes these keys, but where a file holds one it fetches the code or opens the weights named there.
_NEVER_STORED = frozenset(
    "_attn_implementation _experts_implementation attn_implementation experts_implementation"
    " transformers_weights".split()
)


class VAEPlusConfig(PreTrainedConfig):
    """Base of all configs. A misspelt keyword argument is refused; an unknown key of a stored config is kept."""

    def __post_init__(self, _unknown_keys: dict | None = None, **kwargs):
        self._check_model_type(kwargs)
        known = [field.name for field in fields(self)]
        for name in kwargs:
            if name not in _LIBRARY_KEYS and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the fields are {sorted(self._own_fields())}."
                raise ValueError(f"{type(self).__name__} has no field {name!r}: {hint}")
        try:
            super().__post_init__(**kwargs)
            # The library itself would drop `use_cache` and the like, which training tools set.
            for name, value in (_unknown_keys or {}).items():
                setattr(self, name, value)
            self.to_dict()  # fails where the config could be neither shown nor saved
            if not isinstance(self.dtype, torch.dtype | None):  # the library would save anything under another name
                raise TypeError(f"dtype is {self.dtype!r}")
            for name in ("_attn_implementation", "_experts_implementation"):  # these models have neither
                if getattr(self, name, None) not in (None, "eager"):
                    raise ValueError(f"{name} is {getattr(self, name)!r}")
        except Exception as error:  # the library checks few of its own fields, and fails on the others in many ways
            raise ValueError(
                f"{type(self).__name__} got a value that transformers cannot use ({type(error).__name__}: {error}):"
                " correct it or leave it out."
            ) from error

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "VAEPlusConfig | tuple[VAEPlusConfig, dict]":
        """`PreTrainedConfig.from_dict`, which reads every stored config: unknown keys become attributes and are named.

        A newer version wrote such a key, or another program set it on the config before saving.

        Raises:
            ValueError: a value that no field can have, or a key that names a method, other weights or other code.
        """
        known = {field.name for field in fields(cls)} | _LIBRARY_KEYS
        unknown = {name: value for name, value in config_dict.items() if name not in known}
        for name in config_dict:
            if name in _NEVER_STORED or (name in unknown and hasattr(cls, name)):
                raise ValueError(f"{cls.__name__} has no field {name!r} and cannot keep it: remove it from the file.")
        if unknown:
            logger.warning_once(
                f"The stored {cls.__name__} has the unknown keys {sorted(unknown)}: they are kept as attributes and"
                " change nothing."
            )
        config_dict = {name: value for name, value in config_dict.items() if name in known}
        return super().from_dict({**config_dict, "_unknown_keys": unknown}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "VAEPlusConfig":
        """As [`VAEPlusConfig.from_dict`] with the contents of a file."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def _dict_from_json_file(cls, json_file):
        try:
            found = super()._dict_from_json_file(json_file)
        except RecursionError as error:
            raise ValueError(f"{json_file} is nested too deeply for a config: write or download it again.") from error
        if not isinstance(found, dict):
            raise ValueError(f"{json_file} must hold the fields of a config, got a {type(found).__name__}.")
        cls._check_model_type(found, f"{json_file}: ")
        return found

    @classmethod
    def _check_model_type(cls, config_dict: dict, where: str = ""):
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"{where}got the config of a {found} where that of a {cls.model_type} is expected: name the folder of"
                " another model."
            )

    @classmethod
    def _own_fields(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name not in PreTrainedConfig.__dataclass_fields__]

    def _check_positive(self, *names: str, limit: int = 2**20):
        """Refuses what no machine builds, too; of a number of layers that is far less (`limit`)."""
        for name in names:
            value = getattr(self, name)
            for number in value or (0,) if isinstance(value, tuple) else (value,):
                if not number > 0:
                    raise ValueError(f"{type(self).__name__}.{name} must be positive, got {value}.")
                if number > limit:
                    raise ValueError(f"{type(self).__name__}.{name} must be at most {limit:,}, got {value}.")

    def _check_grid(self, image_size: int):
        """The convolutional networks need whole pixels at every scale."""
        divisor = self.patch_size * 2 ** (len(self.hidden_channels) - 1)
        if image_size % divisor:
            raise ValueError(
                f"image size {image_size} must be a multiple of patch_size * 2**(len(hidden_channels) - 1) ="
                f" {divisor}: change hidden_channels={self.hidden_channels} or patch_size={self.patch_size}."
            )


@strict
class VAEPlusAutoencoderConfig(VAEPlusConfig):
    """Configuration of [`VAEPlusAutoencoderModel`].

    Args:
        image_size (`int`): height and width of the square images, 8 to 256 pixels.
        num_channels (`int`): 1 (grey) or 3 (colour).
        latent_dim (`int`): length of the code.
        patch_size (`int`): pixels per side that the first layer folds into channels; the networks run on the grid of
            `image_size / patch_size` positions a side, where convolutions are cheap.
        hidden_channels (`tuple[int, ...]`): channels at each scale of the encoder, halving the grid in between; the
            decoder mirrors them.
        num_blocks (`int`): residual blocks per scale in the encoder and in the decoder.
        matched_spectrum (`bool`): the weights hold the gains of [`VAEPlusAutoencoderModel.match_spectrum`], which sets
            this.

    Raises:
        ValueError: an unknown or non-positive field, or an image size that the scales do not divide.
    """

    model_type = "vaeplus_autoencoder"

    image_size: int = 64
    num_channels: int = 3
    latent_dim: int = 64
    patch_size: int = 4
    hidden_channels: list[int] | tuple[int, ...] = (128, 256, 256)
    num_blocks: int = 1
    matched_spectrum: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.hidden_channels = tuple(self.hidden_channels)
        self._check_positive("latent_dim", "patch_size", "hidden_channels")
        self._check_positive("num_blocks", limit=1000)
        if self.num_channels not in (1, 3):
            raise ValueError(f"VAEPlusAutoencoderConfig.num_channels must be 1 or 3, got {self.num_channels}.")
        if not 8 <= self.image_size <= 256:
            raise ValueError(f"VAEPlusAutoencoderConfig.image_size must be 8 to 256, got {self.image_size}.")
        self._check_grid(self.image_size)


class VAEPlusConditionalConfig(VAEPlusConfig):
    """Fields of a second stage that is conditional: what is known of an image beforehand is its condition.

    Args:
        condition (`"classes" | "attributes" | "factors"`, *optional*): one of several classes, or several attributes
            that are 0 or 1, or several numbers. A model without a condition knows the latents of all images alone.
        id2label (`dict[int, str]`): names of the classes by their ids, or of attributes or factors by their place.

    Raises:
        ValueError: too few or too many names, or places that are not 0, 1, 2, ...
    """

    condition: Literal["classes", "attributes", "factors"] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.condition is None:
            return
        ids, least = self.label_ids, 2 if self.condition == "classes" else 1
        are_texts = all(isinstance(name, str) for name in (self.id2label or {}).values())
        are_places = self.condition == "classes" or ids == list(range(len(ids)))
        if not (are_texts and are_places and least <= len(ids) <= 10_000):
            wanted = "by their ids" if self.condition == "classes" else "by their places 0, 1, 2, ..."
            raise ValueError(
                f"{type(self).__name__}.id2label must name {least} to 10,000 {self.condition} {wanted}, got"
                f" {str(self.id2label)[:80]}."
            )

    @property
    def label_ids(self) -> list[int]:
        """Ids of the classes, or places of the attributes or factors, in rising order."""
        return sorted(self.id2label or {})

    @property
    def condition_width(self) -> int:
        """How many numbers [`ConditionFeatures`] makes of a condition; 0 without one."""
        if self.condition is None:
            return 0
        return len(self.label_ids) + 1 if self.condition == "classes" else 2 * len(self.label_ids)

    def to_condition(self, labels) -> torch.Tensor:
        """Labels as people write them, in the form in which the model takes them.

        Args:
            labels: of classes an id or a name, or a list, array or tensor of them; `None` is the null class, which
                stands for images of all classes. Of attributes or factors the values in their order, or a `dict` of
                some of them by name, or a list of these, or an array or tensor of shape `(n, number of names)`;
                `None` and NaN stand for values that are not given.

        Returns:
            int64 `torch.Tensor` of shape `(n,)`: places of ids in `label_ids`, -1 for the null class. Of attributes
                and factors float32 of shape `(n, number of names)`.

        Raises:
            ValueError: a class, a name or a shape that this model does not know, or a value that is none.
        """
        labels = labels.tolist() if isinstance(labels, np.ndarray | torch.Tensor) else labels
        if self.condition == "classes":
            places = {None: -1} | {each: place for place, each in enumerate(self.label_ids)}
            places |= {self.id2label[each]: place for place, each in reversed(list(enumerate(self.label_ids)))}
            rows = labels if isinstance(labels, list | tuple) else [labels]
            return torch.tensor([self._place_of_class(row, places) for row in rows], dtype=torch.long)
        rows = labels if isinstance(labels, list | tuple) and labels and not _is_number(labels[0]) else [labels]
        num, rows = len(self.label_ids), list(rows)
        for place, row in enumerate(rows):
            row = self._values_by_name(row) if isinstance(row, Mapping) else row
            rows[place] = row = row.tolist() if isinstance(row, np.ndarray | torch.Tensor) else row
            if not isinstance(row, list | tuple) or len(row) != num or not all(map(_is_number, row)):
                raise ValueError(
                    f"expected {num} {self.condition} ({self._known_names()}) for each image, as a list of numbers or"
                    f" a dict by name, got {str(row)[:80]}."
                )
        values = torch.tensor([[math.nan if value is None else float(value) for value in row] for row in rows])
        values = values.to(torch.float32).reshape(-1, num)
        if self.condition == "attributes" and not ((values == 0) | (values == 1) | values.isnan()).all():
            raise ValueError(f"attributes are 0, 1 or not given (None), got {values.tolist()[0][:8]}.")
        if values.isinf().any():
            raise ValueError("factors must be finite or not given (None), got infinity.")
        return values

    def _place_of_class(self, label, places: dict[int | str | None, int]) -> int:
        label = label.item() if getattr(label, "ndim", None) == 0 else label  # of numpy and torch
        can_be_one = label is None or isinstance(label, str | Integral) and not isinstance(label, bool)
        if not can_be_one or label not in places:
            raise ValueError(f"there is no class {label!r}: choose among {self._known_names()}, or None for all.")
        return places[label]

    def _values_by_name(self, row: Mapping) -> list:
        names = [self.id2label[place] for place in self.label_ids]
        if unknown := [name for name in row if name not in names]:
            raise ValueError(
                f"there is no {unknown[0]!r} among the {self.condition}: choose among {self._known_names()}."
            )
        return [row.get(name) for name in names]

    def _known_names(self) -> str:
        names = [self.id2label[each] for each in self.label_ids]
        if self.condition == "classes":
            pairs = zip(map(str, self.label_ids), names, strict=True)
            names = [number if number == name else f"{number} ({name})" for number, name in pairs]
        return ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")


@strict
class VAEPlusVAEConfig(VAEPlusConditionalConfig):
    """Configuration of [`VAEPlusVAEModel`], the VAE of stages 1 and 2 and of the baselines.

    Args:
        input_shape (`tuple[int, ...]`): `(64,)` for a code of 64 numbers, `(channels, height, width)` for pixels.
        latent_dim (`int`): kappa, the number of latent dimensions.
        network (`"mlp" | "conv" | "aggregate" | "affine"`): residual MLP on the flattened input; residual convolutions
            straight on pixels; the autoencoder and the MLP of its first VAE joined to one network on pixels, for
            baselines of the same structure; the affine model of Theorem 1 (Eq. 3), whose posterior variance does not
            depend on the input.
        hidden_dim, num_blocks (`int`): width and residual blocks of two layers each in the MLP.
        encoder_blocks (`int`, *optional*): blocks of the MLP encoder, `num_blocks` if not given.
        code_dim (`int`): numbers between the convolutions and the MLP of `network="aggregate"`.
        patch_size, hidden_channels, num_conv_blocks: of the convolutions, as `patch_size`, `hidden_channels` and
            `num_blocks` in [`VAEPlusAutoencoderConfig`].
        encoder_residual, decoder_residual (`bool`): without them that half of the MLP is a plain feed-forward stack
            of `2 + 2 * num_blocks` layers, the first and the last included.
        affine_skip (`bool`): adds W z + b to the decoder mean (Eq. 5); to the code in `network="aggregate"`.
        latent_init_scale (`float`): factor on the initial weights of the two layers that latents enter the decoder by,
            its first and the affine skip. Well below 1, dimensions that are not needed start nearly silent: with many
            more dimensions than factors that saves the time to silence them.
        gamma (`"learned" | "analytic" | "fixed"`): the decoder variance is a parameter, or follows its closed-form
            optimum (the running geometric mean of the squared error per dimension), or stays at `gamma_init`.
        gamma_init (`float`): the variance at the start; `"analytic"` replaces it at the first training step. A learned
            gamma of a second stage wants it well below 1: its inputs have unit variance, and a direction survives
            only while its variance exceeds gamma.
        gamma_momentum (`float`): momentum of the running mean of `gamma="analytic"`, in [0, 1).
        min_gamma (`float`): floor of the learned and the analytic variance.
        max_gamma (`float`, *optional*): ceiling of the analytic variance, for second stages (0.1, say), where the
            closed-form optimum of an untrained network is a collapse.
        reconstruction_space (`"input" | "image" | "pullback"`): where the data term is measured: on the inputs
            themselves (for a first VAE also called `"code"`); on images through the `target_decoder` given to
            `forward` (Section 4); or on images to second order, by the metric of
            [`VAEPlusVAEModel.set_pullback_metric`], without a decoder. gamma is a variance in that space.
        target_dim (`int`, *optional*): number of values in an image, for `reconstruction_space="pullback"`.
        matched_moments (`bool`): the weights hold the map of [`VAEPlusVAEModel.match_moments`], which sets this.
        condition, id2label: of a second stage with `network="mlp"`, see [`VAEPlusConditionalConfig`]: encoder and
            decoder see the condition beside their inputs.

    Raises:
        ValueError: an unknown, non-positive or inconsistent field.
    """

    model_type = "vaeplus_vae"

    input_shape: list[int] | tuple[int, ...] = (64,)
    latent_dim: int = 64
    network: Literal["mlp", "conv", "aggregate", "affine"] = "mlp"
    hidden_dim: int = 512
    num_blocks: int = 3
    encoder_blocks: int | None = None
    code_dim: int = 64
    patch_size: int = 4
    hidden_channels: list[int] | tuple[int, ...] = (128, 256, 256)
    num_conv_blocks: int = 1
    encoder_residual: bool = True
    decoder_residual: bool = True
    affine_skip: bool = True
    latent_init_scale: float | int = 1.0
    gamma: Literal["learned", "analytic", "fixed"] = "analytic"
    gamma_init: float | int = 1.0
    gamma_momentum: float | int = 0.99
    min_gamma: float | int = 1e-8
    max_gamma: float | int | None = None
    reconstruction_space: Literal["input", "code", "image", "pullback"] = "input"
    target_dim: int | None = None
    matched_moments: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.input_shape, self.hidden_channels = tuple(self.input_shape), tuple(self.hidden_channels)
        self._check_positive("input_shape", "latent_dim", "hidden_dim", "code_dim", "patch_size", "hidden_channels")
        self._check_positive("num_blocks", "num_conv_blocks", limit=1000)
        self._check_positive("latent_init_scale", "gamma_init", "min_gamma")
        if self.encoder_blocks is not None:
            self._check_positive("encoder_blocks", limit=1000)
        if self.max_gamma is not None:
            self._check_positive("max_gamma")
            if not self.max_gamma > self.min_gamma:
                raise ValueError(f"VAEPlusVAEConfig.max_gamma must exceed min_gamma, got {self.max_gamma}.")
        if not 0 <= self.gamma_momentum < 1:
            raise ValueError(f"VAEPlusVAEConfig.gamma_momentum must lie in [0, 1), got {self.gamma_momentum}.")
        if self.reconstruction_space == "code":
            self.reconstruction_space = "input"
        if (self.reconstruction_space == "pullback") != (self.target_dim is not None):
            raise ValueError(
                f"reconstruction_space={self.reconstruction_space!r} with target_dim={self.target_dim}:"
                " 'pullback' needs the number of values in an image, the others take none."
            )
        if self.reconstruction_space == "pullback":
            self._check_positive("target_dim")
            if len(self.input_shape) != 1:
                raise ValueError(
                    f"reconstruction_space='pullback' is for VAEs of codes, not of inputs {self.input_shape}."
                )
        if self.condition is not None and (self.network != "mlp" or len(self.input_shape) != 1):
            raise ValueError(
                f"a condition is for VAEs of vectors with network='mlp', not for network={self.network!r} and inputs"
                f" {self.input_shape}."
            )
        if self.network in ("conv", "aggregate"):
            if len(self.input_shape) != 3 or self.input_shape[1] != self.input_shape[2]:
                raise ValueError(
                    f"network={self.network!r} needs input_shape=(channels, size, size), got {self.input_shape}:"
                    " use network='mlp' for vectors."
                )
            self._check_grid(self.input_shape[1])

    @property
    def input_dim(self) -> int:
        """Number of values in one input."""
        return math.prod(self.input_shape)

    @property
    def gamma_is_of_images(self) -> bool:
        """Whether gamma is the variance of pixels around the decoded image, not of the inputs."""
        return self.reconstruction_space in ("image", "pullback")


@strict
class VAEPlusEncoderConfig(VAEPlusConfig):
    """Configuration of [`VAEPlusEncoderModel`].

    Args:
        stages (`tuple[str, ...]`): the stages that an image passes, which are also the folders that hold them:
            `"autoencoder"`, `"vae"` or both.

    Raises:
        ValueError: an unknown field or other stages.
    """

    model_type = "vaeplus_encoder"

    stages: list[str] | tuple[str, ...] = ("autoencoder", "vae")

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.stages = tuple(self.stages)
        if self.stages not in (("autoencoder", "vae"), ("autoencoder",), ("vae",)):
            raise ValueError(f"VAEPlusEncoderConfig.stages must be of autoencoder and vae, got {self.stages}.")


# ------------------------------------------------------------------------------------------------------- outputs


@dataclass
class VAEPlusAutoencoderOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`, *optional*): squared error per image, summed over its values, mean over
        the batch.
    reconstruction (`torch.FloatTensor` of shape `(batch, num_channels, image_size, image_size)`): around [0, 1].
    code (`torch.FloatTensor` of shape `(batch, latent_dim)`).
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    code: torch.FloatTensor | None = None


@dataclass
class VAEPlusVAEOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `()`): nll + kl_weight * kl; with weight 1 the negative ELBO, nats per sample.
    nll (`torch.FloatTensor` of shape `()`): data term -log N(target | mean, gamma I); can be negative (a density).
    kl (`torch.FloatTensor` of shape `()`): KL[q(z|x) || N(0, I)].
    squared_error (`torch.FloatTensor` of shape `()`): squared error per sample, summed over its values.
    gamma (`torch.FloatTensor` of shape `()`): decoder variance used in nll.
    active_units (`torch.FloatTensor` of shape `()`): latent dimensions whose mean posterior variance is below 1/2.
    reconstruction (`torch.FloatTensor` of shape `(batch, *dims)`): decoder mean at the sampled latents, in the space
        in which the data term is measured.
    posterior_mean, posterior_logvar (`torch.FloatTensor` of shape `(batch, latent_dim)`): of q(z|x), which `posterior`
        joins to a [`GaussianPosterior`]. They are tensors here because `Trainer`, Accelerate and `torch.export` take
        an output apart and know nothing else.

    Without losses (`return_loss=False`) all but the last three are `None`.
    """

    loss: torch.FloatTensor | None = None
    nll: torch.FloatTensor | None = None
    kl: torch.FloatTensor | None = None
    squared_error: torch.FloatTensor | None = None
    gamma: torch.FloatTensor | None = None
    active_units: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    posterior_mean: torch.FloatTensor | None = None
    posterior_logvar: torch.FloatTensor | None = None

    @property
    def posterior(self) -> "GaussianPosterior":
        return GaussianPosterior(self.posterior_mean, self.posterior_logvar)


@dataclass
class VAEPlusEncoderOutput(ModelOutput):
    r"""
    features (`torch.FloatTensor` of shape `(batch, latent_dim)`): mean of the posterior; without a VAE, the code.
    logvar (`torch.FloatTensor` of shape `(batch, latent_dim)`, *optional*): log variances of that posterior.
    """

    features: torch.FloatTensor | None = None
    logvar: torch.FloatTensor | None = None


# ---------------------------------------------------------------------------------------------------- mathematics


class GaussianPosterior:
    """q(z|x) = N(mean, diag(exp(logvar))).

    Args:
        mean, logvar (`torch.Tensor` of shape `(batch, latent_dim)`): float32.
    """

    def __init__(self, mean: torch.Tensor, logvar: torch.Tensor):
        self.mean, self.logvar = mean, logvar

    def __repr__(self) -> str:
        mean, logvar = (f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (self.mean, self.logvar))
        return f"GaussianPosterior(mean={mean}, logvar={logvar}, device={self.mean.device})"

    def sample(self, noise: torch.Tensor | None = None, generator: torch.Generator | None = None) -> torch.Tensor:
        """mean + sigma * noise. `noise` is standard normal, drawn if not given; any device and precision will do.

        Its shape, and that of the result, is `(batch, latent_dim)`, or `(..., batch, latent_dim)` for several samples.
        """
        if noise is None:  # drawn where the generator is, so that a seed gives the same noise on every device
            device = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean)

    def mode(self) -> torch.Tensor:
        """The mean, of shape `(batch, latent_dim)`."""
        return self.mean

    def kl(self) -> torch.Tensor:
        """KL[q(z|x) || N(0, I)] by dimension, in nats, of shape `(batch, latent_dim)`: the sum in Eq. (3), halved."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar)

    def log_prob(self, latents: torch.Tensor) -> torch.Tensor:
        """log q(latents|x) in nats, of shape `(..., batch)` for latents of shape `(..., batch, latent_dim)`.

        Latents that `sample` drew lose float32 precision against the mean where the variance is tiny: there, use
        -0.5 * (noise**2 + logvar + log(2 pi)) of the noise they were drawn with.
        """
        squared = (latents - self.mean).square() / self.logvar.exp()
        return -0.5 * (squared + self.logvar + math.log(2 * math.pi)).sum(-1)


def sum_of_squares(mean: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error per sample, summed over all other dimensions: float32 of shape `(batch,)`.

    Raises:
        ValueError: shapes differ (broadcasting would hide a mistake).
    """
    if mean.shape != target.shape:
        raise ValueError(
            f"the decoder mean has shape {tuple(mean.shape)} and its target {tuple(target.shape)}: they must be equal."
        )
    return (_upcast(target) - _upcast(mean)).square().flatten(1).sum(1)


def gaussian_nll(squared_error: torch.Tensor, num_dims: int, log_gamma: torch.Tensor) -> torch.Tensor:
    """-log N(target | mean, gamma I), from ||target - mean||^2. Twice this is the data term of Eq. (3), plus 2 pi's.

    Args:
        squared_error (`torch.Tensor` of shape `(batch,)`): summed over the `num_dims` dimensions of a sample.
        num_dims (`int`): d.
        log_gamma (`torch.Tensor` of shape `()`): log of the decoder variance.

    Returns:
        `torch.Tensor` of shape `(batch,)`: nats per sample. Its optimum is gamma = mean squared error / d.
    """
    return 0.5 * (squared_error / log_gamma.exp() + num_dims * (log_gamma + math.log(2 * math.pi)))


# ------------------------------------------------------------------------------------------------------- networks


def start_at_zero(layer: nn.Linear | nn.Conv2d, first_row: int = 0) -> nn.Linear | nn.Conv2d:
    """Mark the output rows of a layer from `first_row` on to be initialized with zero weights."""
    layer.num_random_rows = first_row
    return layer


class ResidualMLPBlock(nn.Module):
    """x + W2 silu(W1 norm(x)); W2 starts at zero, so a fresh network is affine."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.outer = start_at_zero(nn.Linear(width, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.outer(F.silu(self.inner(self.norm(hidden))))


class PlainMLPBlock(nn.Module):
    """Two feed-forward layers without a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.silu(self.outer(F.silu(self.inner(hidden))))


class MLP(nn.Sequential):
    """(batch, in_dim) -> (batch, out_dim) through `num_blocks` blocks of two layers."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_blocks: int, residual: bool):
        block = ResidualMLPBlock if residual else PlainMLPBlock
        blocks = [block(hidden_dim) for _ in range(num_blocks)]
        entry = [nn.Linear(in_dim, hidden_dim)] + ([] if residual else [nn.SiLU()])
        super().__init__(*entry, *blocks, nn.Linear(hidden_dim, out_dim))
        if not residual:  # no shortcut and no norm hold the signal up: every layer has to give back what SiLU takes
            for layer in [layer for block in blocks for layer in (block.inner, block.outer)] + [self[-1]]:
                layer.init_scale = 1.676  # E[silu(x)^2] = 0.356 for standard normal x


class ResidualConvBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))); the second convolution starts at zero, which takes the place of a norm."""

    def __init__(self, channels: int):
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = start_at_zero(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.outer(F.silu(self.inner(F.silu(hidden))))


class ConvEncoder(nn.Sequential):
    """(batch, channels, size, size) -> (batch, out_dim): folded patches, residual blocks per scale, linear."""

    def __init__(self, config: VAEPlusConfig, num_channels: int, image_size: int, out_dim: int, num_blocks: int):
        widths = config.hidden_channels
        layers = [
            nn.PixelUnshuffle(config.patch_size),
            nn.Conv2d(num_channels * config.patch_size**2, widths[0], 3, padding=1),
        ]
        for scale, width in enumerate(widths):
            if scale > 0:
                layers.append(nn.Conv2d(widths[scale - 1], width, 2, stride=2))
            layers += [ResidualConvBlock(width) for _ in range(num_blocks)]
        grid = image_size // config.patch_size // 2 ** (len(widths) - 1)
        super().__init__(*layers, nn.Flatten(), nn.Linear(widths[-1] * grid**2, out_dim))


class ConvDecoder(nn.Sequential):
    """(batch, in_dim) -> (batch, channels, size, size): the encoder mirrored, pixels unfolded at the end."""

    def __init__(self, config: VAEPlusConfig, num_channels: int, image_size: int, in_dim: int, num_blocks: int):
        widths = config.hidden_channels
        grid = image_size // config.patch_size // 2 ** (len(widths) - 1)
        layers = [nn.Linear(in_dim, widths[-1] * grid**2), nn.Unflatten(1, (widths[-1], grid, grid))]
        for scale in reversed(range(len(widths))):
            layers += [ResidualConvBlock(widths[scale]) for _ in range(num_blocks)]
            if scale > 0:
                layers += [nn.Conv2d(widths[scale], 4 * widths[scale - 1], 1), nn.PixelShuffle(2)]
        layers += [nn.SiLU(), nn.Conv2d(widths[0], num_channels * config.patch_size**2, 3, padding=1)]
        super().__init__(*layers, nn.PixelShuffle(config.patch_size))


class ConditionFeatures(nn.Module):
    """A condition as numbers for a network, of shape `(batch, condition_width)`.

    A class is one-hot, with a last place for the null class. Attributes and factors are standardised, 0 where they are
    not given, and followed by as many flags that say which are given.
    """

    def __init__(self, config: VAEPlusConditionalConfig):
        super().__init__()
        self.kind, self.num = config.condition, len(config.label_ids)
        if self.kind != "classes":
            self.register_buffer("mean", torch.zeros(self.num))
            self.register_buffer("std", torch.ones(self.num))

    def set_statistics(self, values: torch.Tensor) -> None:
        """Standardise by mean and deviation of the values `(n, num)` of the training data; NaN is not given."""
        if self.kind == "classes":
            return
        for place, column in enumerate(values.double().unbind(1)):
            column = column[column.isfinite()]
            deviation = float(column.std(correction=0)) if len(column) else 0.0
            self.mean[place] = float(column.mean()) if len(column) else 0.0
            self.std[place] = deviation if deviation > 1e-6 else 1.0  # a value that never moves says nothing

    def forward(self, condition: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Features of conditions, as [`VAEPlusConditionalConfig.to_condition`] makes them, or of `None` for all rows.

        `like`, a tensor of as many rows, lends its device and precision.

        Raises:
            ValueError: wrong shape or type, or a class that does not exist.
        """
        shape = (len(like),) if self.kind == "classes" else (len(like), self.num)
        if condition is None:
            condition = torch.full(shape, -1 if self.kind == "classes" else math.nan, device=like.device)
        if condition.shape != shape or condition.is_floating_point() != (self.kind != "classes"):
            numbers = "integers" if self.kind == "classes" else "floats"
            raise ValueError(
                f"a condition of {self.num} {self.kind} must be {numbers} of shape {shape}, got {condition.dtype} of"
                f" shape {tuple(condition.shape)}: make it with config.to_condition."
            )
        if self.kind == "classes":
            looks = not self.training and not torch.compiler.is_compiling()  # in training that would cost a wait
            if looks and not bool(((condition >= -1) & (condition < self.num)).all()):
                raise ValueError(f"places of {self.num} classes are -1 to {self.num - 1}: use config.to_condition.")
            place = torch.where(condition < 0, self.num, condition)
            return (place[:, None] == torch.arange(self.num + 1, device=place.device)).to(like)
        given = condition.isfinite()
        standardised = torch.where(given, (_upcast(condition) - _upcast(self.mean)) / _upcast(self.std), 0)
        return torch.cat([standardised.to(like), given.to(like)], dim=1)


# --------------------------------------------------------------------------------------------------------- models


class VAEPlusPreTrainedModel(PreTrainedModel):
    """Base of both models: weight initialization, and float32 for `log_gamma` whatever the weights are cast to."""

    config_class = VAEPlusConfig
    base_model_prefix = "vaeplus"
    supports_gradient_checkpointing = False
    condition_features: ConditionFeatures | None  # of models that can be conditional
    _keep_in_fp32_modules_strict = ["log_gamma"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs
    ) -> "VAEPlusPreTrainedModel | tuple[VAEPlusPreTrainedModel, dict]":
        """`PreTrainedModel.from_pretrained`, but from safetensors alone, and never half random.

        Raises:
            ValueError: weights are missing, unknown, of another shape, damaged, not finite, pickled, or in a place
                outside their folder.
            OSError: nothing is there, or nothing in safetensors.
        """
        for name in ("use_safetensors", "weights_only"):
            if kwargs.pop(name, None) is False:
                raise ValueError(f"{name}=False is refused: pickled weights can run code, so leave it out.")
        _check_shards(os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        give_info = kwargs.pop("output_loading_info", False)
        kwargs.update(use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)  # refused below
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"the weights of {pretrained_model_name_or_path} are damaged ({error}): save or download them again."
            ) from error
        wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(wrong.values()):
            told = "; ".join(f"{kind.replace('_', ' ')} {names}" for kind, names in wrong.items() if names)
            raise ValueError(
                f"the weights of {pretrained_model_name_or_path} do not belong to a {cls.__name__} with its"
                f" config.json: {told}; save the model again or load it with the class that saved it."
            )
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
                raise ValueError(
                    f"the weights of {pretrained_model_name_or_path} hold NaN or infinity in {name}: take an earlier"
                    " checkpoint or download them again."
                )
        for tensor in (*model.parameters(), *model.buffers()):
            # A file has weights at any address, and at some of them some processors add in another order.
            if not tensor.is_meta and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()
        return (model, info) if give_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        *args,
        **kwargs,
    ) -> None:
        """`PreTrainedModel.save_pretrained`, but weights replace older ones, be they in one file or in shards.

        Others may read them, as far as the umask lets them.
        """
        with one_form_of_weights(Path(save_directory), variant) if is_main_process else contextlib.nullcontext():
            super().save_pretrained(
                save_directory, is_main_process, state_dict, push_to_hub, max_shard_size, variant, *args, **kwargs
            )
        umask = os.umask(0o077)  # it can only be read by setting it
        os.umask(umask)
        for weights in Path(save_directory).glob("*.safetensors"):  # of safetensors, which are for their owner alone
            weights.chmod(0o666 & ~umask)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        # The library opens what an index names, from the Hub as well; with another suffix it would be unpickled.
        for file in checkpoint_files or ():
            if not str(file).endswith(".safetensors"):
                raise ValueError(f"{file} is named as weights but is no safetensors file: no other is opened.")
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def _features_of(self, condition: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
        """Of [`ConditionFeatures`]; `None` for a model without a condition.

        Raises:
            ValueError: a condition for such a model, or one that does not fit.
        """
        if self.condition_features is not None:
            return self.condition_features(condition, like)
        if condition is not None:
            raise ValueError(f"this {type(self).__name__} is unconditional: leave out the condition.")
        return None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """All initialization. transformers visits only modules with tensors of their own, so the rows of a layer that
        start at zero are marked on the layer (`start_at_zero`).

        | module | weight | bias |
        |---|---|---|
        | Linear, Conv2d | N(0, 1/fan_in) | 0 |
        | Linear after SiLU in a plain MLP | N(0, 1.676^2/fan_in) | 0 |
        | VAE: first layer of the decoder, affine skip | N(0, latent_init_scale^2/fan_in) | 0 |
        | LayerNorm | 1 | 0 |
        | `outer` of a residual block | 0 | 0 |
        | last layer of the autoencoder's decoder | 0 | 0 |
        | VAE: head of log sigma^2; last layer of a decoder that has an affine skip | 0 | 0 |
        | VAE: `log_gamma` | log(gamma_init) | |
        """
        if isinstance(module, nn.Linear | nn.Conv2d):
            if not getattr(module.weight, "_is_hf_initialized", False):  # not loaded from a checkpoint
                scale = getattr(module, "init_scale", 1.0)
                init.normal_(module.weight, std=scale * module.weight[0].numel() ** -0.5)
                module.weight[getattr(module, "num_random_rows", len(module.weight)) :] = 0
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ConditionFeatures) and module.kind != "classes":
            init.zeros_(module.mean)
            init.ones_(module.std)
        elif isinstance(module, VAEPlusVAEModel):
            module._init_own_weights()
        elif isinstance(module, VAEPlusAutoencoderModel) and module.config.matched_spectrum:
            init.ones_(module.spectrum_gain)

    def _apply(self, fn, recurse=True):
        # `.to(torch.bfloat16)` would round log gamma to 1%, which moves the likelihood of an image by tens of nats.
        log_gamma = getattr(self, "log_gamma", None)
        exact = None if log_gamma is None or log_gamma.is_meta else log_gamma.detach().clone()
        super()._apply(fn, recurse)
        if exact is not None and self.log_gamma.dtype.itemsize < exact.dtype.itemsize:
            self.log_gamma.data = exact.to(self.log_gamma.device)
        return self


class VAEPlusAutoencoderModel(VAEPlusPreTrainedModel):
    """Deterministic residual convolutional autoencoder: image in [0, 1] -> code -> image (Section 4, prescription 3).

    Example:
        >>> model = VAEPlusAutoencoderModel(VAEPlusAutoencoderConfig(image_size=64, latent_dim=64))
        >>> code = model.encode(images)          # (batch, 3, 64, 64) -> (batch, 64)
        >>> images = model.decode(code)
    """

    config_class = VAEPlusAutoencoderConfig
    main_input_name = "pixel_values"

    def __init__(self, config: VAEPlusAutoencoderConfig):
        super().__init__(config)
        shape = config.num_channels, config.image_size, config.latent_dim, config.num_blocks
        self.encoder = ConvEncoder(config, *shape)
        self.decoder = ConvDecoder(config, *shape)
        start_at_zero(self.decoder[-2])
        if config.matched_spectrum:
            self._register_spectrum_gain()
        self.post_init()

    def _register_spectrum_gain(self):
        size = self.config.image_size
        self.register_buffer("spectrum_gain", torch.ones(self.config.num_channels, size, size // 2 + 1))

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Codes of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, num_channels, image_size, image_size)`): floats in [0, 1].

        Returns:
            `torch.Tensor` of shape `(batch, latent_dim)`.

        Raises:
            ValueError: wrong shape, or integers instead of floats.
        """
        _check_shape("pixel_values", pixel_values, (self.config.num_channels,) + (self.config.image_size,) * 2)
        return self.encoder(2 * pixel_values.to(self.dtype) - 1)

    def decode(self, code: torch.Tensor) -> torch.Tensor:
        """Images `(batch, num_channels, image_size, image_size)`, not clipped, of codes `(batch, latent_dim)`.

        Raises:
            ValueError: wrong shape, or integers instead of floats.
        """
        _check_shape("code", code, (self.config.latent_dim,))
        return 0.5 * self.decoder(code.to(self.dtype)) + 0.5

    def decode_with_features(self, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`decode(code)`, and the decoder's last features: `(batch, hidden_channels[0], grid, grid)`.

        `grid` is `image_size / patch_size`.

        Raises:
            ValueError: as `decode`.
        """
        _check_shape("code", code, (self.config.latent_dim,))
        *body, activation, last, unfold = self.decoder
        features = code.to(self.dtype)
        for layer in body:
            features = layer(features)
        features = activation(features)
        return 0.5 * unfold(last(features)) + 0.5, features

    @torch.no_grad()
    def pullback_metric(self, codes: torch.Tensor, chunk_size: int = 4) -> torch.Tensor:
        """How much an image changes, squared, with its code: the mean over `codes` of J^T J, J = d decode / d code.

        To second order ||decode(c + e) - decode(c)||^2 = e^T J^T J e. The columns of J are Jacobian-vector products in
        forward mode, all `latent_dim` of a code in one pass (docs/pullback.md).

        Args:
            codes (`torch.Tensor` of shape `(n, latent_dim)`).
            chunk_size (`int`): codes at a time; each takes the memory of `latent_dim` images.

        Returns:
            float64 `torch.Tensor` of shape `(latent_dim, latent_dim)` on the CPU, for not every device has float64:
                squared pixels per squared unit of the code.

        Raises:
            ValueError: wrong shape, integers instead of floats, or no codes.
        """
        _check_shape("codes", codes, (self.config.latent_dim,))
        if not len(codes):
            raise ValueError("pullback_metric got no codes: pass at least one.")
        axes = torch.eye(self.config.latent_dim, dtype=self.dtype, device=codes.device)
        total = torch.zeros(axes.shape, dtype=torch.float64, device="cpu")
        for part in codes.to(self.dtype).split(chunk_size):
            part = part.clone()  # the tangents of a view are as large as all that it is a view of
            along = torch.func.vmap(lambda axis, part=part: torch.func.jvp(
                self.decode, (part,), (axis.expand_as(part),))[1])  # fmt: skip
            columns = _upcast(along(axes)).flatten(2).transpose(0, 1)  # (codes, latent_dim, pixels)
            with torch.autocast(codes.device.type, enabled=False):  # a product in half precision may not be definite
                total += (columns @ columns.mT).cpu().double().sum(0)
        return total / len(codes)

    def sharpen(self, images: torch.Tensor, sharpness: float = 1.0) -> torch.Tensor:
        """Decoded images with every spatial frequency amplified by its gain to the power of `sharpness`.

        A decoder trained on squared errors returns means, and a mean has less power at high frequencies than the
        images that it averages. At `sharpness=1` the power at each frequency is, on average, that of real images; 0
        leaves the images alone. What is sharpened is not the mean of the likelihood any more: its squared error is
        larger.

        Args:
            images (`torch.Tensor` of shape `(batch, num_channels, image_size, image_size)`): as `decode` returns them.
            sharpness (`float`): in [0, 1]; more exaggerates.

        Returns:
            float32 `torch.Tensor` of the same shape, not clipped.

        Raises:
            ValueError: wrong shape, or no gains: `match_spectrum` was never called.
        """
        if not self.config.matched_spectrum:
            raise ValueError(
                "this autoencoder cannot sharpen: call match_spectrum with training images, or train it anew."
            )
        _check_shape("images", images, (self.config.num_channels,) + (self.config.image_size,) * 2)
        spectrum = torch.fft.rfft2(_upcast(images)) * _upcast(self.spectrum_gain).pow(sharpness)
        return torch.fft.irfft2(spectrum, s=images.shape[2:])

    @torch.no_grad()
    def match_spectrum(self, batches: Iterable[torch.Tensor], max_gain: float = 20.0) -> None:
        """After training, measure the gains of `sharpen`: the square root of mean |F x|^2 / mean |F xhat|^2.

        Args:
            batches: real images x in [0, 1], tensors of shape `(batch, num_channels, image_size, image_size)`.
            max_gain (`float`): ceiling; of frequencies that hardly pass the autoencoder at all only noise would come
                back. (Faces at 64 x 64: 1 to 15.)

        Raises:
            ValueError: no images, wrong shapes, or a ceiling below 1.
        """
        if not max_gain >= 1:
            raise ValueError(f"max_gain must be at least 1, got {max_gain}.")
        power, power_of_decoded = 0.0, 0.0
        for pixel_values in batches:
            decoded = self.decode(self.encode(pixel_values))
            # On the CPU: not every device has float64.
            power = power + torch.fft.rfft2(pixel_values.cpu().double()).abs().square().sum(0)
            power_of_decoded = power_of_decoded + torch.fft.rfft2(decoded.cpu().double()).abs().square().sum(0)
        if not torch.is_tensor(power):
            raise ValueError("match_spectrum got no images: pass at least one batch.")
        if not self.config.matched_spectrum:
            self._register_spectrum_gain()
            self.config.matched_spectrum = True
        smallest = torch.finfo(torch.float64).tiny  # a frequency that neither has keeps a gain of 0
        gain = (power / power_of_decoded.clamp(min=smallest)).sqrt().clamp(max=max_gain)
        self.spectrum_gain = gain.to(next(self.encoder.parameters()))

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool = True, return_loss: bool = True
    ) -> VAEPlusAutoencoderOutput | tuple:
        """Encode, decode and measure: `pixel_values` as in `encode`.

        `return_loss` also tells the `Trainer` that there is a loss without labels.
        """
        code = self.encode(pixel_values)
        reconstruction = self.decode(code)
        loss = sum_of_squares(reconstruction, pixel_values).mean() if return_loss else None
        output = VAEPlusAutoencoderOutput(loss=loss, reconstruction=reconstruction, code=code)
        return output if return_dict else output.to_tuple()


class VAEPlusVAEModel(VAEPlusPreTrainedModel):
    """Gaussian VAE with an affine skip connection (Eq. 5) and a decoder variance gamma that is learned (Eq. 3).

    Example:
        >>> model = VAEPlusVAEModel(VAEPlusVAEConfig(input_shape=(64,), latent_dim=64, reconstruction_space="image"))
        >>> output = model(code, targets=images, target_decoder=autoencoder.decode)
        >>> output.loss.backward()
        >>> z = model.encode(code).sample()
        >>> code = model.decode(z)
    """

    config_class = VAEPlusVAEConfig
    main_input_name = "inputs"

    def __init__(self, config: VAEPlusVAEConfig):
        super().__init__(config)
        latent_dim, encoder_blocks = config.latent_dim, config.encoder_blocks or config.num_blocks
        convolutions = config.network in ("conv", "aggregate")
        # What the MLP, or the affine map, works on: the inputs themselves or the code of the convolutions.
        inner_dim = config.code_dim if config.network == "aggregate" else config.input_dim
        self.condition_features = None if config.condition is None else ConditionFeatures(config)
        if config.network == "affine":
            self.encoder = nn.Linear(inner_dim, latent_dim)  # mu_z = W_z x + b_z
            self.logvar = nn.Parameter(torch.zeros(latent_dim))  # log s^2, the same for every x
            self.decoder = nn.Linear(latent_dim, inner_dim)  # mu_x = W_x z + b_x
        elif config.network == "conv":
            shape = config.input_shape[:2]
            self.encoder = ConvEncoder(config, *shape, 2 * latent_dim, config.num_conv_blocks)
            self.decoder = ConvDecoder(config, *shape, latent_dim, config.num_conv_blocks)
        else:
            dims = [dim + config.condition_width for dim in (inner_dim, latent_dim)]
            self.encoder = MLP(dims[0], config.hidden_dim, 2 * latent_dim, encoder_blocks, config.encoder_residual)
            self.decoder = MLP(dims[1], config.hidden_dim, inner_dim, config.num_blocks, config.decoder_residual)
        self.image_decoder = None
        if config.network == "aggregate":
            shape = *config.input_shape[:2], inner_dim, config.num_conv_blocks
            self.encoder = nn.Sequential(*ConvEncoder(config, *shape), *self.encoder)
            self.image_decoder = ConvDecoder(config, *shape)
            start_at_zero(self.image_decoder[-2])
        has_skip = config.affine_skip and config.network != "affine"  # an affine decoder is its own skip
        self.affine_skip = nn.Linear(latent_dim, inner_dim) if has_skip else None

        if config.network != "affine":
            start_at_zero(self.encoder[-1], first_row=latent_dim)
            self.decoder[0].init_scale = config.latent_init_scale
        if has_skip:
            self.affine_skip.init_scale = config.latent_init_scale
            start_at_zero(self.decoder[-2] if config.network == "conv" else self.decoder[-1])

        # Statistics of the inputs, so that the networks see standardised values while losses keep the inputs' units.
        statistics_shape = (config.input_shape[0], 1, 1) if convolutions else config.input_shape
        self.register_buffer("input_mean", torch.zeros(statistics_shape))
        self.register_buffer("input_std", torch.ones(statistics_shape))

        log_gamma = torch.zeros(())
        if config.gamma == "learned":
            self.log_gamma = nn.Parameter(log_gamma)
        else:  # a frozen Parameter would come back from a checkpoint trainable
            self.register_buffer("log_gamma", log_gamma)
        if config.gamma == "analytic":
            self.register_buffer("gamma_updates", torch.zeros((), dtype=torch.long))
        if config.reconstruction_space == "pullback":
            self.register_buffer("metric_root", torch.zeros(config.input_dim, config.input_dim))
            self.register_buffer("error_floor", torch.zeros(()))
        if config.matched_moments:
            self._register_sample_map(config.input_dim)
        self.post_init()

    def _register_sample_map(self, dim: int):
        """`sample` is sample_scale @ mean + sample_noise @ noise + sample_shift."""
        for name in ("sample_scale", "sample_noise"):
            self.register_buffer(name, torch.zeros(dim, dim))
        self.register_buffer("sample_shift", torch.zeros(dim))

    def _init_own_weights(self):
        init.constant_(self.log_gamma, math.log(self.config.gamma_init))
        if self.config.gamma == "analytic":
            init.zeros_(self.gamma_updates)
        init.zeros_(self.input_mean)
        init.ones_(self.input_std)
        if self.config.network == "affine":
            init.zeros_(self.logvar)
        if self.config.reconstruction_space == "pullback":
            init.eye_(self.metric_root)
            init.zeros_(self.error_floor)
        if self.config.matched_moments:
            init.eye_(self.sample_scale)
            init.zeros_(self.sample_noise)
            init.zeros_(self.sample_shift)

    @property
    def decoder_log_variance(self) -> torch.Tensor:
        """log gamma as the likelihood uses it, of shape `()`: float32, and at least log(min_gamma) unless fixed."""
        if self.config.gamma == "fixed":
            return self.log_gamma
        floor = math.log(self.config.min_gamma)
        return self.log_gamma + (floor - self.log_gamma).clamp(min=0).detach()  # keeps the gradient below the floor

    @property
    def _weight_dtype(self) -> torch.dtype:
        return self.input_mean.dtype  # `self.dtype` may find `log_gamma`, which stays float32

    def set_input_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Standardise inputs by `mean` and `std`, of one input's shape (convolutions: `(channels, 1, 1)`).

        Raises:
            ValueError: wrong shape, or a standard deviation that is not positive and finite.
        """
        for name, value, buffer in (("mean", mean, self.input_mean), ("std", std, self.input_std)):
            if value.shape != buffer.shape:
                raise ValueError(f"{name} must have shape {tuple(buffer.shape)}, got {tuple(value.shape)}.")
        if not bool(((std > 0) & std.isfinite() & mean.isfinite()).all()):
            raise ValueError(
                "std must be positive and finite and mean finite: drop constant inputs or floor their std."
            )
        self.input_mean.copy_(mean)
        self.input_std.copy_(std)

    def set_pullback_metric(self, metric: torch.Tensor, error_floor: float) -> None:
        """Measure errors of codes as the images see them: error_floor + (mean - target)^T metric (mean - target).

        Args:
            metric (`torch.Tensor` of shape `(dim, dim)`): of [`VAEPlusAutoencoderModel.pullback_metric`], positive
                semi-definite.
            error_floor (`float`): squared error per image of the autoencoder alone.

        Raises:
            ValueError: a VAE of another `reconstruction_space`, a wrong shape, or no metric.
        """
        if self.config.reconstruction_space != "pullback":
            raise ValueError(
                f"a VAE with reconstruction_space={self.config.reconstruction_space!r} has no metric: use 'pullback'."
            )
        if metric.shape != self.metric_root.shape:
            raise ValueError(f"metric must have shape {tuple(self.metric_root.shape)}, got {tuple(metric.shape)}.")
        if not (metric.isfinite().all() and 0 <= error_floor < math.inf):
            raise ValueError(f"metric and error_floor must be finite, the latter not negative, got {error_floor}.")
        values, axes = torch.linalg.eigh(metric.cpu().double())
        if not values[-1] > 0 or values[0] < -1e-6 * values[-1]:
            raise ValueError(
                f"a metric has eigenvalues of at least 0, got some from {values[0]:.3g} to {values[-1]:.3g}."
            )
        self.metric_root.copy_(axes * values.clamp(min=0).sqrt())
        self.error_floor.fill_(error_floor)

    def _pullback_error(self, code: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        # The difference of two codes is small beside them: no half precision from here on.
        with torch.autocast(code.device.type, enabled=False):
            pixels = (_upcast(code) - _upcast(target)) @ _upcast(self.metric_root)
            return _upcast(self.error_floor) + sum_of_squares(pixels, torch.zeros_like(pixels))

    def encode(self, inputs: torch.Tensor, condition: torch.Tensor | None = None) -> GaussianPosterior:
        """q(z|x), with float32 `mean` and `logvar` `(batch, latent_dim)`, of inputs `(batch, *input_shape)`.

        Args:
            condition (`torch.Tensor`, *optional*): here and below, of each input what
                [`VAEPlusConditionalConfig.to_condition`] returns. A conditional model takes none for the null class.

        Raises:
            ValueError: wrong shape, or integers instead of floats.
        """
        _check_shape("inputs", inputs, self.config.input_shape)
        hidden = (inputs.to(self._weight_dtype) - self.input_mean) / self.input_std
        if self.config.network in ("mlp", "affine"):
            hidden = hidden.flatten(1)
        features = self._features_of(condition, hidden)
        if features is not None:
            hidden = torch.cat([hidden, features], dim=1)
        if self.config.network == "affine":
            mean = _upcast(self.encoder(hidden))
            logvar = _upcast(self.logvar).expand_as(mean)
        else:
            mean, logvar = _upcast(self.encoder(hidden)).chunk(2, dim=1)
        # Beyond these bounds exp() loses all float32 meaning; the gradient passes, so that there is a way back.
        return GaussianPosterior(mean, logvar + (logvar.clamp(-30, 20) - logvar).detach())

    def decode(self, latents: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Decoder mean f(z) + W z + b (Eq. 5) at latents of shape `(batch, latent_dim)`: `(batch, *input_shape)`.

        Raises:
            ValueError: wrong shape, or integers instead of floats.
        """
        _check_shape("latents", latents, (self.config.latent_dim,))
        latents = latents.to(self._weight_dtype)
        features = self._features_of(condition, latents)
        mean = self.decoder(latents if features is None else torch.cat([latents, features], dim=1))
        if self.affine_skip is not None:
            mean = mean + self.affine_skip(latents).reshape_as(mean)
        if self.image_decoder is not None:
            mean = self.image_decoder(mean)
        return mean.reshape(-1, *self.config.input_shape) * self.input_std + self.input_mean

    def sample(
        self, latents: torch.Tensor, noise: torch.Tensor, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Inputs that the model makes up: N(decode(u), gamma I) or, after `match_moments`, its affine map of them.

        Args:
            latents (`torch.Tensor` of shape `(batch, latent_dim)`): u, standard normal.
            noise (`torch.Tensor` of shape `(batch, *input_shape)`): standard normal, independent of the latents.

        Returns:
            float32 `torch.Tensor` of shape `(batch, *input_shape)`.

        Raises:
            ValueError: wrong shapes, or integers instead of floats.
        """
        _check_shape("noise", noise, self.config.input_shape)
        mean = _upcast(self.decode(latents, condition))
        noise = noise.to(mean)
        if not self.config.matched_moments:
            return mean + (0.5 * self.decoder_log_variance).exp() * noise
        scale, noise_scale, shift = map(_upcast, (self.sample_scale, self.sample_noise, self.sample_shift))
        return mean @ scale.T + noise @ noise_scale.T + shift

    def log_prob_bound(
        self, inputs: torch.Tensor, noise: torch.Tensor, condition: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Importance-weighted bound of log p(x), which approaches it from below (Burda et al. 2016, Eq. 8).

        p is the VAE's own model, the mean over u of N(x | decode(u), gamma I). After `match_moments` samples are drawn
        from another one, which has no density where they take no noise.

        Args:
            inputs (`torch.Tensor` of shape `(batch, *input_shape)`): x; of a second stage, z.
            noise (`torch.Tensor` of shape `(K, batch, latent_dim)`): standard normal.

        Returns:
            float32 `torch.Tensor` of shape `(batch,)`: nats.

        Raises:
            ValueError: wrong shapes, or a gamma that is not a variance of the inputs.
        """
        if self.config.gamma_is_of_images:
            raise ValueError("log_prob_bound needs a gamma of the inputs, and this one was measured on images.")
        posterior = self.encode(inputs, condition)
        if noise.ndim != 3 or noise.shape[1:] != posterior.mean.shape:
            raise ValueError(f"noise must have shape (K, {', '.join(map(str, posterior.mean.shape))}), got"
                             f" {tuple(noise.shape)}.")  # fmt: skip
        latents = posterior.sample(noise)
        conditions = None if condition is None else condition.expand(len(noise), *condition.shape).flatten(0, 1)
        means = self.decode(latents.flatten(0, 1), conditions).reshape(len(noise), *inputs.shape)
        squared_error = (_upcast(inputs) - _upcast(means)).square().flatten(2).sum(2)
        nll = gaussian_nll(squared_error, self.config.input_dim, self.decoder_log_variance)
        # log N(u | 0, I) - log q(u | x) with u = mean + sigma eps: the 2 pi's cancel
        log_ratio = 0.5 * (noise.square() + posterior.logvar - latents.square()).sum(2)
        return (log_ratio - nll).logsumexp(0) - math.log(len(noise))

    @torch.no_grad()
    def match_moments(
        self,
        mean: torch.Tensor,
        covariance: torch.Tensor,
        generator: torch.Generator | None = None,
        num_samples: int = 50_000,
        min_explained: float = 0.1,
        conditions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """After training, give the samples of a second stage the mean and the covariance of what it models, q(z).

        With C = `covariance` and C^-1/2 Cov[decode(u)] C^-1/2 = V diag(rho) V^T, rho_i is the share of the variance
        along direction i that the decoder mean explains. Where that is at least `min_explained`, the mean is stretched
        by rho_i^-1/2 and takes no noise; elsewhere it stays, and noise of variance 1 - rho_i fills it up. On faces,
        the less noise the better (docs/paper.md): noise leaves the manifold of the data, a stretched mean does not.

        Args:
            mean (`torch.Tensor` of shape `(dim,)`), covariance (`torch.Tensor` of shape `(dim, dim)`): of q(z).
                Variances below 1e-12 of the largest count as that.
            generator (`torch.Generator`, *optional*): on the CPU, draws the u by which Cov[decode(u)] is measured.
            num_samples (`int`): how many of them; more than `dim`.
            min_explained (`float`): in (0, 1]; the stretch is at most its inverse square root.
            conditions (`torch.Tensor`, *optional*): of the training data, n of them, of which each u gets one.

        Returns:
            `torch.Tensor` of shape `(dim,)`: rho in rising order, float64 on the CPU.

        Raises:
            ValueError: inputs that are no vectors, wrong shapes, numbers out of range, or moments that are not those
                of a distribution.
        """
        dim = self.config.input_dim
        if self.config.input_shape != (dim,):
            raise ValueError(f"match_moments is for VAEs of vectors, not of inputs {self.config.input_shape}.")
        for name, value, shape in (("mean", mean, (dim,)), ("covariance", covariance, (dim, dim))):
            if value.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}.")
        if num_samples <= dim:
            raise ValueError(f"num_samples must exceed the {dim} dimensions, got {num_samples}.")
        if not 0 < min_explained <= 1:
            raise ValueError(f"min_explained must lie in (0, 1], got {min_explained}.")
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("mean and covariance must be finite: the latents that they are of are not.")
        variances, axes = torch.linalg.eigh(covariance.cpu().double())
        if not variances[-1] > 0 or variances[0] < -1e-6 * variances[-1]:
            low, high = float(variances[0]), float(variances[-1])
            raise ValueError(f"a covariance has positive eigenvalues, but this has some from {low:.3g} to {high:.3g}.")
        variances = variances.clamp(min=1e-12 * float(variances[-1]))
        root, inverse_root = (axes * variances.sqrt()) @ axes.T, (axes / variances.sqrt()) @ axes.T
        device = self.input_mean.device
        drawn = torch.randn(num_samples, self.config.latent_dim, generator=generator).split(1_000)
        given = [None] * len(drawn)
        if conditions is not None:
            rows = torch.randint(len(conditions), (num_samples,), generator=generator)
            given = [conditions[part].to(device) for part in rows.split(1_000)]
        pairs = zip(drawn, given, strict=True)
        means = torch.cat([self.decode(latents.to(device), each).cpu().double() for latents, each in pairs])
        explained, directions = torch.linalg.eigh(inverse_root @ torch.cov(means.T).reshape(dim, dim) @ inverse_root)
        explained = explained.clamp(min=0)
        stretched = explained >= min_explained
        stretch = torch.where(stretched, explained.clamp(min=min_explained).rsqrt(), 1)
        missing = torch.where(stretched, 0, 1 - explained).sqrt()
        scale = root @ (directions * stretch) @ directions.T @ inverse_root
        if not self.config.matched_moments:
            self._register_sample_map(dim)
            self.config.matched_moments = True
        self.sample_scale = scale.to(self.input_mean)
        self.sample_noise = (root @ (directions * missing)).to(self.input_mean)
        self.sample_shift = (mean.cpu().double() - scale @ means.mean(0)).to(self.input_mean)
        return explained

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor | None = None,
        target_decoder: Callable[[torch.Tensor], torch.Tensor] | None = None,
        noise: torch.Tensor | None = None,
        kl_weight: float = 1.0,
        return_dict: bool = True,
        return_loss: bool = True,
        condition: torch.Tensor | None = None,
    ) -> VAEPlusVAEOutput | tuple:
        """The negative ELBO (Eq. 2) with one sample of z, in one pass that DistributedDataParallel synchronises.

        Args:
            inputs (`torch.Tensor` of shape `(batch, *input_shape)`).
            targets (`torch.Tensor`, *optional*): what the decoder mean is compared with; the inputs if not given.
            target_decoder (callable, *optional*): with `reconstruction_space="image"`, the frozen map from inputs to
                images, `autoencoder.decode`; the data term becomes ||targets - target_decoder(decode(z))||^2.
            noise (`torch.Tensor` of shape `(batch, latent_dim)`, *optional*): standard normal; drawn if not given.
            kl_weight (`float`): weight of the KL term, below 1 during a warm-up.
            return_loss (`bool`): without it only reconstruction and posterior are computed. It also tells the
                `Trainer` that there is a loss without labels.
            condition (`torch.Tensor`, *optional*): see `encode`.

        Raises:
            ValueError: wrong shapes, or a target decoder that contradicts `config.reconstruction_space`.
        """
        if (self.config.reconstruction_space == "image") != (target_decoder is not None):
            given = "no" if target_decoder is None else "a"
            raise ValueError(
                f"reconstruction_space={self.config.reconstruction_space!r} and {given} target_decoder: 'image' needs"
                " a target_decoder and targets, the others take none."
            )
        if targets is not None and not targets.is_floating_point():
            raise ValueError(f"targets must be floats (pixels in [0, 1]), got {targets.dtype}.")
        if target_decoder is not None and targets is None:
            raise ValueError("a target_decoder needs targets: pass the images that the inputs are codes of.")
        posterior = self.encode(inputs, condition)
        if noise is not None and noise.shape != posterior.mean.shape:
            raise ValueError(f"noise must have shape {tuple(posterior.mean.shape)}, got {tuple(noise.shape)}.")
        reconstruction = self.decode(posterior.sample(noise), condition)
        if target_decoder is not None:
            reconstruction = target_decoder(reconstruction)
        parts = dict(reconstruction=reconstruction, posterior_mean=posterior.mean, posterior_logvar=posterior.logvar)
        if not return_loss:
            output = VAEPlusVAEOutput(**parts)
            return output if return_dict else output.to_tuple()
        targets = inputs if targets is None else targets
        if self.config.reconstruction_space == "pullback":
            squared_error, num_dims = self._pullback_error(reconstruction, targets), self.config.target_dim
        else:
            squared_error, num_dims = sum_of_squares(reconstruction, targets), math.prod(targets.shape[1:])
        if self.config.gamma == "analytic" and self.training:
            self._track_gamma(squared_error.detach().mean() / num_dims)
        log_gamma = self.decoder_log_variance
        nll = gaussian_nll(squared_error, num_dims, log_gamma).mean()
        kl = posterior.kl().sum(1).mean()
        output = VAEPlusVAEOutput(
            loss=nll + kl_weight * kl,
            nll=nll,
            kl=kl,
            squared_error=squared_error.mean(),
            gamma=log_gamma.detach().exp(),
            active_units=(posterior.logvar.detach().exp().mean(0) < 0.5).sum().float(),
            **parts,
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def _track_gamma(self, mean_squared_error: torch.Tensor):
        """gamma* = E||x - mu||^2 / d, where d/dgamma of Eq. (3) vanishes, as a running mean over all processes.

        The mean is taken of log gamma*: between ordinary batches that makes no difference, but one batch on which the
        decoder explodes does not set gamma for the next thousand.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean_squared_error)
            mean_squared_error /= torch.distributed.get_world_size()
        # The running mean starts at the first error and forgets fast while the error falls fast.
        momentum = (self.gamma_updates / (self.gamma_updates + 10)).clamp(max=self.config.gamma_momentum)
        bounds = math.log(self.config.min_gamma), math.log(self.config.max_gamma or math.inf)
        log_gamma = momentum * self.log_gamma + (1 - momentum) * mean_squared_error.log().clamp(*bounds)
        # An error that is not finite shows in the loss, which stops the training; it must not poison the state.
        finite = mean_squared_error.isfinite()
        self.log_gamma.copy_(torch.where(finite, log_gamma, self.log_gamma))
        self.gamma_updates += finite


class VAEPlusEncoderModel(VAEPlusPreTrainedModel):
    """From images to features, for `transformers.pipeline("image-feature-extraction")` and the like.

    Joins two stages of a pipeline and has no weights of its own: what it saves and loads are their folders, so that a
    saved `VAEPlusPipeline` with this model's `config.json` beside its index is a saved encoder as well.

    Args:
        autoencoder ([`VAEPlusAutoencoderModel`], *optional*), vae ([`VAEPlusVAEModel`], *optional*): at least one.

    Raises:
        ValueError: neither of them, or a VAE that does not take what precedes it.

    Example:
        >>> model = VAEPlusEncoderModel(pipe.autoencoder, pipe.vae)
        >>> features = model(images).features  # (batch, 3, 64, 64) in [0, 1] -> (batch, latent_dim)
    """

    config_class = VAEPlusEncoderConfig
    main_input_name = "pixel_values"

    def __init__(self, autoencoder: VAEPlusAutoencoderModel | None = None, vae: VAEPlusVAEModel | None = None):
        stages = {"autoencoder": autoencoder, "vae": vae}
        super().__init__(VAEPlusEncoderConfig(stages=[name for name, stage in stages.items() if stage is not None]))
        self.autoencoder, self.vae = autoencoder, vae
        if autoencoder is not None and vae is not None and vae.config.input_shape != (autoencoder.config.latent_dim,):
            raise ValueError(
                f"the vae has input_shape={vae.config.input_shape} but the autoencoder's codes have"
                f" {autoencoder.config.latent_dim} numbers: use the vae that was trained on these codes."
            )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args,
        config: VAEPlusEncoderConfig | None = None,
        subfolder: str = "",
        **kwargs,
    ) -> "VAEPlusEncoderModel":
        """Load the stages that `config.json` names, each as [`VAEPlusPreTrainedModel.from_pretrained`] does."""
        if config is None:
            where = ("cache_dir", "force_download", "local_files_only", "revision", "token")
            options = {name: kwargs[name] for name in where if name in kwargs}
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **options)
        classes = {"autoencoder": VAEPlusAutoencoderModel, "vae": VAEPlusVAEModel}
        loaded = {}
        for stage in config.stages:
            folder = f"{subfolder}/{stage}" if subfolder else stage
            loaded[stage] = classes[stage].from_pretrained(
                pretrained_model_name_or_path, *args, subfolder=folder, **kwargs
            )
        model = cls(**loaded).eval()
        model.config = config
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save `config.json`, and each stage in its folder with the options of `PreTrainedModel.save_pretrained`."""
        self.config.save_pretrained(save_directory)
        for stage in self.config.stages:
            getattr(self, stage).save_pretrained(os.path.join(save_directory, stage), **kwargs)

    def forward(self, pixel_values: torch.Tensor, return_dict: bool = True) -> VAEPlusEncoderOutput | tuple:
        """Features of images: floats in [0, 1] of the shape that the first stage takes.

        Raises:
            ValueError: wrong shape, or integers instead of floats.
        """
        inputs = pixel_values if self.autoencoder is None else self.autoencoder.encode(pixel_values)
        if self.vae is None:
            output = VAEPlusEncoderOutput(features=inputs)
        else:
            posterior = self.vae.encode(inputs)
            output = VAEPlusEncoderOutput(features=posterior.mean, logvar=posterior.logvar)
        return output if return_dict else output.to_tuple()


@contextlib.contextmanager
def one_form_of_weights(folder: Path, variant: str | None = None) -> Iterator[None]:
    """Weights that are written to `folder` in here replace those there, be they in one file or in shards.

    Whatever reads a model prefers the one file, so the older form goes only when the newer one is complete.
    """
    infix = f".{variant}" if variant else ""
    whole, index = folder / f"model{infix}.safetensors", folder / f"model.safetensors.index{infix}.json"
    if whole.exists():
        index.unlink(missing_ok=True)  # nothing has read it
    older = whole if whole.exists() else index
    yield
    if whole.exists() and index.exists():
        older.unlink()
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.exists() else ()
    for shard in folder.glob(f"model{infix}-?????-of-?????.safetensors"):
        if shard.name not in shards:
            shard.unlink()


def _check_shards(folder: str):
    """Refuse an index of weights in a local folder that names anything but safetensors files beside it."""
    for path in sorted(Path(folder).glob("*.safetensors.index*.json")):
        try:
            names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): save or download the model again.") from error
        for name in names:
            if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
                raise ValueError(
                    f"{path} names {str(name)[:100]!r}, expected safetensors files beside it: nothing else is opened."
                )


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    """float32, or float64 as it is: losses are never summed in half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _is_number(value) -> bool:
    return value is None or isinstance(value, Real)


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]):
    if tensor.shape[1:] != shape or not tensor.is_floating_point():
        expected = ", ".join(map(str, ("batch", *shape)))
        raise ValueError(
            f"{name} must be floats of shape ({expected}), got {tensor.dtype} of shape {tuple(tensor.shape)}."
        )


__all__ = [
    "ConditionFeatures",
    "GaussianPosterior",
    "VAEPlusAutoencoderConfig",
    "VAEPlusAutoencoderModel",
    "VAEPlusAutoencoderOutput",
    "VAEPlusConditionalConfig",
    "VAEPlusConfig",
    "VAEPlusEncoderConfig",
    "VAEPlusEncoderModel",
    "VAEPlusEncoderOutput",
    "VAEPlusPreTrainedModel",
    "VAEPlusVAEConfig",
    "VAEPlusVAEModel",
    "VAEPlusVAEOutput",
    "gaussian_nll",
    "sum_of_squares",
]


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
