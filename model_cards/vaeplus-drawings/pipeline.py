"""VAE+ pipeline: noise -> images in one pass, images -> posteriors and back, and log-likelihoods.

From "On the Regularization Balance in Autoencoder-Based Generative Models" (VAE+), Section 4. This file imports
nothing of the package: an exported Hub repository carries it as `pipeline.py`, word for word. The subclass that the
package itself offers (hub/pipeline.py) adds safe loading and uploads.

    sampling  u -> `second_stage` -> z -> `vae` -> code -> `autoencoder` -> image (-> `detail`)
    encoding  image -> `autoencoder` -> code -> `vae` -> posterior over z

Without an autoencoder the VAE works on pixels; without a second stage z is drawn from N(0, I). Without a VAE the
second stage makes the autoencoder's codes, and there are no posteriors. Inference only: what comes out is float32 and
lies on the CPU, whatever the device and the precision of the models.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

Picture = Image.Image | str | os.PathLike | np.ndarray | torch.Tensor
Images = Picture | list[Picture] | tuple[Picture, ...]
ImagesOut = list[Image.Image] | np.ndarray | torch.Tensor
ClassLabels = int | str | list[int | str | None] | np.ndarray | torch.Tensor | None
Conditions = Mapping[str, float] | list[Mapping[str, float] | list[float]] | np.ndarray | torch.Tensor | None
Generators = torch.Generator | list[torch.Generator] | tuple[torch.Generator, ...] | None

# Component: each `config.model_type` (a class loaded from a Hub repository is not the installed one) and its class.
COMPONENTS = {
    "autoencoder": {"vaeplus_autoencoder": "VAEPlusAutoencoderModel"},
    "vae": {"vaeplus_vae": "VAEPlusVAEModel"},
    "second_stage": {
        "vaeplus_vae": "VAEPlusVAEModel",
        "vaeplus_flow_matching": "VAEPlusFlowMatchingModel",
        "vaeplus_coupling_flow": "VAEPlusCouplingFlowModel",
        "vaeplus_mixture": "VAEPlusMixtureModel",
    },
    "detail": {"vaeplus_detail": "VAEPlusDetailModel"},
}


class Posterior(Protocol):
    """`GaussianPosterior` of modeling_vaeplus.py, which this file cannot import."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def sample(self, noise: torch.Tensor | None = None, generator: torch.Generator | None = None) -> torch.Tensor: ...
    def mode(self) -> torch.Tensor: ...
    def kl(self) -> torch.Tensor: ...
    def log_prob(self, latents: torch.Tensor) -> torch.Tensor: ...


@dataclass
class VAEPlusScores(BaseOutput):
    """How well a model fits each of n images, and how usual it finds them. Tensors are float32 on the CPU.

    Args:
        log_likelihood (`torch.Tensor` of shape `(n,)`): lower bound of log p(x) by `num_importance_samples` samples,
            in nats per image, of the density of pixels in [0, 1]. `None` if the model has no likelihood of images.
        bits_per_dimension (`torch.Tensor` of shape `(n,)`): the same in bits for each pixel value, as in
            `VAEPlusPipeline.log_likelihood`: less is better. `None` as well.
        squared_error (`torch.Tensor` of shape `(n,)`): sum over the pixel values in [0, 1] of the squared difference
            between image and reconstruction.
        latent_distance (`torch.Tensor` of shape `(n,)`): how far the posterior mean lies from the aggregate posterior,
            measured as `latent_distance_is` says.
        latent_distance_is (`str`): `"mahalanobis"`, the length of the mean, its Mahalanobis distance under N(0, I); or
            `"negative_log_density"`, minus the second stage's log density of the mean, in nats.
        num_importance_samples (`int`): of the bound; prior (`str`): p(z) in it, as in `log_importance_weights`.
    """

    log_likelihood: torch.Tensor | None
    bits_per_dimension: torch.Tensor | None
    squared_error: torch.Tensor
    latent_distance: torch.Tensor
    latent_distance_is: str
    num_importance_samples: int
    prior: str


