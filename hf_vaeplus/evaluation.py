"""Figures that say what a pipeline has learnt, measured on a set of images."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .features import FeatureExtractor, distance_name
from .metrics.frechet import frechet_distance
from .metrics.kernel import kernel_distance
from .metrics.latents import active_units, active_units_by_variance, kl_per_dimension
from .metrics.ndb import NDB
from .metrics.running import RunningMoments
from .pictures import image_grid, plot_curves


@torch.no_grad()
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
    errors = {"autoencoder_squared_error": 0.0, "squared_error": 0.0}
    posteriors = {"vae": [], "second_stage": []}
    for start in tqdm(range(0, count, batch_size), desc="measuring"):
        pixels = images.pixels(start, min(start + batch_size, count))
        if pipe.autoencoder is not None:
            device = pipe.autoencoder.device
            floor = pipe.autoencoder(pixels.to(device)).reconstruction.float().cpu().clamp(0, 1)
            errors["autoencoder_squared_error"] += float((floor - pixels).double().square().sum())
        posterior = pipe.encode(pixels, batch_size)
        errors["squared_error"] += float((pipe.decode(posterior.mean) - pixels).double().square().sum())
        posteriors["vae"].append(posterior)
        if pipe.second_stage is not None:
            noise = torch.randn(posterior.mean.shape, generator=generator)
            z = posterior.sample(noise).to(pipe.second_stage.device)
            posteriors["second_stage"].append(pipe.second_stage.encode(z))
    if pipe.autoencoder is None:
        del errors["autoencoder_squared_error"]
    summary = {"num_images": count, **{name: total / count for name, total in errors.items()}}
    for stage, parts in posteriors.items():
        if parts:
            means, logvars = (torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("mean", "logvar"))
            kl = kl_per_dimension(means, logvars)
            summary[stage] = {
                "gamma": float(getattr(pipe, stage).decoder_log_variance.exp()),
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
        features, counts = [], [0] * len(self.bins)
        for batch in images:
            features.append(self.gather(self.extractor(batch)))
            for number, ndb in enumerate(self.bins):
                counts[number] = counts[number] + self.gather(ndb.assign(batch)).bincount(minlength=len(ndb.counts))
        features = torch.cat(features)
        moments = RunningMoments(features.shape[1])
        moments.update(features)
        compared = [ndb.compare(count) for ndb, count in zip(self.bins, counts, strict=True)]
        enough = min(len(features), len(self._features)) >= 1_000
        return {
            "distance": distance_name(self.extractor),
            "frechet": frechet_distance(self._moments, moments),
            "kernel": kernel_distance(self._features, features) if enough else None,
            "num_images": len(features),
            "num_reference": len(self._features),
            "ndb": {
                str(len(each["proportions"])): {name: each[name] for name in ("ndb_over_k", "js")} for each in compared
            },
        }


def provenance() -> dict:
    """What a number needs to be believed: the command, the commit, the date, the machine and the versions."""
    import diffusers
    import transformers

    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": git.stdout.strip() or None,
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
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary
