"""All metrics of a pipeline in one protocol, on one or many processes.

The parts are for scripts: `Judge` compares sets of images, `sample_images` and `sample_mixture` draw them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from sklearn.mixture import GaussianMixture
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from ..data.pixels import to_uint8, to_unit_range
from ..files import build_once
from ..metrics.kernel import kernel_distance
from ..metrics.likelihood import elbo, importance_weighted
from ..metrics.memorisation import MemorisationGuard
from ..metrics.mmd import imq_mmd
from ..metrics.ndb import NDB
from ..metrics.prdc import NAMES
from ..metrics.reconstruction import psnr
from ..progress import tqdm
from ..provenance import stage_fingerprints
from ..training.randomness import derived_seed
from .comparison import NUM_NEIGHBOURS, FeatureComparison, copies_sentence, warnings_of
from .features import FeatureExtractor, distance_name
from .summaries import joined, pass_through, summary_of

if TYPE_CHECKING:
    from ..data.cache import ImageDataset
    from ..pipeline_vaeplus import VAEPlusPipeline

SAMPLERS = ("second_stage", "mean", "sharpened", "prior", "mixture", "gaussian")


_COMPONENTS = {"mixture": 10, "gaussian": 1}


# What the noise of an evaluation is for: `derived_seed(seed, purpose, image)`. Training has the numbers below 4.
_SAMPLES, _POSTERIORS, _PRIOR, _IMPORTANCE, _DETAIL = 4, 5, 6, 7, 8


class Judge:
    """How far sets of images are from a reference set, in one protocol for all of them.

    Args:
        extractor ([`~hf_vaeplus.evaluation.features.FeatureExtractor`]): of all distances.
        reference (iterable of uint8 `torch.Tensor` of shape `(batch, C, H, W)`): real images, held out from training.
        bins (sequence of [`~hf_vaeplus.metrics.ndb.NDB`]): fitted on training images.
        gather: joins the rows of all processes: `accelerator.gather_for_metrics` where each sees a share of a batch.
        training (iterable of batches as in `reference`, *optional*): training images, for the guard against copies.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        reference: Iterable[torch.Tensor],
        bins: Sequence[NDB] = (),
        gather: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
        training: Iterable[torch.Tensor] | None = None,
    ):
        self.extractor, self.bins, self.gather = extractor, bins, gather
        held_out = torch.cat([gather(extractor(batch)) for batch in reference])
        copied = None if training is None else torch.cat([gather(extractor(batch)) for batch in training])
        self.comparison = FeatureComparison(held_out, copied)
        self.rounding = self.comparison.rounding

    def __call__(self, images: Iterable[torch.Tensor]) -> dict:
        """Distances of `images`, batches as in the reference.

        Returns:
            `dict`, ready for JSON, with `distance` (the name of `frechet`), `frechet`, `kernel` (mean, standard
            deviation; `None` with fewer than 1,000 images), `sliced_wasserstein`, `prdc` (`precision`, `recall`,
            `density`, `coverage`; `None` with fewer than 6 images), `memorised` (`share`, `limit` and `flagged`;
            `None` without training images), `num_images`, `num_reference`, and `ndb`: K -> `ndb_over_k` and `js`.
        """
        return self.told(self.compare([self.observe(batch) for batch in images]))

    def observe(self, batch: torch.Tensor) -> list[torch.Tensor]:
        """What is kept of a batch: its features, then the bin of every image for each of `bins`."""
        return [self.gather(rows) for rows in (self.extractor(batch), *(ndb.assign(batch) for ndb in self.bins))]

    def compare(self, observed: Iterable[list[torch.Tensor]]) -> dict:
        """What [`Judge.told`] shortens, from what [`Judge.observe`] kept of all batches, with the `features`."""
        features, *assigned = (torch.cat(parts) for parts in zip(*observed, strict=True))
        reference = self.comparison.reference
        enough = min(len(features), len(reference)) >= 1_000
        found = {}
        for ndb, numbers in zip(self.bins, assigned, strict=True):
            compared = ndb.compare(numbers.bincount(minlength=len(ndb.counts)))
            found[str(len(ndb.counts))] = {name: compared[name] for name in ("ndb_over_k", "js")}
        return {
            "distance": distance_name(self.extractor),
            "features": features,
            **self.comparison(features),
            "kernel": kernel_distance(reference, features) if enough else None,
            "num_images": len(features),
            "num_reference": len(reference),
            "ndb": found,
        }

    @staticmethod
    def told(compared: dict) -> dict:
        """The result of `__call__`, from that of [`Judge.compare`]."""
        prdc = compared["prdc"] and {name: compared["prdc"][name] for name in NAMES}
        return {name: value for name, value in compared.items() if name != "features"} | {"prdc": prdc}