class VAEPlusPipeline(DiffusionPipeline):
    """Samples, encodes, reconstructs, interpolates and scores images with the stages of VAE+.

    Args:
        vae (`VAEPlusVAEModel`, *optional*): the first VAE, of codes or, without an autoencoder, of pixels. Without
            it a second stage of the autoencoder's codes is needed; such a pipeline samples and decodes alone.
        autoencoder (`VAEPlusAutoencoderModel`, *optional*): between images and codes.
        second_stage (`VAEPlusVAEModel` or a model of modeling_priors.py, *optional*): of the first VAE's latents, a
            model of the aggregate posterior q(z).
        detail (`VAEPlusDetailModel`, *optional*): draws what the mean of the autoencoder's decoder leaves out. Samples
            have it unless `deterministic=True`; the other methods return the mean unless `deterministic=False`.
            Posteriors, squared errors and likelihoods are those of the mean in any case.

    Images are accepted by every method as pictures of any size: PIL images, paths of files, numpy `(H, W)`,
    `(H, W, C)` or `(n, H, W, C)`, torch `(C, H, W)` or `(n, C, H, W)`, and lists or tuples of them. Arrays are floats
    in [0, 1] or uint8. `image_processor` makes of them what the models were trained on: it crops, converts and
    resizes, and rounds floats to 8 bits. Arrays and tensors that have the shape of the model's images already are
    taken as they are. With `preprocess=False` every image must have that shape, and files are not read.

    `output_type` is `"pil"` (a list), `"np"` (float32 array `(n, H, W, C)` in [0, 1]) or `"pt"` (float32 tensor
    `(n, C, H, W)` in [0, 1]). `decode_batch_size` is the number of images that are decoded at a time, which bounds the
    memory.

    Raises:
        TypeError: a component of another class.
        ValueError: components whose dimensions or settings do not fit together.

    Example:
        >>> pipe = VAEPlusPipeline.from_pretrained("folder-or-repository")
        >>> images = pipe(num_images=4, generator=torch.Generator().manual_seed(0)).images
        >>> posterior = pipe.encode(images)
        >>> nats = pipe.log_likelihood("photograph.jpg")
    """

    model_cpu_offload_seq = "second_stage->vae->autoencoder->detail"
    _image_processor: BaseImageProcessor | None = None
    _optional_components = ["vae", "autoencoder", "second_stage", "detail"]

    def __init__(
        self,
        vae: PreTrainedModel | None = None,
        autoencoder: PreTrainedModel | None = None,
        second_stage: PreTrainedModel | None = None,
        detail: PreTrainedModel | None = None,
    ):
        super().__init__()
        components = {"autoencoder": autoencoder, "vae": vae, "second_stage": second_stage, "detail": detail}
        for name, component in components.items():
            if component is None and name in self._optional_components:
                continue
            classes = COMPONENTS[name]
            if getattr(getattr(component, "config", None), "model_type", None) not in classes:
                expected = " or ".join(classes.values())
                raise TypeError(f"{name} must be a {expected}, got {type(component).__name__}.")
        _check_dimensions(
            None if vae is None else vae.config,
            None if autoencoder is None else autoencoder.config,
            None if second_stage is None else second_stage.config,
        )
        if detail is not None:
            _check_detail(detail.config, None if autoencoder is None else autoencoder.config)
        self.register_modules(**components)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of one image."""
        if self.autoencoder is None:
            return self.vae.config.input_shape
        config = self.autoencoder.config
        return (config.num_channels, config.image_size, config.image_size)

    @property
    def image_processor(self) -> BaseImageProcessor:
        """What makes pictures of any size into images of this pipeline, as in training: that of the stored pipeline.

        Raises:
            ValueError: there is none.
        """
        if self._image_processor is None:
            # In a repository this file runs because the user trusts it, and so does the processor beside it. diffusers
            # keeps the commit of a download in its path alone.
            is_of_repository = __name__.startswith("diffusers_modules")
            first = next(component for component in self.components.values() if component is not None)
            commit = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", first.name_or_path)
            where = dict(revision=commit[1]) if commit else {}
            try:
                found = AutoImageProcessor.from_pretrained(
                    self.name_or_path, trust_remote_code=is_of_repository, **where
                )
            except (OSError, ValueError, TypeError) as error:
                raise ValueError(
                    f"this pipeline has no image processor ({error}): set pipe.image_processor, or pass images of"
                    f" shape {self.image_shape} and preprocess=False."
                ) from error
            self._image_processor = found
        return self._image_processor

    @image_processor.setter
    def image_processor(self, processor: BaseImageProcessor | None) -> None:
        self._image_processor = processor

    @property
    def _latent_dim(self) -> int:
        """Number of dimensions of what is decoded: z or, without a VAE, a code."""
        return (self.autoencoder if self.vae is None else self.vae).config.latent_dim

    def need_vae(self, what: str) -> None:
        """Raises ValueError for a pipeline without a first VAE, which has no `what`."""
        if self.vae is None:
            raise ValueError(
                f"this pipeline has no first VAE, so it has no {what}: it can sample and decode codes alone."
            )

    @torch.no_grad()
    def __call__(
        self,
        num_images: int | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        temperature: float = 1.0,
        sharpness: float = 0.0,
        decode_batch_size: int = 64,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        deterministic: bool = False,
        detail_temperature: float | None = None,
        class_labels: ClassLabels = None,
        conditions: Conditions = None,
        guidance_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple[ImagesOut]:
        """Sample images (Section 4): u ~ N(0, I), z = second_stage.sample(u), image = mean of the decoders at z.

        With a `detail` model the image is a draw around this mean.

        All noise is drawn before the first batch, so a sample does not depend on `decode_batch_size`; with one
        generator per image it does not depend on the other images either. Noise is drawn where its generator is, in
        float32, so a seed gives the same noise for models on every device and in every precision.

        Args:
            num_images (`int`, *optional*): number of images; as many as `latents`, or 1, if not given.
            generator (`torch.Generator` or a list or tuple of one per image, *optional*): source of all noise, first
                u, then that of z, then that of the detail.
            latents (`torch.Tensor` of shape `(num_images, dim)`, *optional*): standard normal noise to use instead of
                drawing u; `dim` is the `latent_dim` of the second stage or, without one, of the VAE.
            temperature (`float`): factor on all noise, `latents` included; 0 gives the image at the centre.
            sharpness (`float`): 0 for the decoder's mean; at 1 its power spectrum is that of real images (see
                `VAEPlusAutoencoderModel.sharpen`).
            decode_batch_size (`int`), output_type (`"pil" | "np" | "pt"`): see the class.
            return_dict (`bool`): an `ImagePipelineOutput`, or the tuple `(images,)`.
            batch_size (`int`, *optional*): another name of `num_images`, the one in diffusers.
            num_inference_steps (`int`, *optional*): of a second stage by flow matching: solve its ODE in so many steps
                of Heun's method, of two passes each, in place of the one pass that it was distilled to.
            deterministic (`bool`): the decoder's mean, without detail; needed with `sharpness`, which sharpens a mean.
            detail_temperature (`float`, *optional*): one more factor on the noise of the detail: below 1 it is calmer.
                Default: the `temperature` of the detail model's config.
            class_labels (`int`, `str` or a list, array or tensor of them, *optional*): of a second stage that was
                trained on classes: ids or names of `second_stage.config.id2label`, one for each image. `None`, also in
                a list, stands for all classes. If `num_images` is a multiple of them, they are taken in turn.
            conditions (`dict`, or list, array or tensor of shape `(num_images, number of names)`, *optional*): of a
                second stage that was trained on attributes or factors: their values in the order of `id2label`, or
                some of them by name. `None` and NaN stand for values that are not given.
            guidance_scale (`float`): of conditional flow matching: above 1 the images become more typical of their
                condition and less diverse. Such images take the ODE, of twice as many passes.

        Raises:
            TypeError: latents or generators of another type.
            ValueError: a number out of range, latents of wrong shape, not finite or too large for the decoder, an
                option for another second stage, or a condition that the second stage does not know.
        """
        _check_output_type(output_type)
        temperature = _check_factor("temperature", temperature)
        sharpness = self._check_sharpness(sharpness, deterministic)
        detail_temperature = self._detail_factor(detail_temperature)
        if batch_size is not None:
            if num_images not in (None, batch_size):
                raise ValueError(
                    f"num_images={num_images} contradicts batch_size={batch_size}: both are the number of images, so"
                    " leave one out (decode_batch_size is the number of images decoded at a time)."
                )
            num_images = _check_count("batch_size", batch_size)
        options = {}
        guidance_scale = _check_factor("guidance_scale", guidance_scale)
        condition = self._condition(class_labels, conditions)
        is_flow = getattr(getattr(self.second_stage, "config", None), "model_type", None) == "vaeplus_flow_matching"
        if guidance_scale != 1:
            if not is_flow or condition is None:
                raise ValueError(
                    f"guidance_scale={guidance_scale:g} needs a second stage by flow matching and class_labels or"
                    " conditions: leave it out."
                )
            options["guidance_scale"] = guidance_scale
        if num_inference_steps is not None:
            if not is_flow:
                raise ValueError(
                    f"num_inference_steps={num_inference_steps} needs a second stage by flow matching: leave it out,"
                    " one pass is all there is."
                )
            options["num_inference_steps"] = _check_count("num_inference_steps", num_inference_steps)
        latent_dim = self._latent_dim
        noise_dim = latent_dim if self.second_stage is None else self.second_stage.config.latent_dim
        if latents is not None:
            _check_latents(latents, noise_dim)
            if num_images not in (None, len(latents)):
                raise ValueError(f"num_images={num_images} contradicts {len(latents)} latents: leave num_images out.")
            num_images = len(latents)
        if condition is not None:
            num_images = len(condition) if num_images is None else _check_count("num_images", num_images)
            condition = _in_turn(condition, num_images).to(self._execution_device)
        num_images = _check_count("num_images", 1 if num_images is None else num_images)
        generator = _check_generators(generator, num_images)
        batches = self._batches(num_images, "decode_batch_size", decode_batch_size)

        device = self._execution_device
        noise = dict(generator=generator, device=device, dtype=torch.float32)
        latents = randn_tensor((num_images, noise_dim), **noise) if latents is None else _upcast(latents.to(device))
        latents = temperature * latents
        if self.second_stage is not None:
            eps = temperature * randn_tensor((num_images, latent_dim), **noise)
        is_mean = self.detail is None or deterministic
        texture = self._detail_noise(num_images, generator, is_mean, temperature * detail_temperature)

        def decoded(rows: slice) -> torch.Tensor:
            z = latents[rows]
            if self.second_stage is not None:
                if condition is not None:
                    options["condition"] = condition[rows]
                with _weights_in_place(self.second_stage):
                    z = self.second_stage.sample(z, eps[rows], **options)
            return self._decode_batch(z, None if texture is None else texture[rows])

        images = _to_output(self._finished(map(decoded, batches), num_images, sharpness), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode(self, images: Images, batch_size: int = 64, preprocess: bool = True) -> Posterior:
        """The posterior q(z|x) of each image, of the first VAE.

        Args:
            images, preprocess: see the class.
            batch_size (`int`): images encoded at a time.

        Returns:
            `GaussianPosterior`: `mean` and `logvar` of shape `(n, latent_dim)`, in the order of the images.

        Raises:
            TypeError: images of another type.
            ValueError: a picture that cannot be used, images of wrong size, channels, range or dtype, or none at all;
                a pipeline without a VAE.
        """
        self.need_vae("posteriors")
        images = self._to_images(images, preprocess)
        batches = self._batches(len(images), "batch_size", batch_size)
        posteriors = [self._encode_batch(images[rows]) for rows in batches]
        self.maybe_free_model_hooks()
        mean = torch.cat([posterior.mean.cpu() for posterior in posteriors])
        return type(posteriors[0])(mean, torch.cat([posterior.logvar.cpu() for posterior in posteriors]))

    @torch.no_grad()
    def decode(
        self,
        latents: torch.Tensor,
        output_type: str = "pil",
        decode_batch_size: int = 64,
        sharpness: float = 0.0,
        deterministic: bool = True,
        generator: Generators = None,
        detail_temperature: float | None = None,
    ) -> ImagesOut:
        """Images, in the form `output_type`, of latents z of the first VAE, of shape `(n, latent_dim)`.

        Without a VAE they are codes of the autoencoder.

        `sharpness` is that of sampling, `decode_batch_size` that of the class. `deterministic=False` adds detail,
        whose noise is drawn from `generator`, times `detail_temperature` (both of sampling).

        Raises:
            TypeError: latents that are not a tensor, or generators of another type.
            ValueError: latents of wrong shape or dtype, not finite or too large for the decoder; sharpness or detail
                that this model has not.
        """
        _check_output_type(output_type)
        sharpness = self._check_sharpness(sharpness, deterministic)
        _check_latents(latents, self._latent_dim)
        noise = self._detail_noise(len(latents), generator, deterministic, detail_temperature)
        batches = self._batches(len(latents), "decode_batch_size", decode_batch_size)
        decoded = (self._decode_batch(latents[rows], None if noise is None else noise[rows]) for rows in batches)
        images = self._finished(decoded, len(latents), sharpness)
        self.maybe_free_model_hooks()
        return _to_output(images, output_type)

    @torch.no_grad()
    def reconstruct(
        self,
        images: Images,
        output_type: str = "pil",
        decode_batch_size: int = 64,
        sharpness: float = 0.0,
        preprocess: bool = True,
        deterministic: bool = True,
        generator: Generators = None,
        detail_temperature: float | None = None,
    ) -> ImagesOut:
        """Images, in the form `output_type`, decoded from the posterior means of `images` (see the class).

        `sharpness` is that of sampling; `deterministic`, `generator` and `detail_temperature` are those of `decode`;
        `decode_batch_size` images are encoded and decoded at a time.

        Raises:
            TypeError, ValueError: as `encode`.
        """
        _check_output_type(output_type)
        self._check_sharpness(sharpness, deterministic)
        detail_temperature = self._detail_factor(detail_temperature)
        decode_batch_size = _check_count("decode_batch_size", decode_batch_size)
        mean = self.encode(images, decode_batch_size, preprocess).mean
        drawn = dict(deterministic=deterministic, generator=generator, detail_temperature=detail_temperature)
        return self.decode(mean, output_type, decode_batch_size, sharpness, **drawn)

    @torch.no_grad()
    def restore(
        self,
        images: Images,
        seen: np.ndarray | torch.Tensor | None = None,
        noise_std: float = 0.0,
        num_steps: int = 200,
        output_type: str = "pil",
        decode_batch_size: int = 64,
        preprocess: bool = True,
    ) -> ImagesOut:
        """Pictures that have holes or noise, restored by a search for the most probable z (Eq. 2 at one z).

            argmax_z  log N(x | mean(z), c (gamma + noise_std^2) I) over the pixels seen  +  log N(z | m, C)

        m and C are the mean and the covariance of z as the second stage draws it; without one they are 0 and I. The
        errors of neighbouring pixels are alike, so c of them count as one: c = d tr(S^2) / tr(S)^2, where S is the
        covariance of the d errors that the search starts with, by their spectrum. It is 1 for white noise.

        The search starts at the code of the picture whose holes the decoder has filled, and takes steps of Adam. The
        result is the decoder's mean everywhere: put the pixels that were seen back with `torch.where` if they are to
        stay as they are.

        Args:
            images, preprocess, output_type, decode_batch_size: see the class; what the holes hold does not matter.
            seen (bool array of shape `(height, width)` or `(n, height, width)`, *optional*): False where a pixel is
                missing, of the images as the model sees them.
            noise_std (`float`): standard deviation of the noise on pixels in [0, 1].
            num_steps (`int`): of the search; the cost is a pass through the decoder and back each.

        Raises:
            TypeError, ValueError: as `encode`; also a mask of another shape or type, an image without a seen pixel, or
                a VAE whose gamma was measured on codes instead of images.
        """
        _check_output_type(output_type)
        self._need_likelihood("restorations")
        noise_std = _check_factor("noise_std", noise_std)
        num_steps = _check_count("num_steps", num_steps)
        images = self._to_images(images, preprocess)
        seen = _check_seen(seen, len(images), self.image_shape)
        variance = _log_gamma(self.vae).exp().cpu().item() + noise_std**2
        prior_mean, prior_precision = self._moments_of_z()

        def restored(rows: slice) -> torch.Tensor:
            targets = self._to_float(images[rows])
            mask = seen[rows, None].to(targets.device)
            z = torch.zeros(len(targets), self.vae.config.latent_dim, device=targets.device)
            for _ in range(1 if mask.all() else 5):
                filled = torch.where(mask, targets, self._decode_batch(z).clamp(0, 1))
                z = self._encode_batch(filled).mean
            weight = 1 / (variance * _alike(mask * (targets - self._decode_batch(z))))
            z.requires_grad_()
            optimizer = torch.optim.Adam([z], lr=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
            for _ in range(num_steps):
                with torch.enable_grad():
                    squared_errors = (mask * (targets - self._decode_batch(z))).square().flatten(1).sum(1)
                    away = z - prior_mean
                    loss = 0.5 * ((weight * squared_errors).sum() + (away @ prior_precision * away).sum())
                (z.grad,) = torch.autograd.grad(loss, z)  # of z alone, not of the weights
                optimizer.step()
                schedule.step()
            return self._decode_batch(z.detach())

        batches = self._batches(len(images), "decode_batch_size", decode_batch_size)
        found = self._finished(map(restored, batches), len(images), 0.0)
        self.maybe_free_model_hooks()
        return _to_output(found, output_type)

    @torch.no_grad()
    def interpolate(
        self,
        a: Images,
        b: Images,
        steps: int = 8,
        output_type: str = "pil",
        decode_batch_size: int = 64,
        preprocess: bool = True,
    ) -> list[list[Image.Image]] | np.ndarray | torch.Tensor:
        """Ways from each image of `a` to its partner in `b`, through the posterior means.

        The direction of z moves on the great circle, its length linearly: a straight line would cross the middle of
        the prior, where in many dimensions no sample lies. Along a line through the origin it is the straight line.

        Args:
            a, b, preprocess: as many images each (see the class).
            steps (`int`): images per way, at least 2; the first and the last are the reconstructions of `a` and `b`.
            output_type (`"pil" | "np" | "pt"`): n lists of PIL images, an array of shape `(n, steps, H, W, C)` or a
                tensor of shape `(n, steps, C, H, W)`.
            decode_batch_size (`int`): images encoded or decoded at a time.

        Raises:
            TypeError: images of another type.
            ValueError: as `encode`; also different numbers of images, or fewer than 2 steps.
        """
        _check_output_type(output_type)
        steps = _check_count("steps", steps, at_least=2)
        decode_batch_size = _check_count("decode_batch_size", decode_batch_size)
        a, b = self._to_images(a, preprocess), self._to_images(b, preprocess)
        if len(a) != len(b):
            raise ValueError(f"interpolate needs as many images in b as in a, got {len(a)} and {len(b)}.")
        start, end = self.encode(a, decode_batch_size).mean, self.encode(b, decode_batch_size).mean
        path = _spherical_path(start, end, steps)  # (n, steps, latent_dim)
        images = self.decode(path.flatten(0, 1), output_type, decode_batch_size)
        if output_type == "pil":
            return [images[first : first + steps] for first in range(0, len(images), steps)]
        return images.reshape(len(a), steps, *images.shape[1:])

    @torch.no_grad()
    def log_likelihood(
        self,
        images: Images,
        num_importance_samples: int = 64,
        generator: Generators = None,
        decode_batch_size: int = 64,
        prior: str = "standard_normal",
        unit: str = "nats",
        preprocess: bool = True,
        class_labels: ClassLabels = None,
        conditions: Conditions = None,
    ) -> torch.Tensor:
        """Importance-weighted estimate of log p(x), which approaches it from below (Burda et al. 2016, Eq. 8).

            log p(x) >= E log mean_k N(x | mean(z_k), gamma I) p(z_k) / q(z_k | x),    z_k ~ q(z | x)

        Args:
            images, num_importance_samples, generator, decode_batch_size, prior, preprocess, class_labels, conditions:
                as in `log_importance_weights`.
            unit (`"nats" | "bits_per_dimension"`): the latter is -log2 p(x) / d + 8 of the d pixel values, of their
                density in units of an 8-bit level: less is better. No noise is added to the levels, so it is not the
                bound of a discrete model.

        Returns:
            `torch.Tensor` of shape `(n,)`: nats per image, densities of pixels in [0, 1] (they can be positive); or
                bits.

        Raises:
            TypeError, ValueError: as `log_importance_weights`; another unit.
        """
        if unit not in ("nats", "bits_per_dimension"):
            raise ValueError(f"unit must be 'nats' or 'bits_per_dimension', got {unit!r}.")
        log_weights = self.log_importance_weights(
            images,
            num_importance_samples,
            generator,
            decode_batch_size,
            prior,
            preprocess,
            class_labels,
            conditions,
        )
        nats = log_weights.logsumexp(0) - math.log(num_importance_samples)
        if unit == "bits_per_dimension":
            return self._bits_per_dimension(nats).float()
        return nats.float()

    @property
    def has_likelihood(self) -> bool:
        """Whether the first VAE knows the decoder variance of images, which likelihoods need."""
        return self.vae is not None and (self.autoencoder is None or self.vae.config.gamma_is_of_images)

    @torch.no_grad()
    def score(
        self,
        images: Images,
        num_importance_samples: int = 64,
        generator: Generators = None,
        decode_batch_size: int = 64,
        prior: str | None = None,
        preprocess: bool = True,
    ) -> VAEPlusScores:
        """How well the model fits each image, and how usual it finds it: low likelihoods and large errors are unusual.

        Args:
            images, num_importance_samples, generator, decode_batch_size, preprocess: as in `log_importance_weights`.
            prior (`"standard_normal" | "second_stage"`, *optional*): p(z) of likelihood and distance; by default the
                second stage if it has an exact `log_prob` of one pass, else N(0, I); of a conditional one the null
                class. That of flow matching takes an ODE for each z, so it is only used if it is asked for.

        Returns:
            `VAEPlusScores`: one number per image of each kind, in the order of the images.

        Raises:
            TypeError, ValueError: as `log_importance_weights`. A model without a likelihood has the other scores.
        """
        self.need_vae("scores")
        if prior is None:
            exact = getattr(self.second_stage, "log_prob_is_exact", False)
            is_ready = exact and self.second_stage.log_prob_takes_one_pass
            prior = "second_stage" if is_ready else "standard_normal"
        self._check_prior(prior)
        images = self._to_images(images, preprocess)
        nats = bits = None
        if self.has_likelihood:
            options = dict(generator=generator, decode_batch_size=decode_batch_size, prior=prior)
            nats = self.log_likelihood(images, num_importance_samples, **options)
            bits = self._bits_per_dimension(nats.double()).float()
        mean = self.encode(images, decode_batch_size).mean
        pixels = images / 255 if images.dtype == torch.uint8 else images.float().cpu()
        errors = (pixels.cpu() - self.decode(mean, "pt", decode_batch_size)).square().flatten(1).sum(1)
        if prior == "second_stage":
            with _weights_in_place(self.second_stage):
                distance = -self.second_stage.log_prob(mean.to(self._execution_device)).float().cpu()
            self.maybe_free_model_hooks()
        else:
            distance = mean.norm(dim=1)
        kind = "negative_log_density" if prior == "second_stage" else "mahalanobis"
        return VAEPlusScores(nats, bits, errors, distance, kind, num_importance_samples, prior)

    def _moments_of_z(self, num_draws: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `(latent_dim,)` and inverse covariance `(latent_dim, latent_dim)` of z as the pipeline draws it."""
        device, dim = self._execution_device, self.vae.config.latent_dim
        if self.second_stage is None:
            return torch.zeros(dim, device=device), torch.eye(dim, device=device)
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(num_draws, self.second_stage.config.latent_dim, generator=generator).to(device)
        eps = torch.randn(num_draws, dim, generator=generator).to(device)
        with _weights_in_place(self.second_stage):
            z = self.second_stage.sample(u, eps).cpu().double()
        precision = torch.linalg.inv(torch.cov(z.T).view(dim, dim))
        return z.mean(0).to(device, torch.float32), precision.to(device, torch.float32)

    def _need_likelihood(self, what: str) -> None:
        self.need_vae(what)
        if not self.has_likelihood:
            raise ValueError(
                f"{what} need the decoder variance of images, but this VAE's gamma was measured on codes: train it"
                " with reconstruction_space='pullback' or 'image'."
            )

    def _bits_per_dimension(self, nats: torch.Tensor) -> torch.Tensor:
        return 8 - nats / (math.prod(self.image_shape) * math.log(2))

    @torch.no_grad()
    def log_importance_weights(
        self,
        images: Images,
        num_importance_samples: int = 64,
        generator: Generators = None,
        decode_batch_size: int = 64,
        prior: str = "standard_normal",
        preprocess: bool = True,
        class_labels: ClassLabels = None,
        conditions: Conditions = None,
    ) -> torch.Tensor:
        """log N(x | mean(z_k), gamma I) p(z_k) / q(z_k | x) at z_k ~ q(z | x): what bounds of log p(x) reduce.

        Noise is drawn image after image, so the weights do not depend on `decode_batch_size`.

        Args:
            images, preprocess: see the class.
            num_importance_samples (`int`): K; the cost is K decoder passes per image.
            generator (`torch.Generator` or a list or tuple of one per image, *optional*): source of the noise.
            decode_batch_size (`int`): see the class.
            prior (`"standard_normal" | "second_stage"`): p(z): N(0, I), the model of the first VAE alone, or the
                density that the second stage has learned.
            class_labels, conditions (*optional*): of each image, or one for all, as in sampling: the density of the
                second stage is then p(z | condition), and the bound one of log p(x | condition). Without them a
                conditional second stage gives that of its null class.

        Returns:
            `torch.Tensor` of shape `(K, n)`: nats, float64. The mean over K estimates the ELBO (Eq. 2).

        Raises:
            TypeError, ValueError: as `encode`; also a VAE whose gamma was measured on codes instead of images, or a
                second stage without an exact `log_prob`.
        """
        self._need_likelihood("likelihoods")
        self._check_prior(prior)
        condition = self._condition(class_labels, conditions)
        if condition is not None and prior != "second_stage":
            raise ValueError("a likelihood given class_labels or conditions needs prior='second_stage'.")
        images = self._to_images(images, preprocess)
        condition = None if condition is None else _in_turn(condition, len(images)).to(self._execution_device)
        num_importance_samples = _check_count("num_importance_samples", num_importance_samples)
        decode_batch_size = _check_count("decode_batch_size", decode_batch_size)
        generator = _check_generators(generator, len(images))
        generators = generator if isinstance(generator, list) else [generator] * len(images)
        log_gamma = _log_gamma(self.vae).cpu().double()
        noise_shape = (num_importance_samples, self.vae.config.latent_dim)
        all_log_weights = []
        for rows in self._batches(len(images), "decode_batch_size", decode_batch_size):
            targets = self._to_float(images[rows])
            posterior = self._encode_batch(images[rows])
            noise = [randn_tensor(noise_shape, each, targets.device, torch.float32) for each in generators[rows]]
            log_weights = []
            for eps in torch.stack(noise, dim=1).split(max(1, decode_batch_size // len(targets))):
                z = posterior.sample(eps)  # (samples, images, latent_dim)
                means = self._decode_batch(z.flatten(0, 1)).unflatten(0, z.shape[:2])
                squared_error = (targets - means).square().flatten(2).sum(2).cpu().double()
                # log N(x | mean(z), gamma I), the data term of Eq. (3) with its constants
                num_dims = targets[0].numel()
                log_p_x = -0.5 * (squared_error / log_gamma.exp() + num_dims * (log_gamma + math.log(2 * math.pi)))
                if prior == "second_stage":
                    given = {}
                    if condition is not None:
                        given["condition"] = torch.cat([condition[rows]] * len(z))
                    with _weights_in_place(self.second_stage):
                        log_p_z = self.second_stage.log_prob(z.flatten(0, 1), **given).unflatten(0, z.shape[:2])
                    # log p(z) - log q(z | x) with z = mean + sigma eps
                    log_ratio = log_p_z + 0.5 * (eps.square() + posterior.logvar + math.log(2 * math.pi)).sum(2)
                else:
                    # log N(z | 0, I) - log q(z | x): the 2 pi's cancel
                    log_ratio = 0.5 * (eps.square() + posterior.logvar - z.square()).sum(2)
                log_weights.append(log_p_x + log_ratio.cpu())
            all_log_weights.append(torch.cat(log_weights))
        self.maybe_free_model_hooks()
        return torch.cat(all_log_weights, dim=1)

    def compile(self, **options) -> None:
        """Compile what the methods call: `encode`, `decode` and `sample` of the components (`torch.compile(pipe.vae)`
        would compile a `forward` that inference never calls). The first call of each takes seconds to minutes.

        Args:
            options: of `torch.compile`, such as `mode="max-autotune"`.
        """
        methods = {
            "autoencoder": ("encode", "decode", "decode_with_features"),
            "vae": ("encode", "decode"),
            "second_stage": ("sample",),
            "detail": ("sample",),
        }
        for name, component in self.components.items():
            for method in methods[name] if component is not None else ():
                setattr(component, method, torch.compile(getattr(component, method), **options))

    def _batches(self, num_images: int, name: str, batch_size: int) -> Iterable[slice]:
        batch_size = _check_count(name, batch_size)
        batches = [slice(first, first + batch_size) for first in range(0, num_images, batch_size)]
        return batches if len(batches) == 1 else self.progress_bar(batches)

    def _condition(self, class_labels: ClassLabels, conditions: Conditions) -> torch.Tensor | None:
        """What the second stage takes as condition; `None` if none is given."""
        if class_labels is None and conditions is None:
            return None
        given = "class_labels" if conditions is None else "conditions"
        config = None if self.second_stage is None else self.second_stage.config
        kind = getattr(config, "condition", None)
        if kind is None:
            raise ValueError(
                f"this pipeline is unconditional: leave out {given}, or train its second stage with --label_column."
            )
        wanted = "class_labels" if kind == "classes" else "conditions"
        if (class_labels is None) == (conditions is None) or given != wanted:
            raise ValueError(f"the second stage of this pipeline was trained on {kind}: give {wanted} alone.")
        condition = config.to_condition(class_labels if conditions is None else conditions)
        if not len(condition):
            raise ValueError(f"{given} is empty: give at least one.")
        return condition

    def _check_prior(self, prior: str):
        if prior not in ("standard_normal", "second_stage"):
            raise ValueError(f"prior must be 'standard_normal' or 'second_stage', got {prior!r}.")
        if prior == "second_stage" and not getattr(self.second_stage, "log_prob_is_exact", False):
            found = "no second stage" if self.second_stage is None else f"a {type(self.second_stage).__name__} as such"
            raise ValueError(
                f"prior='second_stage' needs a second stage with an exact log_prob, and this pipeline has {found}:"
                " train one with second_stage flow_matching, coupling_flow or mixture."
            )

    def _detail_factor(self, temperature: float | None) -> float:
        if temperature is None:
            return 1.0 if self.detail is None else self.detail.config.temperature
        return _check_factor("detail_temperature", temperature)

    def _detail_noise(
        self, num_images: int, generator: Generators, deterministic: bool, temperature: float | None
    ) -> torch.Tensor | None:
        """The noise of the detail of so many images, where they are not to be means."""
        generator = _check_generators(generator, num_images)
        temperature = self._detail_factor(temperature)
        if deterministic:
            return None
        if self.detail is None:
            raise ValueError(
                "deterministic=False needs a detail model, and this pipeline has none: leave it out, or train one with"
                " a section `detail` in the preset."
            )
        shape = (num_images, *self.detail.config.noise_shape)
        return temperature * randn_tensor(
            shape, generator=generator, device=self._execution_device, dtype=torch.float32
        )

    def _check_sharpness(self, sharpness: float, deterministic: bool) -> float:
        sharpness = _check_factor("sharpness", sharpness)
        if sharpness and self.detail is not None and not deterministic:
            raise ValueError(
                f"sharpness={sharpness:g} sharpens the decoder's mean, and this pipeline draws detail instead: add"
                " deterministic=True, or leave sharpness out."
            )
        if sharpness and not (self.autoencoder is not None and self.autoencoder.config.matched_spectrum):
            raise ValueError(
                f"sharpness={sharpness:g} needs an autoencoder whose match_spectrum was called after training: use 0."
            )
        return sharpness

    def _finished(self, decoded: Iterable[torch.Tensor], num_images: int, sharpness: float) -> torch.Tensor:
        """Batches of decoder means as they are returned: sharpened if asked for, in [0, 1], on the CPU."""
        # Filled in place: no image is in memory twice.
        images, first = torch.empty(num_images, *self.image_shape, dtype=torch.float32, device="cpu"), 0
        for batch in decoded:
            if sharpness:
                with _weights_in_place(self.autoencoder):
                    batch = self.autoencoder.sharpen(batch, sharpness)
            if batch.isnan().any():
                raise ValueError(
                    "these latents are too far out, the decoder gives NaN: use smaller ones or less temperature."
                )
            images[first : first + len(batch)] = batch.clamp_(0, 1)
            first += len(batch)
        return images

    def _to_images(self, images: Images, preprocess: bool) -> torch.Tensor:
        """uint8 in [0, 255] or floats in [0, 1], of shape `(n, *image_shape)`: checked, not converted yet."""
        if not preprocess or _is_exact(images, self.image_shape):
            return _to_tensor(images, self.image_shape)
        pictures = _split(images)
        if not pictures:
            raise ValueError(f"images is an empty {type(images).__name__}: pass at least one image.")
        rows = []
        for number, picture in enumerate(pictures):
            if not _is_exact(picture, self.image_shape):
                if isinstance(picture, np.ndarray | torch.Tensor):
                    picture = _to_uint8(picture)
                picture = self.image_processor.pixels(picture, f"image {number}")
            rows.append(_to_tensor(picture, self.image_shape)[0].permute(1, 2, 0))
        if len({row.dtype for row in rows}) > 1:
            rows = [row / 255 if row.dtype == torch.uint8 else row.float() for row in rows]
        return torch.stack(rows).permute(0, 3, 1, 2)  # channels last in memory, as an array of pictures is

    def _to_float(self, images: torch.Tensor) -> torch.Tensor:
        """float32 pixels in [0, 1] on the execution device, of a batch from `_to_tensor`."""
        pixels = images.to(self._execution_device).float()
        return pixels / 255 if images.dtype == torch.uint8 else pixels

    def _encode_batch(self, images: torch.Tensor) -> Posterior:
        inputs = self._to_float(images)
        if self.autoencoder is not None:
            with _weights_in_place(self.autoencoder):
                inputs = self.autoencoder.encode(inputs)
        with _weights_in_place(self.vae):
            return self.vae.encode(inputs)

    def _decode_batch(self, z: torch.Tensor, detail_noise: torch.Tensor | None = None) -> torch.Tensor:
        """Decoder means in float32, not clipped: the mean of the likelihood; with noise, draws around them."""
        decoded = z.to(self._execution_device)
        if self.vae is not None:
            with _weights_in_place(self.vae):
                decoded = self.vae.decode(decoded)
        if detail_noise is not None:
            with _weights_in_place(self.autoencoder):
                mean, features = self.autoencoder.decode_with_features(decoded)
            with _weights_in_place(self.detail):
                return mean.float() + self.detail.sample(features, detail_noise).float()
        if self.autoencoder is not None:
            with _weights_in_place(self.autoencoder):
                decoded = self.autoencoder.decode(decoded)
        return decoded.float()


@contextmanager
def _weights_in_place(component: PreTrainedModel) -> Iterator[None]:
    """Accelerate's offloading hooks fire around `forward` alone: fire them around `encode` and `decode`."""
    hook = getattr(component, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(component)
    try:
        yield
    finally:
        hook.post_forward(component, None)


def _upcast(tensor: torch.Tensor) -> torch.Tensor:
    """float32, or float64 as it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _log_gamma(vae: PreTrainedModel) -> torch.Tensor:
    """Log of the decoder variance, as training used it."""
    with _weights_in_place(vae):
        return vae.decoder_log_variance.float()


def _alike(errors: torch.Tensor) -> torch.Tensor:
    """How many of the errors `(n, C, H, W)` of an image count as one, `(n,)`: d tr(S^2) / tr(S)^2 of their covariance.

    It is taken to be the same everywhere and in all directions, so the spectrum is a mean over rings of frequencies.
    """
    _, channels, height, width = errors.shape
    num_rings = max(1, min(height, width) // 8)  # about a hundred frequencies or more in each
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
    rings = torch.bucketize(radius, torch.linspace(0, 0.5**0.5, num_rings + 1)[1:-1].contiguous()).flatten()
    rings = torch.nn.functional.one_hot(rings, num_rings).to(errors.device, torch.complex64)  # (frequencies, rings)
    waves = torch.fft.fft2(errors.float()).flatten(2)
    counts = rings.sum(0).real
    spectrum = torch.einsum("nap,nbp,pr->nabr", waves, waves.conj(), rings) / counts
    power = (counts * spectrum.diagonal(dim1=1, dim2=2).real.sum(-1)).sum(1)
    squared = (counts * spectrum.abs().square().sum((1, 2))).sum(1)
    return channels * height * width * squared / power.square()


def _spherical_path(start: torch.Tensor, end: torch.Tensor, steps: int) -> torch.Tensor:
    """`(n, steps, dim)` from `start` to `end`, both `(n, dim)` (Shoemake 1985), the length changing linearly."""
    t = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]  # (steps, 1)
    a, b = start.double()[:, None], end.double()[:, None]  # (n, 1, dim)
    length_a, length_b = a.norm(dim=2, keepdim=True), b.norm(dim=2, keepdim=True)
    cosine = (a * b).sum(2, keepdim=True) / (length_a * length_b)
    angle = cosine.clamp(-1, 1).acos()
    direction = (((1 - t) * angle).sin() * a / length_a + (t * angle).sin() * b / length_b) / angle.sin()
    spherical = direction * ((1 - t) * length_a + t * length_b)
    # No plane without an angle; a length of 0 makes the angle NaN, and NaN > 1e-4 is false as well.
    path = torch.where(angle.sin() > 1e-4, spherical, (1 - t) * a + t * b).float()
    path[:, 0], path[:, -1] = start, end  # exactly
    return path


# ------------------------------------------------------------------------------------------------- images in and out


def _to_tensor(images: Images, image_shape: tuple[int, int, int]) -> torch.Tensor:
    """uint8 in [0, 255] or floats in [0, 1], of shape `(n, channels, height, width)`: checked, not converted yet."""
    channels, height, width = image_shape
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, list | tuple):
        images = _stack_pil(images, image_shape)
    if isinstance(images, np.ndarray):
        images = images[None] if images.ndim == 3 else images
        layout, expected = "numpy images (n, height, width, channels)", (height, width, channels)
    elif isinstance(images, torch.Tensor):
        images = images[None] if images.ndim == 3 else images
        layout, expected = "torch images (n, channels, height, width)", image_shape
    else:
        raise TypeError(
            f"without preprocessing images must be PIL images, a numpy array or a torch tensor, got"
            f" {type(images).__name__}: leave preprocess at True."
        )
    if images.shape[1:] != expected or len(images) == 0:
        raise ValueError(
            f"{layout} must have shape (n, {', '.join(map(str, expected))}) with n of at least 1, got"
            f" {tuple(images.shape)}: leave preprocess at True for pictures of other sizes."
        )
    if isinstance(images, np.ndarray):
        images = torch.tensor(images).permute(0, 3, 1, 2)
    _check_pixels(images)
    return images.contiguous()  # another layout would change the last bits of what the networks make of them


def _check_pixels(images: torch.Tensor):
    if images.is_floating_point():
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"float images must lie in [0, 1] without NaN, got {low:.4g} to {high:.4g}: rescale.")
    elif images.dtype != torch.uint8:
        raise ValueError(f"images must be floats in [0, 1] or uint8 in [0, 255], got {images.dtype}: convert them.")


def _stack_pil(images: list[Image.Image] | tuple[Image.Image, ...], image_shape: tuple[int, int, int]) -> np.ndarray:
    channels, height, width = image_shape
    mode = "L" if channels == 1 else "RGB"
    if not images:
        raise ValueError(f"images is an empty {type(images).__name__}: pass at least one image.")
    for image in images:
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"without preprocessing a list of images must hold PIL images, got {type(image).__name__}: stack"
                " arrays, or leave preprocess at True."
            )
        if image.mode != mode or image.size != (width, height):
            raise ValueError(
                f"without preprocessing PIL images must have mode {mode!r} and size {(width, height)}, got"
                f" {image.mode!r} and {image.size}: leave preprocess at True."
            )
    return np.stack([np.asarray(image).reshape(height, width, channels) for image in images])


def _is_exact(images: Images, image_shape: tuple[int, int, int]) -> bool:
    """Whether this is an array of images, or of one, of the model's shape."""
    channels, height, width = image_shape
    is_torch = isinstance(images, torch.Tensor)
    if not (is_torch or isinstance(images, np.ndarray)) or images.ndim not in (3, 4):
        return False
    return tuple(images.shape[-3:]) == (image_shape if is_torch else (height, width, channels))


def _split(images: Images) -> list[Picture]:
    """The pictures, one by one."""
    if isinstance(images, list | tuple):
        return list(images)
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def _to_uint8(picture: np.ndarray | torch.Tensor) -> np.ndarray:
    """An array of one picture, of any size, as Pillow takes it: uint8 `(H, W)` or `(H, W, 3 or 4)`."""
    is_torch = isinstance(picture, torch.Tensor)
    pixels = picture.detach().cpu() if is_torch else torch.tensor(picture)
    if is_torch and pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0)
    if not (pixels.ndim == 2 or pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4)) or pixels.numel() == 0:
        layout = "torch (C, H, W) or (n, C, H, W)" if is_torch else "numpy (H, W, C) or (n, H, W, C)"
        raise ValueError(f"a picture in {layout} must have 1, 3 or 4 channels, got shape {tuple(picture.shape)}.")
    _check_pixels(pixels)
    pixels = pixels if pixels.dtype == torch.uint8 else (255 * pixels.double()).round().to(torch.uint8)
    return (pixels[..., 0] if pixels.shape[2:] == (1,) else pixels).numpy()


def _to_output(images: torch.Tensor, output_type: str) -> ImagesOut:
    """The form `output_type` of float32 images `(n, channels, height, width)` in [0, 1]."""
    if output_type == "pt":
        return images
    arrays = images.permute(0, 2, 3, 1).numpy()
    if output_type == "np":
        return arrays
    return DiffusionPipeline.numpy_to_pil(arrays)


# ------------------------------------------------------------------------------------------------------------ checks


def _check_dimensions(vae, autoencoder, second_stage):
    """Whether the configs of the components fit together (`None` for a component that is absent)."""
    if vae is None:
        _check_without_vae(autoencoder, second_stage)
        return
    if autoencoder is not None and vae.input_shape != (autoencoder.latent_dim,):
        raise ValueError(
            f"the vae has input_shape={vae.input_shape} but the autoencoder's codes have {autoencoder.latent_dim}"
            " numbers: use the vae that was trained on these codes."
        )
    if autoencoder is None and vae.gamma_is_of_images:
        raise ValueError(
            f"a vae with reconstruction_space={vae.reconstruction_space!r} was trained for an autoencoder: pass that"
            " one."
        )
    if autoencoder is None and not (
        len(vae.input_shape) == 3 and vae.input_shape[0] in (1, 3) and vae.input_shape[1] == vae.input_shape[2]
    ):
        raise ValueError(
            f"without an autoencoder the vae's input_shape must be (channels, size, size) with 1 or 3 channels, got"
            f" {vae.input_shape}: pass the autoencoder, or a vae of pixels."
        )
    if second_stage is None:
        return
    if second_stage.input_shape != (vae.latent_dim,):
        raise ValueError(
            f"the second_stage has input_shape={second_stage.input_shape} but the vae has {vae.latent_dim} latent"
            " dimensions: use the second stage that was trained on these latents."
        )
    if second_stage.model_type == "vaeplus_vae" and second_stage.reconstruction_space != "input":
        raise ValueError(
            f"the second_stage must have reconstruction_space='input', got {second_stage.reconstruction_space!r}: its"
            " gamma must be a variance of z."
        )


def _check_detail(detail, autoencoder):
    """Whether the config of the detail model fits that of the autoencoder."""
    if autoencoder is None:
        raise ValueError("a detail model adds to what an autoencoder decodes: pass that autoencoder as well.")
    expected = {name: getattr(autoencoder, name) for name in ("image_size", "num_channels", "patch_size")}
    expected["feature_dim"] = autoencoder.hidden_channels[0]
    found = {name: getattr(detail, name) for name in expected}
    if found != expected:
        raise ValueError(
            f"the detail model was made for another autoencoder (it has {found}, the autoencoder {expected}): use the"
            " one that was trained with it."
        )


def _check_without_vae(autoencoder, second_stage):
    if autoencoder is None or second_stage is None:
        raise ValueError("a pipeline without a vae needs an autoencoder and a second_stage of its codes: pass them.")
    if second_stage.input_shape != (autoencoder.latent_dim,):
        raise ValueError(
            f"the second_stage has input_shape={second_stage.input_shape} but the autoencoder's codes have"
            f" {autoencoder.latent_dim} numbers: use the second stage that was trained on these codes, or pass the vae"
            " between them."
        )


def _check_count(name: str, value: int, at_least: int = 1) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < at_least:  # numpy's integers as well
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}.")
    return int(value)


