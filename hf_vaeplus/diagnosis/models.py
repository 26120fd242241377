"""One view of every autoencoder: images in [0, 1] -> means and log variances of the codes -> images."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data.pixels import to_unit_range
from ..modeling_priors import VAEPlusPriorModel
from ..modeling_vaeplus import VAEPlusAutoencoderModel, VAEPlusVAEModel

DETERMINISTIC = -20.0  # largest log variance of an encoder that adds no noise: a WAE's stand at -30

Coded = tuple[torch.Tensor, torch.Tensor | None]


@dataclass
class Autoencoder:
    """What [`~hf_vaeplus.diagnosis.measures.measure`] needs of a model. Inputs are images in [0, 1] or other rows.

    Args:
        name (`str`): of the kind of model, for people.
        encode: images `(n, *shape)` -> mean and log variance `(n, *code_shape)`; no log variance (`None`) where the
            encoder is deterministic.
        decode: codes `(n, *code_shape)` -> images `(n, *shape)`, not clipped.
        gamma (`float`, *optional*): the decoder variance that the model was trained with, where the model says so.
        target, decode_target: to where gamma is measured, from images and from codes; the images if not given.
        second_stage (*optional*): second stage of the codes, of any kind.
        image_shape (`tuple`, *optional*): of the images that the model takes, where it says so.
        num_channels (`int`, *optional*): of such images, where only these are fixed.
        device: of the model.
    """

    name: str
    encode: Callable[[torch.Tensor], Coded]
    decode: Callable[[torch.Tensor], torch.Tensor]
    gamma: float | None = None
    target: Callable[[torch.Tensor], torch.Tensor] | None = None
    decode_target: Callable[[torch.Tensor], torch.Tensor] | None = None
    second_stage: VAEPlusVAEModel | VAEPlusPriorModel | None = None
    image_shape: tuple[int, ...] | None = None
    num_channels: int | None = None
    device: torch.device | str = "cpu"


def as_autoencoder(model) -> Autoencoder:
    """The view of a model.

    Args:
        model: a stage or a pipeline of this package; a diffusers autoencoder or a pipeline that has one as its `vae`;
            a pair of callables `(encode, decode)`, of which `encode` returns codes or a pair of means and log
            variances; or an object with such methods.

    Raises:
        TypeError: something else.
    """
    if isinstance(model, Autoencoder):
        return model
    if isinstance(model, VAEPlusVAEModel):
        return _of_vae(model)
    if isinstance(model, VAEPlusAutoencoderModel):
        size, channels = model.config.image_size, model.config.num_channels
        return Autoencoder(
            "VAE+ autoencoder", lambda x: (model.encode(x), None), model.decode,
            image_shape=(channels, size, size), device=_device(model),
        )  # fmt: skip
    if hasattr(model, "vae") and hasattr(model, "second_stage"):  # ours, of the package or of an exported repository
        return _of_pipeline(model)
    if hasattr(model, "vae"):
        return as_autoencoder(model.vae)
    if isinstance(model, tuple | list) and len(model) == 2 and all(map(callable, model)):
        return _of_callables("encode and decode", *model)
    if type(model).__module__.startswith("diffusers.") and hasattr(model, "encode"):
        return _of_diffusers(model)
    if callable(getattr(model, "encode", None)) and callable(getattr(model, "decode", None)):
        return _of_callables(type(model).__name__, model.encode, model.decode, _device(model))
    raise TypeError(
        f"diagnose needs a pipeline, a stage, a diffusers autoencoder or a pair (encode, decode), got"
        f" {type(model).__name__}."
    )


def load_autoencoder(source: str, device: str = "cpu") -> Autoencoder:
    """The autoencoder in a folder or a repository of the Hub, from safetensors alone.

    Args:
        source (`str`): a pipeline or a stage of this package, a diffusers autoencoder, or a diffusers pipeline, whose
            folder `vae` is taken.

    Raises:
        ValueError: a config that names another kind of model.
        OSError: nothing is there.
    """
    import diffusers

    from ..hub.pipeline import VAEPlusPipeline

    index, folder = _config(source, "model_index.json"), None
    if index is not None and "vae" not in index:
        raise ValueError(f"{source} is a pipeline without a vae: name one that has an autoencoder.")
    if index is not None:
        owner = index["vae"][0] if isinstance(index["vae"], list) and index["vae"] else None
        if owner in ("hf_vaeplus", "modeling_vaeplus"):
            return as_autoencoder(VAEPlusPipeline.from_pretrained(source).to(device))
        folder = "vae"
    config = _config(source, "config.json", folder)
    if config is None:
        raise FileNotFoundError(
            f"{source} holds neither model_index.json nor config.json: name the folder of a saved pipeline, stage or"
            " diffusers autoencoder, or an id on the Hub."
        )
    ours = {"vaeplus_autoencoder": VAEPlusAutoencoderModel, "vaeplus_vae": VAEPlusVAEModel}
    known = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel")
    kind = config.get("model_type") or config.get("_class_name")
    if kind in ours:
        return as_autoencoder(ours[kind].from_pretrained(source).to(device).eval())
    if kind not in known:
        raise ValueError(
            f"{source} holds a model of the kind {str(kind)[:80]!r}, expected a stage or pipeline of this package or"
            f" one of {', '.join(known)}: load it yourself and pass it to hf_vaeplus.diagnose."
        )
    where = {} if folder is None else {"subfolder": folder}
    return as_autoencoder(getattr(diffusers, kind).from_pretrained(source, use_safetensors=True, **where).to(device))


def _config(source: str, name: str, folder: str | None = None) -> dict | None:
    """A JSON file of a folder or a repository; `None` where it is absent."""
    if Path(source).is_dir():
        path = Path(source, folder or "", name)
        if not path.is_file():
            return None
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

        try:
            path = hf_hub_download(source, name, subfolder=folder)
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(f"there is no folder {source}, and the Hub cannot be asked: {error}") from error
        except EntryNotFoundError:
            return None
        except HFValidationError as error:
            raise FileNotFoundError(f"there is no folder {source}, and it is no id on the Hub: {error}") from error
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): save or download the model again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold the fields of a model, got a {type(found).__name__}.")
    return found


def _device(model):
    return getattr(model, "device", "cpu")


def _of_vae(vae: VAEPlusVAEModel, second_stage=None) -> Autoencoder:
    def encode(inputs):
        posterior = vae.encode(inputs)
        return posterior.mean, posterior.logvar

    shape = tuple(vae.config.input_shape)
    gamma = None if vae.config.gamma_is_of_images else math.exp(float(vae.decoder_log_variance.detach()))
    return Autoencoder("VAE", encode, vae.decode, gamma, second_stage=second_stage, image_shape=shape,
                       device=_device(vae))  # fmt: skip


def _of_pipeline(pipe) -> Autoencoder:
    vae, autoencoder = pipe.vae, pipe.autoencoder
    if vae is None:  # the second stage is one of the autoencoder's codes
        return replace(as_autoencoder(autoencoder), name="VAE+ pipeline", second_stage=pipe.second_stage)
    inner = _of_vae(vae, pipe.second_stage)
    if autoencoder is None:
        inner.name = "VAE+ pipeline"
        return inner
    in_codes = not vae.config.gamma_is_of_images
    return Autoencoder(
        "VAE+ pipeline",
        lambda images: inner.encode(autoencoder.encode(images)),
        lambda z: autoencoder.decode(vae.decode(z)),
        math.exp(float(vae.decoder_log_variance.detach())),
        autoencoder.encode if in_codes else None,
        vae.decode if in_codes else None,
        pipe.second_stage,
        tuple(pipe.image_shape),
        device=_device(vae),
    )


def _of_diffusers(model) -> Autoencoder:
    """diffusers' autoencoders see pixels in [-1, 1]; only AutoencoderKL has a distribution of its codes."""

    def encode(images):
        found = model.encode(2 * images.to(model.dtype) - 1)
        if hasattr(found, "latent_dist"):
            return found.latent_dist.mean.float(), found.latent_dist.logvar.float()
        return next(value for value in found.values() if torch.is_tensor(value)).float(), None

    def decode(codes):
        return 0.5 * model.decode(codes.to(model.dtype)).sample.float() + 0.5

    channels = model.config.get("in_channels")
    return Autoencoder(type(model).__name__, encode, decode, num_channels=channels, device=model.device)


