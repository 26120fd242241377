"""What a training run ends with: errors, posterior statistics, and pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import write_json
from ..metrics.latents import active_units, active_units_by_variance, kl_per_dimension
from ..metrics.reconstruction import squared_error
from ..pictures import image_grid, plot_curves
from ..progress import tqdm
from ..provenance import provenance, stage_fingerprints

if TYPE_CHECKING:
    from ..data.cache import ImageDataset
    from ..pipeline_vaeplus import VAEPlusPipeline

MAX_IMAGES = 2_000  # that `summarize` measures on
REPORT_FILES = ("samples.png", "reconstructions.png", "interpolation.png", "curves.png", "summary.json")


def summarize(
    pipe: "VAEPlusPipeline", images: "ImageDataset", max_images: int = MAX_IMAGES, batch_size: int = 100
) -> dict:
    """Reconstruction errors and posterior statistics of each stage, over the first `max_images` of `images`.

    Args:
        pipe ([`VAEPlusPipeline`]).
        images ([`~hf_vaeplus.data.cache.ImageDataset`]): uint8 images of the pipeline's size.

    Returns:
        `dict` with `num_images`; `autoencoder_squared_error` and `squared_error` (per-image sums of squares on
        [0, 1] pixels, through the autoencoder alone and through the posterior mean of the whole model); and for `vae`
        and `second_stage` a `dict` of `gamma`, `kl` (nats), `kl_per_dimension`, `active_units` (variance of posterior
        means above 0.01), `active_units_by_variance` (mean posterior variance below 1/2), `latent_dim`. A second stage
        that is no VAE has `model`, its name, `active_dims`, how many dimensions it learns, and `latent_dim`.

    Raises:
        ValueError: a pipeline without a first VAE.
    """
    pipe.need_vae("posteriors to summarise")
    count = min(max_images, len(images))
    generator = torch.Generator().manual_seed(0)
    rows = []
    for start in tqdm(range(0, count, batch_size), desc="measuring"):
        pixels = images.pixels(start, min(start + batch_size, count))
        noise = torch.randn(len(pixels), pipe.vae.config.latent_dim, generator=generator)
        rows.append(pass_through(pipe, pixels, noise)[1])
    return summary_of(pipe, joined(rows))


@torch.no_grad()
def pass_through(pipe: "VAEPlusPipeline", pixels: torch.Tensor, noise: torch.Tensor) -> tuple[dict, dict]:
    """One batch through the stages, each encoder and decoder once.

    Returns:
        The reconstructions in [0, 1] by what made them, and the rows that the figures are made from, all on the CPU.
    """
    reconstructions, code = {}, pixels.to(pipe.vae.device)
    if pipe.autoencoder is not None:
        code = pipe.autoencoder.encode(code)
        reconstructions["autoencoder"] = pipe.autoencoder.decode(code).float().cpu().clamp(0, 1)
    posterior = pipe.vae.encode(code)
    reconstructions["reconstruction"] = pipe.decode(posterior.mean, "pt", len(pixels))
    z = posterior.sample(noise.to(posterior.mean.device))
    posteriors = {"vae": posterior}
    if hasattr(pipe.second_stage, "encode"):
        posteriors["second_stage"] = pipe.second_stage.encode(z)
    rows = {f"{name}_error": squared_error(images, pixels) for name, images in reconstructions.items()}
    for stage, each in posteriors.items():
        rows |= {f"{stage}_mean": each.mean.cpu(), f"{stage}_logvar": each.logvar.cpu()}
    return reconstructions, {**rows, "z": z.cpu()}


def joined(batches: list[dict]) -> dict:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def summary_of(pipe: "VAEPlusPipeline", rows: dict) -> dict:
    """What [`summarize`] returns, from the rows of all images."""
    summary = {"num_images": len(rows["z"])}
    if pipe.autoencoder is not None:
        summary["autoencoder_squared_error"] = float(rows["autoencoder_error"].mean())
    summary["squared_error"] = float(rows["reconstruction_error"].mean())
    for stage in ("vae", "second_stage"):
        if f"{stage}_mean" in rows:
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
    if pipe.second_stage is not None and "second_stage" not in summary:
        config = pipe.second_stage.config
        kind = config.model_type.removeprefix("vaeplus_")
        summary["second_stage"] = {"model": kind, "active_dims": config.num_active, "latent_dim": config.latent_dim}
    return summary


def report(
    pipe: "VAEPlusPipeline",
    images: "ImageDataset",
    run_dirs: dict[str, Path],
    output_dir: Path,
    seed: int,
    num_factors: int | None,
    images_are: str | None = None,
) -> dict:
    """Write `REPORT_FILES` to `output_dir`, for people to look at first, and return the summary.

    `reconstructions.png` shows pairs of an image and its reconstruction.

    Args:
        pipe, images: as in `summarize`.
        run_dirs: stage name -> folder with that stage's `stats.jsonl`.
        seed: seed of the samples.
        num_factors: r, where it is known.
        images_are: "seen", "unseen" or "partly seen" in training, where it is known.
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
    summary = {**provenance(), "images": images.name, "images_are": images_are}
    summary |= {"num_factors": num_factors, "seed": seed}
    summary |= {"fingerprint": images.fingerprint, "weights": stage_fingerprints(pipe.components)}
    summary.update(summarize(pipe, images))
    write_json(output_dir / "summary.json", summary)
    return summary