def _in_turn(condition: torch.Tensor, count: int) -> torch.Tensor:
    """`count` conditions, of as many or of a part of them."""
    if count % len(condition):
        raise ValueError(
            f"there are {len(condition)} class_labels or conditions for {count} images: give one for each, or a number"
            " of images that is a multiple of them."
        )
    return torch.cat([condition] * (count // len(condition)))


def _check_factor(name: str, value: float) -> float:
    if not (isinstance(value, Real) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}.")
    return float(value)


def _check_output_type(output_type: str):
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}.")


def _check_latents(latents: torch.Tensor, latent_dim: int):
    if not isinstance(latents, torch.Tensor):
        raise TypeError(f"latents must be a torch tensor, got {type(latents).__name__}.")
    if latents.shape[1:] != (latent_dim,) or len(latents) == 0 or not latents.is_floating_point():
        raise ValueError(
            f"latents must be floats of shape (n, {latent_dim}) with n of at least 1, got {latents.dtype} of shape"
            f" {tuple(latents.shape)}."
        )
    if not latents.isfinite().all():
        raise ValueError("latents must be finite, got NaN or infinity.")


def _check_seen(seen, num_images: int, image_shape: tuple[int, int, int]) -> torch.Tensor:
    """Bools of shape `(num_images, height, width)`; all True for `None`."""
    shape = image_shape[1:]
    if seen is None:
        return torch.ones(num_images, *shape, dtype=torch.bool)
    mask = torch.as_tensor(seen)
    if mask.dtype != torch.bool or mask.shape not in (shape, (num_images, *shape)):
        raise ValueError(
            f"seen must be bools of shape {tuple(shape)} or {(num_images, *shape)}, got {mask.dtype} of shape"
            f" {tuple(mask.shape)}."
        )
    mask = mask.expand(num_images, *shape)
    if not mask.flatten(1).any(1).all():
        raise ValueError("seen must leave a pixel of every image, got one of which nothing is seen: leave it out.")
    return mask


def _check_generators(generator: Generators, num_images: int) -> torch.Generator | list[torch.Generator] | None:
    generator = list(generator) if isinstance(generator, tuple) else generator
    if isinstance(generator, list) and len(generator) != num_images:
        raise ValueError(f"a list of generators needs one per image, got {len(generator)} for {num_images} images.")
    for each in generator if isinstance(generator, list) else [generator]:
        if not isinstance(each, torch.Generator) and (each is not None or isinstance(generator, list)):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {type(each).__name__}.")
    return generator


__all__ = ["VAEPlusPipeline", "VAEPlusScores"]
