"""What the verdict is made of: every figure of a diagnosis, from a model and its images."""

import math

import torch
from torch.nn.functional import adaptive_avg_pool2d

from ..metrics.frechet import frechet_distance
from ..metrics.intrinsic_dimension import corrected_dimensions, nearest_distances
from ..metrics.latents import active_units, active_units_by_variance, kl_per_dimension
from ..metrics.mmd import imq_mmd
from ..metrics.redundancy import determined_share
from ..metrics.running import RunningMoments
from ..training.randomness import derived_seed
from .models import Autoencoder, as_floats, decode_all, encode_all
from .verdict import LOSS_OF_UNIT

MOST_UNITS = 256  # units of a large code that distances and dimensions are measured on
MIN_IMAGES = 100

_SAMPLES, _PRIOR, _SECOND, _SHUFFLE, _DIRECTIONS, _GAUSSIAN = range(20, 26)  # purposes of `derived_seed`


@torch.no_grad()
def measure(model: Autoencoder, images: torch.Tensor, seed: int = 0, batch_size: int = 64) -> dict:
    """All figures of a diagnosis.

    Args:
        model ([`~hf_vaeplus.diagnosis.models.Autoencoder`]).
        images (`torch.Tensor` of shape `(n >= 100, *shape)`): uint8, or floats in the range that the model was
            trained on, in random order. Best images that it was not trained on.
        seed (`int`): of all noise.
        batch_size (`int`): images at a time.

    Returns:
        `dict` that JSON can hold; [docs/diagnose.md](docs/diagnose.md) names each entry.

    Raises:
        ValueError: too few images, or a model whose output has another shape or is not finite.
    """
    if len(images) < MIN_IMAGES:
        raise ValueError(f"a diagnosis needs at least {MIN_IMAGES} images, got {len(images)}: name a larger set.")

    def noise(purpose: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(derived_seed(seed, purpose)))

    mean, logvar = encode_all(model, images, batch_size)
    code_shape = tuple(mean.shape[1:])
    mean, logvar = mean.flatten(1), None if logvar is None else logvar.flatten(1)
    sigma = torch.zeros(()) if logvar is None else (0.5 * logvar).exp()
    z = mean + sigma * noise(_SAMPLES, *mean.shape)
    found = {
        "model": model.name,
        "num_images": len(images),
        "image_shape": list(images.shape[1:]),
        "code_shape": list(code_shape),
        "latent_dim": mean.shape[1],
        "deterministic": logvar is None,
        "seed": seed,
    }

    def decode(codes: torch.Tensor, decoder=None) -> torch.Tensor:
        return decode_all(decoder or model.decode, codes.unflatten(1, code_shape), model.device, batch_size)

    few = images[:1_000]
    targets, decoded, sampled = as_floats(few).flatten(1), decode(mean[:1_000]), decode(z[:1_000])
    if decoded.shape != few.shape or not bool(decoded.isfinite().all() and sampled.isfinite().all()):
        raise ValueError(
            f"decode must return finite images of shape {tuple(few.shape)}, got {tuple(decoded.shape)}: check the size"
            " of the images and the order (encode, decode)."
        )
    decoded, sampled = decoded.flatten(1), sampled.flatten(1)
    found["error"] = _error(targets, decoded, sampled)
    spread = found["error"]["variance"]
    if not spread > 0:
        raise ValueError("all images are the same: a diagnosis needs images that differ.")
    found["units"], active = _units(mean, logvar)
    found["gamma"] = _gamma(model, few, targets, decoded, sampled, mean, z, logvar, decode, batch_size)
    found["dimensions"] = _dimensions(
        mean,
        logvar,
        z,
        code_shape,
        decode,
        spread,
        torch.Generator().manual_seed(derived_seed(seed, _SHUFFLE)),
    )
    losses = [row["loss"] for row in found["dimensions"] if row["loss"] is not None]
    found["units"]["by_loss"] = sum(loss > LOSS_OF_UNIT for loss in losses)
    found["units"]["by_loss_of"] = len(losses)
    found["jacobian_rank"] = _jacobian_rank(mean, active, decode)

    chosen = _evenly(active, MOST_UNITS)
    found["intrinsic_dimension"] = {"images": _intrinsic(_small(images)), "codes": None}
    found["redundancy"] = {"half": 0.0, "three_quarters": 0.0}
    if len(chosen) > 1:
        codes = mean[:, chosen]
        found["intrinsic_dimension"]["codes"] = _intrinsic(codes)
        for name, share in (("half", 0.5), ("three_quarters", 0.75)):
            found["redundancy"][name] = determined_share(codes, share)

    everything = _evenly(torch.arange(mean.shape[1]), MOST_UNITS)
    dim = mean.shape[1]
    rivals = {"prior": noise(_PRIOR, len(z), dim)}
    center, deviation = z.mean(0), z.std(0)
    rivals["scaled_prior"] = center + deviation * noise(_GAUSSIAN, len(z), dim)
    if model.second_stage is not None:
        stage = model.second_stage
        u, eps = noise(_SECOND, len(z), stage.config.latent_dim + dim).split((stage.config.latent_dim, dim), 1)
        pairs = zip(u.split(512), eps.split(512), strict=True)
        rivals["second_stage"] = torch.cat(
            [stage.sample(a.to(stage.device), b.to(stage.device)).float().cpu() for a, b in pairs]
        )
        found["second_stage"] = {"latent_dim": stage.config.latent_dim}
        if hasattr(stage, "encode"):  # a VAE
            posteriors = [stage.encode(part.to(stage.device)) for part in z.split(512)]
            found["second_stage"] |= {
                "active_units": active_units_by_variance(torch.cat([p.logvar.cpu() for p in posteriors])),
                "gamma": math.exp(float(stage.decoder_log_variance)),
            }
    directions = noise(_DIRECTIONS, 64, len(everything))
    found["aggregate"] = {name: _distances(z, rows, everything, active, directions) for name, rows in rivals.items()}
    found["aggregate"]["variance"] = float(z.var(0).mean())
    found["aggregate"]["worst"] = _worst_axis(rivals, z)
    found["scale_factor"] = float(1 / z.std()) if float(z.std()) > 0 else None
    return found