def sample_images(
    pipe: "VAEPlusPipeline",
    batches: Iterable[Sequence[int]],
    seed: int = 0,
    **wanted,
) -> Iterator[torch.Tensor]:
    """Samples of a pipeline: image i is a function of (seed, i), whatever its batch and the number of processes.

    Args:
        pipe ([`VAEPlusPipeline`]).
        batches: the numbers of the images of each batch, say `torch.arange(10_000).split(100)`.
        seed (`int`): not negative.
        wanted: `sharpness`, `deterministic` and the like, see the pipeline.

    Yields:
        uint8 `torch.Tensor` of shape `(batch, C, H, W)`.
    """
    for numbers in batches:
        generators = _generators(seed, _SAMPLES, numbers)
        drawn = pipe(len(generators), generators, decode_batch_size=len(generators), output_type="pt", **wanted)
        yield to_uint8(drawn.images)


@torch.no_grad()
def sample_mixture(
    pipe: "VAEPlusPipeline",
    codes: torch.Tensor,
    batches: Iterable[Sequence[int]],
    num_components: int = 10,
    seed: int = 0,
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
            images = pipe.decode(latents, "pt", len(latents))
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
    return images.batch(list(numbers))["pixel_values"]


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
    pipe: "VAEPlusPipeline",
    images: "ImageDataset",
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
        images ([`~hf_vaeplus.data.cache.ImageDataset`]): of the pipeline's size and channels.
        extractors: of the distances, with different names.
        samplers: `"second_stage"`, the pipeline itself; `"mean"`, the pipeline with `deterministic=True`, without
            detail; `"sharpened"`, such means at `sharpness=1`; `"prior"`,
            without its second stage; `"mixture"` and `"gaussian"`, 10 Gaussians and 1 fitted to the codes of training
            images ([`sample_mixture`]). By default the pipeline as it is.
        num_images (`int`): at least 2; all of `images` where there are fewer.
        training_images ([`~hf_vaeplus.data.cache.ImageDataset`], *optional*): what the pipeline was trained on: the
            guard looks for copies of them, and bins and mixtures are fitted to them.
        num_training_images (`int`): only so many of them, the first.
        num_bins: K of each NDB; bins of training images, whitened and not mirrored, kept beside the image cache.
        num_importance_samples (`int`): per image, for likelihoods; 0 leaves them out.
        seed (`int`): of all noise; every image has its own generator.
        batch_size (`int`): images at a time, per process.

    Returns:
        `dict`, ready for JSON. `protocol`: what has to be equal for two results to be compared; the images may have
        another name where `fingerprint`, their content, is equal. `weights`: stage -> fingerprint. The keys of
        [`summarize`], with `psnr` and `autoencoder_psnr` (dB, means over images, `None` where one has no error) and
        `vae.mmd`, that of q(z) and N(0, I) by [`~hf_vaeplus.metrics.mmd.imq_mmd`]. `likelihood`, where it was asked
        for: `elbo` and `nll`, the importance-weighted one, in nats per image. `guard`: `None` without training images,
        else space (`"codes"` or an extractor) -> attributes of the
        [`~hf_vaeplus.metrics.memorisation.MemorisationGuard`]. `sliced_limits`: extractor -> the sliced distance that
        other real images stay below (`None` without a set `real`). `sets`: name -> `distances` (extractor
        -> `distance`, `frechet`, `frechet_over_downsample` (`None` where downsampling changes no feature), `kernel`,
        `sliced_wasserstein`, `prdc`, `memorised`, as in [`Judge`]), `memorised_codes` and `ndb` (K -> `ndb_over_k`,
        `js`), of `real` (images that are not the reference, where there are enough), `downsample`, `autoencoder`,
        `reconstruction`, `detail` (reconstructions with it, of a pipeline that has it) and each sampler; for a sampler
        `warnings` as well, sentences by
        [`~hf_vaeplus.evaluation.comparison.warnings_of`].

    Raises:
        ValueError: images of another size, an unknown sampler, a number out of range, or something asked for that the
            pipeline or the images cannot give; a pipeline without a first VAE.
    """
    count = min(num_images, len(images))
    num_training = 0 if training_images is None else min(num_training_images, len(training_images))
    samplers = list(dict.fromkeys(samplers)) or ["prior" if pipe.second_stage is None else "second_stage"]
    _check(pipe, images, extractors, samplers, count, num_training, num_bins, num_importance_samples, seed, batch_size)
    for extractor in extractors:
        extractor(_uint8(images, [0]))  # what it refuses, it refuses before the work
    shares = _Shares(batch_size)

    def real(name, source=images, first=0, number_of=count):
        for numbers in shares(number_of, name):
            yield _uint8(source, [first + number for number in numbers])

    def encoded(batches):
        return torch.cat([shares.gather(_code(pipe, to_unit_range(batch))) for batch in batches])

    bins = []
    for k in tqdm(num_bins, desc="k-means", disable=not (num_bins and shares.accelerator.is_main_process)):
        bins.append(_fitted_bins(training_images, num_training, k))

    def training():
        return real("training images", training_images, 0, num_training) if num_training else None

    judges, codes, guard = [], None, None
    for position, extractor in enumerate(extractors):
        judges.append(Judge(extractor, real("reference"), bins if position == 0 else (), shares.gather, training()))
    if num_training:
        codes = encoded(training())
        guard = MemorisationGuard(codes, encoded(real("reference")))

    def observe(batch):
        kept = [judge.observe(batch) for judge in judges]
        return kept if guard is None else [*kept, [shares.gather(_code(pipe, to_unit_range(batch)))]]

    observed = {}  # set -> batch by batch, what each judge keeps of it
    others = _other_images(images, training_images, count)
    if others is not None:
        observed["real"] = [observe(batch) for batch in real("real", *others)]
    observed["downsample"] = [observe(downsample(batch)) for batch in real("downsample")]
    rows = []
    for numbers in shares(count, "reconstructions"):
        noise = [torch.randn(pipe.vae.config.latent_dim, generator=g) for g in _generators(seed, _POSTERIORS, numbers)]
        reconstructions, found = pass_through(pipe, to_unit_range(_uint8(images, numbers)), torch.stack(noise))
        rows.append({name: shares.gather(values) for name, values in found.items()})
        if pipe.detail is not None:
            drawn = dict(deterministic=False, generator=_generators(seed, _DETAIL, numbers))
            reconstructions["detail"] = pipe.decode(found["vae_mean"], "pt", len(numbers), **drawn)
        for name, reconstruction in reconstructions.items():
            observed.setdefault(name, []).append(observe(to_uint8(reconstruction)))
    for sampler in samplers:
        batches = shares(count, sampler)
        if sampler in _COMPONENTS:
            drawn = sample_mixture(pipe, codes, batches, _COMPONENTS[sampler], seed)
        else:
            sampled = type(pipe)(pipe.vae, pipe.autoencoder, detail=pipe.detail) if sampler == "prior" else pipe
            is_mean = sampler in ("mean", "sharpened")
            drawn = sample_images(
                sampled, batches, seed, sharpness=float(sampler == "sharpened"), deterministic=is_mean
            )
        observed[sampler] = [observe(batch) for batch in drawn]

    rows = joined(rows)
    summary = summary_of(pipe, rows)
    for prefix, name in (("autoencoder_", "autoencoder"), ("", "reconstruction")):
        if name in observed:
            decibels = float(psnr(rows[f"{name}_error"], images[0]["pixel_values"].numel()).mean())
            summary[f"{prefix}psnr"] = decibels if math.isfinite(decibels) else None
    prior = torch.randn(rows["z"].shape, generator=_generators(seed, _PRIOR, [0])[0])
    summary["vae"]["mmd"] = float(imq_mmd(rows["z"], prior))
    if num_importance_samples:
        summary["likelihood"] = _likelihood(pipe, images, count, num_importance_samples, seed, shares)
    protocol = {
        "images": images.name,
        "split": images.split,
        "fingerprint": images.fingerprint,
        "num_images": count,
        **_preparation(images),
        "real": "none" if others is None else f"{others[0].name} {others[0].split}, {count} from image {others[1]} on",
        "training_split": training_images.split if num_training else None,
        "num_training_images": num_training,
        "training_images_left_out": len(training_images) - num_training if num_training else 0,
        "extractors": [extractor.description() for extractor in extractors],
        "samplers": samplers,
        "num_neighbours": NUM_NEIGHBOURS,
        "seed": seed,
        "batch_size": batch_size,
        "num_processes": shares.accelerator.num_processes,
    }
    weights = stage_fingerprints(pipe.components)
    copies = others is not None and others[0] is training_images
    return {
        "protocol": protocol,
        "weights": weights,
        **summary,
        **_compared(judges, guard, observed, samplers, copies),
    }


def _check(
    pipe, images, extractors, samplers, count, num_training, num_bins, num_importance_samples, seed, batch_size
):
    pipe.need_vae("posteriors to measure")
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


def _fitted_bins(images, count: int, num_bins: int) -> NDB:
    """Bins of the first `count` images, fitted once and kept beside the image cache."""
    key = hashlib.sha256(f"NDB 1 {images.fingerprint} {count} {num_bins}".encode()).hexdigest()[:32]
    path = Path(images.path).parent.parent / "bins" / f"{key}.safetensors"

    def build(path: Path):
        NDB.fit(_uint8(images, range(count)), num_bins).save(path)

    return build_once(path, build, NDB.load)


def _other_images(images, training_images, count: int) -> tuple | None:
    """As many real images that are not the reference, as a data set and the first row of it; `None` without them."""
    if len(images) >= 2 * count:
        return images, count
    if training_images is None or len(training_images) < count:
        return None
    mine, theirs = images.rows[:count], training_images.rows[:count]
    if images.path == training_images.path and np.intersect1d(mine, theirs).size:
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
    info = json.loads((Path(images.path).parent / "info.json").read_text(encoding="utf-8"))
    known = ("resolution", "num_channels", "crop")
    return {
        **{name: info[name] for name in known},
        "source": {name: value for name, value in info.items() if name not in (*known, "shape", "name")},
        "resize": "box filter to shrink, bicubic to enlarge (Pillow)",
        "rounding": "to 8 bits: clamped to [0, 1], times 255, to the nearest",
    }


def _compared(
    judges: list[Judge], guard: MemorisationGuard | None, observed: dict, samplers: list[str], real_is_training: bool
) -> dict:
    """What [`evaluate`] returns as `guard`, `sliced_limits` and `sets`."""
    compared, memorised = {}, {}
    for name, batches in observed.items():
        *kept, codes = zip(*batches, strict=True) if guard else (*zip(*batches, strict=True), None)
        compared[name] = [judge.compare(each) for judge, each in zip(judges, kept, strict=True)]
        memorised[name] = guard and guard.compare(torch.cat([rows for (rows,) in codes]))
    limits = [None] * len(judges)
    if real := compared.get("real"):
        limits = [j.comparison.sliced_limit(each["features"]) for j, each in zip(judges, real, strict=True)]
    sets = {}
    for name, results in compared.items():
        told = [Judge.told(result) for result in results]
        if name == "real" and real_is_training:  # of course they are found
            memorised[name] = None
            told = [{**each, "memorised": None} for each in told]
        keys = ("distance", "frechet", "kernel", "sliced_wasserstein", "prdc", "memorised")
        sets[name] = {
            "distances": {
                judge.extractor.name: {key: each[key] for key in keys}
                for judge, each in zip(judges, told, strict=True)
            },
            "memorised_codes": memorised[name],
            "ndb": told[0]["ndb"],
        }
        if name in samplers:
            copies = memorised[name]
            warnings = [f"codes: {copies_sentence(copies)}"] if copies and copies["flagged"] else []
            for position, (judge, result) in enumerate(zip(judges, results, strict=True)):
                said = warnings_of(result, real and real[position], limits[position])
                warnings += [f"{judge.extractor.name}: {sentence}" for sentence in said]
            sets[name]["warnings"] = warnings
    for judge in judges:
        unit = sets["downsample"]["distances"][judge.extractor.name]["frechet"]
        for each in sets.values():
            distance = each["distances"][judge.extractor.name]
            distance["frechet_over_downsample"] = distance["frechet"] / unit if unit > judge.rounding else None
    guards = {"codes": guard, **{judge.extractor.name: judge.comparison.guard for judge in judges}}
    known = ("threshold", "copies", "reach", "sees")
    return {
        "guard": guard and {space: {name: getattr(each, name) for name in known} for space, each in guards.items()},
        "sliced_limits": {judge.extractor.name: limit for judge, limit in zip(judges, limits, strict=True)},
        "sets": sets,
    }