def _of_callables(name: str, encode: Callable, decode: Callable, device="cpu") -> Autoencoder:
    def encoded(images):
        found = encode(images)
        if torch.is_tensor(found):
            return found, None
        if hasattr(found, "mean") and hasattr(found, "logvar"):
            return found.mean, found.logvar
        if isinstance(found, tuple | list) and len(found) == 2:
            return found[0], found[1]
        raise TypeError(
            "encode must return a tensor of codes, or means and log variances as a pair or as attributes, got"
            f" {type(found).__name__}."
        )

    return Autoencoder(name, encoded, decode, device=device)


def as_floats(images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels in [0, 1]; floats as they are."""
    return to_unit_range(images) if images.dtype == torch.uint8 else images


@torch.no_grad()
def encode_all(model: Autoencoder, images: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Means and log variances `(n, *code_shape)` of all images, float32 on the CPU.

    Raises:
        ValueError: codes that are not one for each image, not finite, or that have no dimension.
    """
    means, logvars = [], []
    for part in images.split(batch_size):
        mean, logvar = model.encode(as_floats(part).to(model.device))
        if len(mean) != len(part) or mean.ndim < 2 or (logvar is not None and logvar.shape != mean.shape):
            shown = None if logvar is None else tuple(logvar.shape)
            raise ValueError(
                f"encode must return one code for each of {len(part)} images and log variances of the same shape, got"
                f" {tuple(mean.shape)} and {shown}."
            )
        means.append(mean.detach().float().cpu())
        logvars.append(None if logvar is None else logvar.detach().float().cpu())
    mean = torch.cat(means)
    logvar = None if logvars[0] is None else torch.cat(logvars)
    if logvar is not None and float(logvar.max()) < DETERMINISTIC:
        logvar = None
    if not (mean.isfinite().all() and (logvar is None or logvar.isfinite().all())):
        raise ValueError("encode returned NaN or infinity: this model is damaged or its images have another range.")
    return mean, logvar


@torch.no_grad()
def decode_all(decode: Callable, codes: torch.Tensor, device, batch_size: int) -> torch.Tensor:
    """Decoded images `(n, *shape)`, float32 on the CPU."""
    return torch.cat([decode(part.to(device)).detach().float().cpu() for part in codes.split(batch_size)])