def _error(targets, decoded, sampled) -> dict:
    """Squared errors per image; shares of the data's variance that are left; those that PCA would leave."""
    count = targets[0].numel()
    variance = float(targets.var(0).sum())
    at_mean, at_sample = (float((targets - each).square().sum(1).mean()) for each in (decoded, sampled))
    some = targets[:600].double()
    some = some - some.mean(0)
    values = torch.linalg.eigvalsh(some @ some.T).flip(0).clamp(min=0)
    left = 1 - values.cumsum(0) / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return {
        "num_values": count,
        "squared_error": at_mean,
        "squared_error_of_samples": at_sample,
        "variance": variance,
        "unexplained": at_mean / variance if variance else math.nan,
        "unexplained_of_samples": at_sample / variance if variance else math.nan,
        "unexplained_by_pca": [1.0, *left[:64].clamp(min=0).tolist()],  # by the number of components
    }


def _units(mean, logvar) -> tuple[dict, torch.Tensor]:
    """Counts of active units, and the numbers of those that count as active."""
    variances = mean.double().var(0)
    found = {"by_mean": active_units(mean), "by_variance": None}
    if logvar is None:  # the scale of the codes is arbitrary
        active = variances > 0.01 * variances.max()
        found["by_mean"] = int(active.sum())
    else:
        active = logvar.double().exp().mean(0) < 0.5
        found["by_variance"] = active_units_by_variance(logvar)
    found["active"] = int(active.sum())
    return found, active.nonzero().flatten()


def _gamma(model, few, targets, decoded, sampled, mean, z, logvar, decode, batch_size) -> dict | None:
    """The decoder variance beside the error, both per value, where gamma is measured.

    The stated gamma is the model's own. The implied one follows from the posteriors: where Eq. (2) is stationary in
    the posterior variances, 1 / s_j^2 = 1 + ||J_j||^2 / gamma, with J the Jacobian of the decoder. Noise of the
    posterior then moves the image by sum_j s_j^2 ||J_j||^2 = gamma sum_j (1 - s_j^2). A weight on the KL term counts
    as a factor of gamma.
    """
    if logvar is None:
        return None
    if model.decode_target is not None:
        targets = torch.cat([model.target(as_floats(part).to(model.device)).cpu() for part in few.split(batch_size)])
        decoded, sampled = (decode(codes[: len(few)], model.decode_target) for codes in (mean, z))
    targets, decoded, sampled = (each.flatten(1).float() for each in (targets, decoded, sampled))
    error = float((targets - sampled).square().mean())
    informed = float((1 - logvar[: len(few)].double().exp()).clamp(min=0).mean(0).sum())
    implied = float((sampled - decoded).square().sum(1).mean()) / informed if informed > 0.5 else None
    known = model.gamma if model.gamma is not None else implied
    return {
        "stated": model.gamma,
        "implied": implied,
        "error_per_value": error,
        "over_error": known / error if known is not None and error > 0 else None,
    }


