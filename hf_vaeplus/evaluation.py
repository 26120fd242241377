"""Figures that say what a pipeline has learnt, measured on a set of images.

`evaluate` measures everything, on one or many processes; `summarize` only what a training run ends with. The parts are
for scripts: `Judge` compares sets of images, `sample_images` and `sample_mixture` draw them.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from sklearn.mixture import GaussianMixture
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .checkpoints import build_once, write_json
from .data import to_uint8, to_unit_range
from .features import FeatureExtractor, distance_name
from .hub import redacted
from .metrics.frechet import frechet_distance
from .metrics.kernel import kernel_distance
from .metrics.latents import active_units, active_units_by_variance, kl_per_dimension
from .metrics.likelihood import elbo, importance_weighted
from .metrics.mmd import imq_mmd
from .metrics.ndb import NDB
from .metrics.reconstruction import psnr, squared_error
from .metrics.running import RunningMoments
from .pictures import image_grid, plot_curves
from .training import derived_seed

SAMPLERS = ("second_stage", "sharpened", "prior", "mixture", "gaussian")
_COMPONENTS = {"mixture": 10, "gaussian": 1}
# What the noise of an evaluation is for: `derived_seed(seed, purpose, image)`. Training has the numbers below 4.
_SAMPLES, _POSTERIORS, _PRIOR, _IMPORTANCE = 4, 5, 6, 7


def summarize(pipe, images, max_images: int = 2_000, batch_size: int = 100) -> dict:
    """Reconstruction errors and posterior statistics of each stage, over the first `max_images` of `images`.

    Args:
        pipe ([`VAEPlusPipeline`]).
        images ([`~hf_vaeplus.data.ImageDataset`]): uint8 images of the pipeline's size.

    Returns:
        `dict` with `num_images`; `autoencoder_squared_error` and `squared_error` (per-image sums of squares on
        [0, 1] pixels, through the autoencoder alone and through the posterior mean of the whole model); and for `vae`
        and `second_stage` a `dict` of `gamma`, `kl` (nats), `kl_per_dimension`, `active_units` (variance of posterior
        means above 0.01), `active_units_by_variance` (mean posterior variance below 1/2), `latent_dim`.
    """
    count = min(max_images, len(images))
    generator = torch.Generator().manual_seed(0)
    rows = []
    for start in tqdm(range(0, count, batch_size), desc="measuring"):
        pixels = images.pixels(start, min(start + batch_size, count))
        noise = torch.randn(len(pixels), pipe.vae.config.latent_dim, generator=generator)
        rows.append(_pass_through(pipe, pixels, noise)[1])
    return _summary(pipe, _joined(rows))


@torch.no_grad()
def _pass_through(pipe, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[dict, dict]:
    """One batch through the stages, each encoder and decoder once.

    Returns:
        The reconstructions in [0, 1] by what made them, and the rows that the figures are made from, all on the CPU.
    """
    reconstructions, code = {}, pixels.to(pipe.vae.device)
    if pipe.autoencoder is not None:
        code = pipe.autoencoder.encode(code)
        reconstructions["autoencoder"] = pipe.autoencoder.decode(code).float().cpu().clamp(0, 1)
    posterior = pipe.vae.encode(code)
    reconstructions["reconstruction"] = pipe.decode(posterior.mean, batch_size=len(pixels))
    z = posterior.sample(noise.to(posterior.mean.device))
    posteriors = {"vae": posterior}
    if pipe.second_stage is not None:
        posteriors["second_stage"] = pipe.second_stage.encode(z)
    rows = {f"{name}_error": squared_error(images, pixels) for name, images in reconstructions.items()}
    for stage, each in posteriors.items():
        rows |= {f"{stage}_mean": each.mean.cpu(), f"{stage}_logvar": each.logvar.cpu()}
    return reconstructions, {**rows, "z": z.cpu()}


def _joined(batches: list[dict]) -> dict:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _summary(pipe, rows: dict) -> dict:
    """What [`summarize`] returns, from the rows of all images."""
    summary = {"num_images": len(rows["z"])}
    if pipe.autoencoder is not None:
        summary["autoencoder_squared_error"] = float(rows["autoencoder_error"].mean())
    summary["squared_error"] = float(rows["reconstruction_error"].mean())
    for stage in ("vae", "second_stage"):
        if getattr(pipe, stage) is not None:
            means, logvars = rows[f"{stage}_mean"], rows[f"{stage}_logvar"]
            kl = kl_per_dimension(means, logvars)
            summary[stage] = {
                "gamma": float(getattr(pipe, stage).decoder_log_variance.detach().exp()),
                "kl": float(kl.sum()),
                "active_units": active_units(means),
                "active_units_by_variance": active_units_by_variance(logvars),
                "latent_dim": means.shape[1],
                "kl_per_dimension": kl.tolist(),
            }
    return summary


class Judge:
    """How far sets of images are from a reference set, in one protocol for all of them.

    Args:
        extractor ([`~hf_vaeplus.features.FeatureExtractor`]): of the Frechet and the kernel distance.
        reference (iterable of uint8 `torch.Tensor` of shape `(batch, C, H, W)`): real images.
        bins (sequence of [`~hf_vaeplus.metrics.ndb.NDB`]): fitted on training images.
        gather: joins the rows of all processes: `accelerator.gather_for_metrics` where each sees a share of a batch.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        reference: Iterable[torch.Tensor],
        bins: Sequence[NDB] = (),
        gather: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
    ):
        self.extractor, self.bins, self.gather = extractor, bins, gather
        self._features = torch.cat([gather(extractor(batch)) for batch in reference])
        self._moments = RunningMoments(self._features.shape[1])
        self._moments.update(self._features)

    def __call__(self, images: Iterable[torch.Tensor]) -> dict:
        """Distances of `images`, batches as in the reference.

        Returns:
            `dict` with `distance` (the name of what follows), `frechet`, `kernel` (mean, standard deviation; `None`
            with fewer than 1,000 images), `num_images`, `num_reference`, and `ndb`: K -> `ndb_over_k` and `js`.
        """
        return self.compare([self.observe(batch) for batch in images])

    def observe(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """What is kept of a batch: its features, then the bin of every image for each of `bins`."""
        return [self.gather(rows) for rows in (self.extractor(batch), *(ndb.assign(batch) for ndb in self.bins))]

    def compare(self, observed: Iterable[list[torch.Tensor]]) -> dict:
        """The result of `__call__`, from what [`Judge.observe`] kept of all batches."""
        features, *assigned = (torch.cat(parts) for parts in zip(*observed, strict=True))
        moments = RunningMoments(features.shape[1])
        moments.update(features)
        enough = min(len(features), len(self._features)) >= 1_000
        found = {}
        for ndb, numbers in zip(self.bins, assigned, strict=True):
            compared = ndb.compare(numbers.bincount(minlength=len(ndb.counts)))
            found[str(len(ndb.counts))] = {name: compared[name] for name in ("ndb_over_k", "js")}
        return {
            "distance": distance_name(self.extractor),
            "frechet": frechet_distance(self._moments, moments),
            "kernel": kernel_distance(self._features, features) if enough else None,
            "num_images": len(features),
            "num_reference": len(self._features),
            "ndb": found,
        }


# ----------------------------------------------------------------------------------------------- sets of images


def sample_images(
    pipe, batches: Iterable[Sequence[int]], seed: int = 0, sharpness: float = 0.0
) -> Iterator[torch.Tensor]:
    """Samples of a pipeline: image i is a function of (seed, i), whatever its batch and the number of processes.

    Args:
        pipe ([`VAEPlusPipeline`]).
        batches: the numbers of the images of each batch, say `torch.arange(10_000).split(100)`.
        seed (`int`): not negative.
        sharpness (`float`): see the pipeline.

    Yields:
        uint8 `torch.Tensor` of shape `(batch, C, H, W)`.
    """
    for numbers in batches:
        generators = _generators(seed, _SAMPLES, numbers)
        wanted = dict(sharpness=sharpness, batch_size=len(generators), output_type="pt")
        yield to_uint8(pipe(len(generators), generators, **wanted).images)


@torch.no_grad()
def sample_mixture(
    pipe, codes: torch.Tensor, batches: Iterable[Sequence[int]], num_components: int = 10, seed: int = 0
) -> Iterator[torch.Tensor]:
    """Samples of a Gaussian mixture fitted to codes after training, decoded (Ghosh et al. 2020, Section 4).

    Args:
        pipe ([`VAEPlusPipeline`]): its autoencoder decodes; without one its VAE does.
        codes (`torch.Tensor` of shape `(num_images, dim)`): of training images, by the autoencoder; without one, their
            posterior means.
        num_components (`int`): Gaussians of full covariance.
        batches, seed, and what is yielded: as in [`sample_images`].

    Raises:
        ValueError: too few codes.
    """
    if len(codes) < max(2, num_components):
        raise ValueError(f"a mixture of {num_components} needs as many codes, at least 2, got {len(codes)}.")
    mixture = GaussianMixture(num_components, random_state=seed % 2**32).fit(codes.double().numpy())
    weights, means = torch.from_numpy(mixture.weights_), torch.from_numpy(mixture.means_)
    factors = torch.linalg.cholesky(torch.from_numpy(mixture.covariances_))
    for numbers in batches:
        drawn = []
        for generator in _generators(seed, _SAMPLES, numbers):
            component = int(torch.multinomial(weights, 1, generator=generator))
            noise = torch.randn(codes.shape[1], generator=generator, dtype=torch.float64)
            drawn.append(means[component] + factors[component] @ noise)
        latents = torch.stack(drawn).float()
        if pipe.autoencoder is None:
            images = pipe.decode(latents, batch_size=len(latents))
        else:
            images = pipe.autoencoder.decode(latents.to(pipe.autoencoder.device)).cpu()
        yield to_uint8(images)


def downsample(images: torch.Tensor) -> torch.Tensor:
    """Half the size by averaging and back bilinearly, rounded once, at the end: the set that calibrates a distance.

    Args:
        images (uint8 `torch.Tensor` of shape `(batch, C, H, W)`); what is returned has this form as well.
    """
    size = images.shape[2:]
    half = interpolate(to_unit_range(images), [side // 2 for side in size], mode="area")
    return to_uint8(interpolate(half, size, mode="bilinear"))


def _generators(seed: int, purpose: int, numbers: Iterable[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(derived_seed(seed, purpose, int(number))) for number in numbers]


def _uint8(images, numbers: Iterable[int]) -> torch.Tensor:
    return images.__getitems__(list(numbers))["pixel_values"]


# --------------------------------------------------------------------------------------------------- everything


class _Shares:
    """The work of several processes: each handles its part of every batch, and all of them get all rows, in order."""

    def __init__(self, batch_size: int):
        self.accelerator = Accelerator(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        self.batch_size = batch_size

    def __call__(self, count: int, name: str) -> Iterator[list[int]]:
        """Numbers below `count`, this process's part of each batch, with a progress bar."""
        loader = self.accelerator.prepare_data_loader(DataLoader(range(count), self.batch_size))
        for numbers in tqdm(loader, desc=name, disable=not self.accelerator.is_main_process):
            yield numbers.tolist()

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, while iterating over the batch that they belong to."""
        if self.accelerator.num_processes == 1:
            return rows
        return self.accelerator.gather_for_metrics(rows.to(self.accelerator.device)).cpu()


@torch.no_grad()
def evaluate(
    pipe,
    images,
    extractors: Sequence[FeatureExtractor],
    samplers: Sequence[str] = (),
    num_images: int = 10_000,
    training_images=None,
    num_training_images: int = 20_000,
    num_bins: Sequence[int] = (),
    num_importance_samples: int = 0,
    seed: int = 0,
    batch_size: int = 64,
) -> dict:
    """All metrics of a pipeline in one protocol. Under `accelerate launch` every process calls it and gets the result.

    The first `num_images` of `images` are the reference, and every other set has as many; generated images are
    rounded to 8 bits like real ones.

    Args:
        pipe ([`VAEPlusPipeline`]).
        images ([`~hf_vaeplus.data.ImageDataset`]): of the pipeline's size and channels.
        extractors: of the distances, with different names.
        samplers: `"second_stage"`, the pipeline itself; `"sharpened"`, the pipeline at `sharpness=1`; `"prior"`,
            without its second stage; `"mixture"` and `"gaussian"`, 10 Gaussians and 1 fitted to the codes of training
            images ([`sample_mixture`]). By default the pipeline as it is.
        num_images (`int`): at least 2; all of `images` where there are fewer.
        training_images ([`~hf_vaeplus.data.ImageDataset`], *optional*): what bins and mixtures are fitted to.
        num_training_images (`int`): only so many of them, the first.
        num_bins: K of each NDB; bins of training images, whitened and not mirrored, kept beside the image cache.
        num_importance_samples (`int`): per image, for likelihoods; 0 leaves them out.
        seed (`int`): of all noise; every image has its own generator.
        batch_size (`int`): images at a time, per process.

    Returns:
        `dict`, ready for JSON. `protocol`: what has to be equal for two results to be compared. The keys of
        [`summarize`], with `psnr` and `autoencoder_psnr` (dB, means over images) and `vae.mmd`, that of q(z) and
        N(0, I) by [`~hf_vaeplus.metrics.mmd.imq_mmd`]. `likelihood`, where it was asked for: `elbo` and `nll`, the
        importance-weighted one, in nats per image. `sets`: name -> `distances` (extractor -> `distance`, `frechet`,
        `frechet_over_downsample`, `kernel`) and `ndb` (K -> `ndb_over_k`, `js`), of `real` (images that are not the
        reference, where there are enough), `downsample`, `autoencoder`, `reconstruction` and each sampler.

    Raises:
        ValueError: images of another size, an unknown sampler, a number out of range, or something asked for that the
            pipeline or the images cannot give.
    """
    count = min(num_images, len(images))
    num_training = 0 if training_images is None else min(num_training_images, len(training_images))
    samplers = list(dict.fromkeys(samplers)) or ["prior" if pipe.second_stage is None else "second_stage"]
    _check(pipe, images, extractors, samplers, count, num_training, num_bins, num_importance_samples, seed, batch_size)
    for extractor in extractors:
        extractor(_uint8(images, [0]))  # what it refuses, it refuses before the work
    shares = _Shares(batch_size)

    def real(name, source=images, first=0):
        for numbers in shares(count, name):
            yield _uint8(source, [first + number for number in numbers])

    bins = []
    for k in tqdm(num_bins, desc="k-means", disable=not (num_bins and shares.accelerator.is_main_process)):
        bins.append(_fitted_bins(training_images, num_training, k, shares))
    judges = [
        Judge(extractor, real("reference"), bins if position == 0 else (), shares.gather)
        for position, extractor in enumerate(extractors)
    ]

    def observe(batch):
        return [judge.observe(batch) for judge in judges]

    observed = {}  # set -> batch by batch, what each judge keeps of it
    others = _other_images(images, training_images, count)
    if others is not None:
        observed["real"] = [observe(batch) for batch in real("real", *others)]
    observed["downsample"] = [observe(downsample(batch)) for batch in real("downsample")]
    rows = []
    for numbers in shares(count, "reconstructions"):
        noise = [torch.randn(pipe.vae.config.latent_dim, generator=g) for g in _generators(seed, _POSTERIORS, numbers)]
        reconstructions, found = _pass_through(pipe, to_unit_range(_uint8(images, numbers)), torch.stack(noise))
        rows.append({name: shares.gather(values) for name, values in found.items()})
        for name, reconstruction in reconstructions.items():
            observed.setdefault(name, []).append(observe(to_uint8(reconstruction)))
    codes = None
    if _COMPONENTS.keys() & set(samplers):
        codes = torch.cat(
            [
                shares.gather(_code(pipe, to_unit_range(_uint8(training_images, numbers))))
                for numbers in shares(num_training, "training images")
            ]
        )
    for sampler in samplers:
        batches = shares(count, sampler)
        if sampler in _COMPONENTS:
            drawn = sample_mixture(pipe, codes, batches, _COMPONENTS[sampler], seed)
        else:
            sampled = type(pipe)(pipe.vae, pipe.autoencoder) if sampler == "prior" else pipe
            drawn = sample_images(sampled, batches, seed, sharpness=float(sampler == "sharpened"))
        observed[sampler] = [observe(batch) for batch in drawn]

    rows = _joined(rows)
    summary = _summary(pipe, rows)
    for prefix, name in (("autoencoder_", "autoencoder"), ("", "reconstruction")):
        if name in observed:
            summary[f"{prefix}psnr"] = float(psnr(rows[f"{name}_error"], images[0]["pixel_values"].numel()).mean())
    prior = torch.randn(rows["z"].shape, generator=_generators(seed, _PRIOR, [0])[0])
    summary["vae"]["mmd"] = float(imq_mmd(rows["z"], prior))
    if num_importance_samples:
        summary["likelihood"] = _likelihood(pipe, images, count, num_importance_samples, seed, shares)
    protocol = {
        "images": images.name,
        "split": images.split,
        "num_images": count,
        **_preparation(images),
        "real": "none" if others is None else f"{others[0].name} {others[0].split}, {count} from image {others[1]} on",
        "training_split": training_images.split if num_training else None,
        "num_training_images": num_training,
        "extractors": [extractor.description() for extractor in extractors],
        "samplers": samplers,
        "seed": seed,
        "batch_size": batch_size,
        "num_processes": shares.accelerator.num_processes,
    }
    return {"protocol": protocol, **summary, "sets": _compared(judges, observed)}


def _check(
    pipe, images, extractors, samplers, count, num_training, num_bins, num_importance_samples, seed, batch_size
):
    channels, size, _ = pipe.image_shape
    if (images.num_channels, images.resolution) != (channels, size):
        raise ValueError(
            f"images must have {channels} channels of {size} x {size} like the pipeline's, got {images.num_channels}"
            f" of {images.resolution} x {images.resolution}."
        )
    if count < 2 or batch_size < 1 or num_importance_samples < 0 or not 0 <= seed < 2**63:
        raise ValueError(
            "num_images must be at least 2 and have as many images, batch_size at least 1, num_importance_samples at"
            f" least 0 and seed in [0, 2**63), got {count}, {batch_size}, {num_importance_samples} and {seed}."
        )
    names = [extractor.name for extractor in extractors]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"extractors must be one or several with different names, got {names}.")
    for sampler in samplers:
        if sampler not in SAMPLERS:
            raise ValueError(f"samplers must be of {', '.join(SAMPLERS)}, got {sampler!r}.")
    if "second_stage" in samplers and pipe.second_stage is None:
        raise ValueError("this pipeline has no second stage: sample it with prior, mixture or gaussian.")
    if "sharpened" in samplers and not (pipe.autoencoder and pipe.autoencoder.config.matched_spectrum):
        raise ValueError("this pipeline cannot sharpen: its autoencoder was trained without match_spectrum.")
    needed = [_COMPONENTS[sampler] for sampler in samplers if sampler in _COMPONENTS]
    if any(not 2 <= k <= num_training for k in num_bins) or any(max(2, k) > num_training for k in needed):
        raise ValueError(
            "bins of NDB (at least 2) and the Gaussians of a mixture need as many training images, got"
            f" {num_training} for num_bins={list(num_bins)} and the samplers {', '.join(samplers)}."
        )
    if num_importance_samples and pipe.autoencoder is not None and not pipe.vae.config.gamma_is_of_images:
        raise ValueError(
            "likelihoods need the decoder variance of images, but this VAE's gamma was measured on codes: leave"
            " num_importance_samples at 0."
        )


def _fitted_bins(images, count: int, num_bins: int, shares: _Shares) -> NDB:
    """Bins of the first `count` images, fitted once and kept beside the image cache."""
    key = hashlib.sha256(f"NDB 1 {images.fingerprint} {count} {num_bins}".encode()).hexdigest()[:32]
    path = Path(images.path).parent.parent / "bins" / f"{key}.safetensors"

    def build(path: Path):
        NDB.fit(_uint8(images, range(count)), num_bins).save(path)

    with shares.accelerator.main_process_first():
        return build_once(path, build, NDB.load)


def _other_images(images, training_images, count: int) -> tuple | None:
    """As many real images that are not the reference, as a data set and the first row of it; `None` without them."""
    if len(images) >= 2 * count:
        return images, count
    if training_images is None or len(training_images) < count:
        return None
    mine, theirs = images.rows[:count], training_images.rows[:count]
    if images.path == training_images.path and mine.start < theirs.stop and theirs.start < mine.stop:
        return None
    return training_images, 0


def _code(pipe, pixels: torch.Tensor) -> torch.Tensor:
    """What [`sample_mixture`] is fitted to."""
    if pipe.autoencoder is None:
        return pipe.encode(pixels, len(pixels)).mean
    return pipe.autoencoder.encode(pixels.to(pipe.autoencoder.device)).float().cpu()


def _likelihood(pipe, images, count: int, num_importance_samples: int, seed: int, shares: _Shares) -> dict:
    log_weights = []
    for numbers in shares(count, "likelihoods"):
        generators = _generators(seed, _IMPORTANCE, numbers)
        found = pipe.log_importance_weights(_uint8(images, numbers), num_importance_samples, generators, len(numbers))
        log_weights.append(shares.gather(found.T))
    log_weights = torch.cat(log_weights).T  # (importance samples, images)
    return {
        "num_importance_samples": num_importance_samples,
        "elbo": float(elbo(log_weights).mean()),
        "nll": -float(importance_weighted(log_weights).mean()),
    }


def _preparation(images) -> dict:
    """How the images were made from their source, as the cache says."""
    info = json.loads((Path(images.path).parent / "info.json").read_text())
    known = ("resolution", "num_channels", "crop")
    return {
        **{name: info[name] for name in known},
        "source": {name: value for name, value in info.items() if name not in (*known, "shape", "name")},
        "resize": "box filter to shrink, bicubic to enlarge (Pillow)",
        "rounding": "to 8 bits: clamped to [0, 1], times 255, to the nearest",
    }


def _compared(judges: list[Judge], observed: dict) -> dict:
    """What [`evaluate`] returns as `sets`."""
    sets = {}
    for name, batches in observed.items():
        results = [judge.compare(kept) for judge, kept in zip(judges, zip(*batches, strict=True), strict=True)]
        sets[name] = {
            "distances": {
                judge.extractor.name: {key: result[key] for key in ("distance", "frechet", "kernel")}
                for judge, result in zip(judges, results, strict=True)
            },
            "ndb": results[0]["ndb"],
        }
    for judge in judges:
        unit = sets["downsample"]["distances"][judge.extractor.name]["frechet"]
        for each in sets.values():
            distance = each["distances"][judge.extractor.name]
            distance["frechet_over_downsample"] = distance["frechet"] / unit if unit else None
    return sets


def results_table(results: dict) -> str:
    """What [`evaluate`] returned, for people."""
    protocol, sets = results["protocol"], results["sets"]
    crop = "largest square" if protocol["crop"] is None else f"{protocol['crop']} pixels"
    blocks = [
        f"{protocol['images']} {protocol['split']}: {protocol['num_images']:,} images in every set,"
        f" {protocol['resolution']} x {protocol['resolution']}, crop: {crop}, seed {protocol['seed']}\n"
        f"real against real: {protocol['real']}" + (" (needs as many more)" if "real" not in sets else "")
    ]
    for extractor in protocol["extractors"]:
        found = {name: each["distances"][extractor["extractor"]] for name, each in sets.items()}
        block = [[found["downsample"]["distance"], "", "/ downsample", "kernel"]]
        for name, each in found.items():
            ratio, kernel = each["frechet_over_downsample"], each["kernel"]
            shown = "-" if ratio is None else f"{ratio:.3f}", "-" if kernel is None else f"{kernel[0]:.3g}"
            block.append([name, f"{each['frechet']:.4g}", *shown])
        blocks.append(_aligned(block))
    if bins := list(sets["downsample"]["ndb"]):
        split, count = protocol["training_split"], protocol["num_training_images"]
        block = [[f"bins of {split}, {count:,}"] + [f"{figure}/{k}" for k in bins for figure in ("NDB", "JS")]]
        for name, each in sets.items():
            pairs = [each["ndb"][k] for k in bins]
            block.append([name] + [text for p in pairs for text in (f"{p['ndb_over_k']:.3f}", f"{p['js']:.4f}")])
        blocks.append(_aligned(block))
    block = []
    for prefix, title in (("autoencoder_", "autoencoder alone"), ("", "whole model")):
        if f"{prefix}psnr" in results:
            error, decibels = results[f"{prefix}squared_error"], results[f"{prefix}psnr"]
            block.append([f"squared error per image, {title}", f"{error:.2f}", f"PSNR {decibels:.2f} dB"])
    for stage, title in (("vae", "first VAE"), ("second_stage", "second stage")):
        if each := results.get(stage):
            units = f"{each['active_units_by_variance']} of {each['latent_dim']}"
            block.append([f"{title}: active units", units, f"by Burda's count {each['active_units']}"])
            block.append([f"{title}: KL", f"{each['kl']:.2f} nats", f"gamma {each['gamma']:.3g}"])
    block.append(["first VAE: MMD of q(z) and N(0, I)", f"{results['vae']['mmd']:.3g}"])
    if each := results.get("likelihood"):
        block.append(["ELBO per image", f"{each['elbo']:.2f} nats"])
        samples = f"{each['num_importance_samples']} importance samples"
        block.append(["negative log-likelihood per image", f"{each['nll']:.2f} nats", samples])
    return "\n\n".join([*blocks, _aligned(block)])


def _aligned(rows: list[list[str]]) -> str:
    """Rows of text in columns: the first to the left, the others to the right."""
    columns = range(max(map(len, rows)))
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in columns]
    lines = []
    for row in rows:
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=False)]
        lines.append("  ".join([row[0].ljust(widths[0]), *padded[1:]]).rstrip())
    return "\n".join(lines)


@cache
def _commit() -> str | None:
    """Of the code, at the first call: a long process must not name what was committed while it ran."""
    git = subprocess.run(
        ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return git.stdout.strip() or None


def provenance() -> dict:
    """What a number needs to be believed: the command, the commit, the date, the machine and the versions.

    Absolute paths in the command are cut to their last part: where a folder lay on a machine concerns nobody. Tokens
    are left out.
    """
    import diffusers
    import transformers

    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv]
    return {
        "command": redacted(" ".join(words)),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.cuda.device_count()} GPUs",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, diffusers)},
    }


def report(pipe, images, run_dirs: dict[str, Path], output_dir: Path, seed: int, num_factors: int | None) -> dict:
    """Leave in `output_dir` what a person looks at first, and return the summary.

    `samples.png`, `reconstructions.png` (pairs), `interpolation.png`, `curves.png` and `summary.json`.

    Args:
        pipe, images: as in `summarize`.
        run_dirs: stage name -> folder with that stage's `stats.jsonl`.
        seed: seed of the samples.
        num_factors: r, where it is known.
    """
    pipe.set_progress_bar_config(disable=True)
    first = images.pixels(0, 32)
    samples = pipe(64, torch.Generator().manual_seed(seed), output_type="pt").images
    scale = max(1, 64 // images.resolution)  # small images are drawn larger, for people
    image_grid(samples, scale=scale).save(output_dir / "samples.png")
    pairs = torch.stack([first, pipe.reconstruct(first, output_type="pt")], 1).flatten(0, 1)
    image_grid(pairs, columns=8, scale=scale).save(output_dir / "reconstructions.png")
    ways = max(1, len(first) // 4)
    path = pipe.interpolate(first[:ways], first[ways : 2 * ways], steps=9, output_type="pt")
    image_grid(path.flatten(0, 1), columns=9, scale=scale).save(output_dir / "interpolation.png")
    plot_curves(run_dirs, output_dir / "curves.png", num_factors)
    summary = {**provenance(), "images": images.name, "num_factors": num_factors, "seed": seed}
    summary.update(summarize(pipe, images))
    write_json(output_dir / "summary.json", summary)
    return summary