def _dimensions(mean, logvar, z, code_shape, decode, spread, generator) -> list[dict]:
    """One row for each dimension of a vector, or for each channel of a map, whose KL is summed over positions."""
    groups = torch.arange(mean.shape[1]).reshape(code_shape[0], -1)  # (channels, positions)
    kl = None if logvar is None else kl_per_dimension(mean, logvar)
    posterior = None if logvar is None else logvar.double().exp().mean(0)
    variances = mean.double().var(0)
    weight = kl if kl is not None else variances
    probed = weight[groups].sum(1).argsort(descending=True)[:MOST_UNITS].tolist()
    count = min(len(z), max(16, min(128, 3_072 // len(probed))))
    before = decode(z[:count]).flatten(1)
    rows = []
    for unit, positions in enumerate(groups):
        row = {
            "unit": unit,
            "kl": None if kl is None else float(kl[positions].sum()),
            "posterior_variance": None if posterior is None else float(posterior[positions].mean()),
            "variance_of_mean": float(variances[positions].mean()),
            "loss": None,  # of the weakest units of a long code it is not measured
        }
        if unit in probed:
            replaced = z[:count].clone()
            # The values of other images: noise of the law that this unit has over the data.
            others = torch.randint(len(z), (count,), generator=generator)
            replaced[:, positions] = z[others][:, positions]
            row["loss"] = float((decode(replaced).flatten(1) - before).square().sum(1).mean()) / spread
        rows.append(row)
    return rows


def _jacobian_rank(mean, active, decode, most: int = 64) -> float | None:
    """exp of the entropy of the squared singular values of J S, as shares: J of the decoder, by central differences at
    a few codes; S the standard deviations of the active units. r equal directions give r (Roy and Vetterli, 2007).
    """
    units = _evenly(active, most)
    if not len(units):
        return 0.0
    deviation = mean.double().std(0).float()[units]
    step = 0.05 * deviation
    ranks = []
    for code in mean[: 8 if len(units) <= 32 else 4]:
        moved = code.repeat(2 * len(units), 1)
        moved[torch.arange(len(units)), units] += step
        moved[torch.arange(len(units)) + len(units), units] -= step
        ahead, behind = decode(moved).flatten(1).double().chunk(2)
        columns = (ahead - behind) / 0.1  # per standard deviation
        power = torch.linalg.eigvalsh(columns @ columns.T).clamp(min=0)
        if float(power.sum()) > 0:
            share = power / power.sum()
            ranks.append(float(torch.special.entr(share).sum().exp()))
    return math.fsum(ranks) / len(ranks) if ranks else 0.0


def _intrinsic(rows: torch.Tensor) -> dict | None:
    try:
        return corrected_dimensions(nearest_distances(rows[:5_000], 10))
    except ValueError:  # nearly all rows are copies
        return None


def _small(images: torch.Tensor) -> torch.Tensor:
    """Flattened images, averaged to at most 32 pixels a side: noise of single pixels is no dimension of the data."""
    if images.ndim == 4 and min(images.shape[2:]) > 32:
        return torch.cat([adaptive_avg_pool2d(as_floats(part), 32).flatten(1) for part in images.split(256)])
    return as_floats(images).flatten(1)


def _evenly(units: torch.Tensor, most: int) -> torch.Tensor:
    if len(units) <= most:
        return units
    return units[torch.linspace(0, len(units) - 1, most).round().long()]


def _distances(z, others, everything, active, directions) -> dict:
    """How far other latents are from q(z), both `(n, latent_dim)`.

    `sliced`: root mean square over random directions of the Wasserstein-2 distance; `worst_axis`: the largest over
    the units. `holes`: distance of the others to their nearest code, over that of codes to theirs, medians over the
    active units; above 1 the others lie where no codes are.
    """
    a, b = z[:, everything], others[:, everything]
    directions = directions / directions.norm(dim=1, keepdim=True)
    moments = [RunningMoments(len(everything)) for _ in range(2)]
    for each, rows in zip(moments, (a, b), strict=True):
        each.update(rows)
    half = len(z) // 2
    found = {
        "mmd": float(imq_mmd(a[:1_000], b[:1_000])),
        "frechet": frechet_distance(*moments),
        "sliced": float(_wasserstein(a @ directions.T, b @ directions.T).square().mean().sqrt()),
        "worst_axis": float(_wasserstein(a, b).max()),
        "holes": 1.0,
    }
    units = _evenly(active, MOST_UNITS)
    if len(units):
        codes = z[:half][:, units]
        theirs, ours = (
            torch.cat([torch.cdist(part, codes).amin(1) for part in rows[half : half + 1_000][:, units].split(250)])
            for rows in (others, z)
        )
        if float(ours.median()) > 0:
            found["holes"] = float(theirs.median() / ours.median())
    return found


def _worst_axis(rivals: dict, z: torch.Tensor) -> dict:
    """Densities of the unit in which codes and prior differ most, over 41 edges, for the figure."""
    unit = int(_wasserstein(z, rivals["prior"]).argmax())
    low, high = min(-4.0, float(z[:, unit].quantile(0.005))), max(4.0, float(z[:, unit].quantile(0.995)))
    edges = torch.linspace(low, high, 41)
    sets = {"codes": z, **{name: rows for name, rows in rivals.items() if name == "second_stage"}}
    return {
        "unit": unit,
        "edges": edges.tolist(),
        **{name: torch.histogram(rows[:, unit], edges, density=True).hist.tolist() for name, rows in sets.items()},
    }


def _wasserstein(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Wasserstein-2 distances of the columns of two matrices with equally many rows."""
    return (a.sort(0).values - b.sort(0).values).square().mean(0).sqrt()
