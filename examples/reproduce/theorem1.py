"""Theorem 1: every local minimum of the affine VAE is a global one, and regularization is balanced as gamma -> 0.

    python examples/reproduce/theorem1.py --scale cpu        # 4 minutes on one core; --scale smoke: seconds

Result: all 600 random starts at three sizes end at the optimum of probabilistic PCA (worst relative distance 1e-9), in
every one of the C(kappa, r) sets of r active units, or in as many as 200 equal draws would meet; 120 starts on the way
to gamma = 1e-4 likewise, with r active units and an expected squared error of r gamma.

The energy of Eq. (3), in closed form and float64 from the parameters of the real class (`network="affine"`,
`gamma="fixed"`), is minimised from random starts, of which none is dropped, restarted or continued. The data have mean
and covariance alone: r eigenvalues from 4 down to 1/2 in random directions, and d - r zeros.
"""

import math
import time
from collections import deque
from pathlib import Path

import torch
from common import reproduce
from torch import nn
from torch.func import functional_call, grad_and_value, hessian, vmap

from hf_vaeplus import GaussianPosterior, VAEPlusVAEConfig, VAEPlusVAEModel
from hf_vaeplus.modeling_vaeplus import gaussian_nll

# `sizes` and `descent_size` are (d, kappa, r): numbers in a sample, latent dimensions, rank of the data's covariance.
# `gammas` is the way down to gamma -> 0 at `descent_size`: 10 exceeds every eigenvalue, 1.5 some, the others none.
SETTINGS = {
    "smoke": dict(
        sizes=[(4, 3, 2), (6, 4, 2)], gamma=0.1, num_starts=20, descent_size=(4, 3, 2), gammas=[10.0, 1e-2],
        descent_starts=5, num_hessians=2, num_cells=4,
    ),
    "cpu": dict(
        sizes=[(6, 3, 2), (10, 5, 3), (20, 10, 4)], gamma=0.1, num_starts=200, descent_size=(10, 5, 3),
        gammas=[10.0, 1.5, 0.1, 1e-2, 1e-3, 1e-4], descent_starts=20, num_hessians=20, num_cells=9,
    ),
    "gpu": dict(
        sizes=[(6, 3, 2), (10, 5, 3), (20, 10, 4), (50, 20, 5), (100, 40, 8)], gamma=0.1, num_starts=2000,
        descent_size=(20, 10, 4), gammas=[10.0, 1.5, 0.1, 1e-2, 1e-3, 1e-4], descent_starts=200, num_hessians=20,
        num_cells=11,
    ),
}  # fmt: skip
MAX_ROUNDS = 20_000
STARTS_AT_ONCE = 25  # their histories stay in the cache
REACHED = 1e-6  # relative distance to the optimum that counts as reaching it


class AffineEnergy(nn.Module):
    """Eq. (3), halved and with its 2 pi's: the expected `loss` of an affine `VAEPlusVAEModel`, in nats per sample.

    With E[x] = m, Cov[x] = C and z = W_z x + b_z + s eps, the squared error splits into three parts,

        E ||x - W_x z - b_x||^2 = ||m - W_x (W_z m + b_z) - b_x||^2 + tr (I - W_x W_z) C (I - W_x W_z)^T
                                  + sum_j s_j^2 ||w_x,j||^2,

    and E ||mu_z||^2 = ||W_z m + b_z||^2 + tr W_z C W_z^T. So Theorem 1 needs nothing of the data but `mean` (d,) and
    `covariance` (d, d).
    """

    def __init__(self, latent_dim: int, gamma: float, mean: torch.Tensor, covariance: torch.Tensor):
        super().__init__()
        config = VAEPlusVAEConfig(
            network="affine", input_shape=mean.shape, latent_dim=latent_dim, gamma="fixed", gamma_init=gamma
        )
        self.vae = VAEPlusVAEModel(config).to(mean)
        self.mean, self.covariance = mean, covariance

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Energy and expected squared error of one sample, both of shape `()`."""
        encoder, decoder = self.vae.encoder.weight, self.vae.decoder.weight  # W_z (kappa, d) and W_x (d, kappa)
        # Not `encode`: it clamps log s^2 to [-30, 20], outside of which no gradient leads back, and a long step of
        # L-BFGS does jump there. Theorem 1 knows no such bounds.
        posterior = GaussianPosterior(self.vae.encoder(self.mean[None]), self.vae.logvar[None])
        missed = torch.eye(len(decoder)).to(decoder) - decoder @ encoder
        squared_error = (self.mean - self.vae.decode(posterior.mean)).square().sum()
        squared_error = squared_error + (missed @ self.covariance * missed).sum()
        squared_error = squared_error + (posterior.logvar.exp() * decoder.square().sum(0)).sum()
        kl = posterior.kl().sum() + 0.5 * (encoder @ self.covariance * encoder).sum()
        return gaussian_nll(squared_error, len(decoder), self.vae.log_gamma) + kl, squared_error

    def at(self, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` with the parameters of a flat `point`, in the order of `named_parameters`."""
        return functional_call(self, self.unflatten(point), ())

    def unflatten(self, points: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parameters by name, `(..., *shape)`, of points `(..., num_parameters)`."""
        parts = points.split([parameter.numel() for parameter in self.parameters()], dim=-1)
        shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
        return {name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def flatten(self, parameters: dict[str, torch.Tensor], num_points: int) -> torch.Tensor:
        """Inverse of `unflatten` for one batch axis."""
        return torch.cat([parameters[name].reshape(num_points, -1) for name, _ in self.named_parameters()], dim=-1)


def data_of_rank(input_dim: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean (d,), covariance (d, d), its eigenvalues (d,), largest first, and eigenvectors (d, d), all in float64."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(input_dim, input_dim, generator=generator, dtype=torch.double))[0]
    mean = torch.randn(input_dim, generator=generator, dtype=torch.double)
    eigenvalues = torch.zeros(input_dim, dtype=torch.double)
    eigenvalues[:rank] = torch.logspace(2, -1, rank, base=2, dtype=torch.double)
    return mean, (directions * eigenvalues) @ directions.T, eigenvalues, directions


def ppca_energy(eigenvalues: torch.Tensor, latent_dim: int, gamma: float) -> float:
    """The global optimum: mean negative log-likelihood of probabilistic PCA with noise gamma, nats per sample.

    Its covariance has the eigenvalues max(lambda_j, gamma) in the first kappa directions and gamma in the others.
    """
    modelled = torch.full_like(eigenvalues, gamma)
    modelled[:latent_dim] = eigenvalues[:latent_dim].clamp(min=gamma)
    return 0.5 * (modelled.log() + eigenvalues / modelled + math.log(2 * math.pi)).sum().item()


def random_starts(energy: AffineEnergy, num_starts: int, seed: int) -> torch.Tensor:
    """Points `(num_starts, num_parameters)` from near the over-regularised saddle to far outside the data.

    Every tensor of every start is normal with a standard deviation of its own, log-uniform in [0.01, 3]; log s_j^2 is
    uniform in [-6, 2].
    """
    generator = torch.Generator().manual_seed(seed)
    start = {}
    for name, parameter in energy.named_parameters():
        ends = torch.tensor([0.01, 3.0]).log()
        scale = (ends[0] + (ends[1] - ends[0]) * torch.rand(num_starts, generator=generator)).exp()
        start[name] = torch.randn(num_starts, *parameter.shape, generator=generator)
        start[name] *= scale.view(-1, *[1] * parameter.ndim)
        if name == "vae.logvar":
            start[name] = 8 * torch.rand(num_starts, *parameter.shape, generator=generator) - 6
    return energy.flatten(start, num_starts).to(energy.mean)


def descend(value_and_gradient, points: torch.Tensor, memory: int = 20, tolerance: float = 1e-5):
    """L-BFGS from all points at once: one evaluation of all a round, but each with its own history and step.

    A point whose step does not lower its energy enough (Armijo, and more than rounding) stays and tries half the
    length in the next round; after 20 failures it forgets its history and tries the bare gradient. It rests when its
    largest gradient is below `tolerance`, or after 20 more failures: then rounding is all that is left.

    Args:
        value_and_gradient (callable): points `(starts, n)` -> energies `(starts,)` and gradients `(starts, n)`.
        points (`torch.Tensor` of shape `(starts, n)`).

    Returns:
        the last points `(starts, n)`, and the energies `(rounds + 1, starts)` on the way there.
    """
    energy, gradient = value_and_gradient(points)
    energies = [energy]
    pairs = deque(maxlen=memory)  # step, change of the gradient, 1 / (step . change), or 0 where there was no step
    scale = 1 / gradient.norm(dim=1)  # the inverse Hessian before there is a history
    length, failures = torch.ones_like(energy), torch.zeros_like(energy)
    for _ in range(MAX_ROUNDS):
        moving = (gradient.abs().amax(1) > tolerance) & (failures < 40)
        if not moving.any():
            break
        direction, weights = -gradient, deque()
        for step, change, inverse in reversed(pairs):
            weights.appendleft((inverse * (step * direction).sum(1))[:, None])
            direction = direction - weights[0] * change
        direction = scale[:, None] * direction
        for (step, change, inverse), weight in zip(pairs, weights, strict=True):
            direction = direction + (weight - (inverse * (change * direction).sum(1))[:, None]) * step

        trial = points + length[:, None] * direction
        trial_energy, trial_gradient = value_and_gradient(trial)
        demanded = 1e-4 * length * (direction * gradient).sum(1).clamp(max=0) - 1e-14 * energy.abs()
        lower = moving & (trial_energy < energy + demanded)
        step = torch.where(lower[:, None], trial - points, 0)
        change = torch.where(lower[:, None], trial_gradient - gradient, 0)
        curvature = (step * change).sum(1)
        curved = curvature > 0
        pairs.append((step, change, torch.where(curved, 1 / curvature, 0)))
        scale = torch.where(curved, curvature / change.square().sum(1), scale)
        points, gradient = points + step, gradient + change
        energy = torch.where(lower, trial_energy, energy)
        energies.append(energy)

        failures = torch.where(lower, 0, failures + 1)
        length = torch.where(lower, 1, length / 2)
        if (forgetful := failures == 20).any():
            for _, _, inverse in pairs:
                inverse[forgetful] = 0
            scale = torch.where(forgetful, 1 / gradient.norm(dim=1), scale)
            length[forgetful] = 1
    return points, torch.stack(energies)


def conditional_point(energy: AffineEnergy, loadings: torch.Tensor) -> torch.Tensor:
    """W_x = `loadings` (d, kappa) and the best of all other parameters for it, as a point `(num_parameters,)`.

    With P = I + W_x^T W_x / gamma: W_z = P^-1 W_x^T / gamma, s_j^2 = 1 / P_jj, and the biases that centre the data.
    """
    gamma = energy.vae.log_gamma.exp()
    precision = torch.eye(loadings.shape[1]).to(loadings) + loadings.T @ loadings / gamma
    encoder = torch.linalg.solve(precision, loadings.T / gamma)
    parameters = {
        "vae.logvar": -precision.diagonal().log(),
        "vae.encoder.weight": encoder,
        "vae.encoder.bias": -encoder @ energy.mean,
        "vae.decoder.weight": loadings,
        "vae.decoder.bias": energy.mean,
    }
    return energy.flatten({name: value[None] for name, value in parameters.items()}, 1)[0]


def optimal_loadings(eigenvalues, directions, latent_dim: int, gamma: float) -> torch.Tensor:
    """W_x (d, kappa) of one global minimum: U (Lambda - gamma I)^(1/2), with zero columns where lambda_j <= gamma."""
    return directions[:, :latent_dim] * (eigenvalues[:latent_dim] - gamma).clamp(min=0).sqrt()


def pass_loadings(loadings: torch.Tensor, active: int, idle: int, eigenvalue: float, gamma: float) -> torch.Tensor:
    """Halfway between a minimum and its copy in which the units `active` and `idle` have changed places.

    Both units carry the direction with equal columns of squared norm gamma c / 2. The part of the energy that depends
    on c is log(1 + c / 2) + (eigenvalue / gamma) / (1 + c) / 2, and is stationary at the c below.
    """
    ratio = eigenvalue / gamma
    c = 0.5 * (ratio / 2 - 2 + math.sqrt((ratio / 2 - 2) ** 2 + 4 * (ratio - 1)))
    column = loadings[:, active] / loadings[:, active].norm() * math.sqrt(gamma * c / 2)
    between = loadings.clone()
    between[:, [active, idle]] = column[:, None]
    return between


def run_starts(size, gamma: float, num_starts: int, device: str) -> tuple[AffineEnergy, torch.Tensor, dict]:
    """The energy, the end points `(starts, num_parameters)`, and what is counted at them."""
    input_dim, latent_dim, rank = size
    mean, covariance, eigenvalues, _ = data_of_rank(input_dim, rank)
    energy = AffineEnergy(latent_dim, gamma, mean.to(device), covariance.to(device))
    both = vmap(grad_and_value(energy.at, has_aux=True))

    def value_and_gradient(points):
        gradient, (value, _) = both(points)
        return value, gradient

    began = time.process_time()
    starts = random_starts(energy, num_starts, seed=0).split(STARTS_AT_ONCE)
    points, energies = zip(*[descend(value_and_gradient, part) for part in starts], strict=True)
    longest = max(map(len, energies))
    points = torch.cat(points)
    energies = torch.cat([torch.cat([e, e[-1:].expand(longest - len(e), -1)]) for e in energies], dim=1)
    optimum = ppca_energy(eigenvalues, latent_dim, energy.vae.log_gamma.exp().item())
    gaps = energies - optimum
    relative = gaps[-1] / max(1, abs(optimum))
    used = energy.unflatten(points)["vae.decoder.weight"].norm(dim=1) > 1e-2 * gamma**0.5  # columns of W_x
    rounds = sorted({round(1.15**power) for power in range(100)} & set(range(len(gaps))) | {len(gaps) - 1})
    return energy, points, {
        "optimum": optimum,
        "fraction_at_optimum": (relative.abs() < REACHED).double().mean().item(),
        "worst_relative_gap": relative.abs().max().item(),
        "active_units": sorted(set(used.sum(1).tolist())),
        "expected_active_units": int((eigenvalues[:latent_dim] > gamma).sum()),
        "supports": len(set(map(tuple, used.tolist()))),
        "squared_error": vmap(energy.at)(points)[1].median().item(),
        "rounds": rounds,
        "median_gap": gaps[rounds].median(1).values.tolist(),
        "worst_gap": gaps[rounds].amax(1).tolist(),
        "cpu_seconds": time.process_time() - began,
    }  # fmt: skip


def curvatures(energy: AffineEnergy, point: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of the Hessian, smallest first, `(num_parameters,)`."""
    return torch.linalg.eigvalsh(hessian(lambda point: energy.at(point)[0])(point))


def one_size(size, settings: dict, device: str) -> dict:
    """Random starts at one (d, kappa, r); the curvature where they end; the pass between two minima."""
    input_dim, latent_dim, rank = size
    energy, points, result = run_starts(size, settings["gamma"], settings["num_starts"], device)
    spectra = torch.stack([curvatures(energy, point) for point in points[: settings["num_hessians"]]])
    num_flat = latent_dim * (input_dim - rank)  # rows of W_z are free where the data have no variance
    gamma = energy.vae.log_gamma.exp().item()
    _, _, eigenvalues, directions = data_of_rank(input_dim, rank)
    loadings = optimal_loadings(eigenvalues, directions, latent_dim, gamma).to(device)
    between = pass_loadings(loadings, rank - 1, rank, eigenvalues[rank - 1].item(), gamma)
    between = conditional_point(energy, between)
    return result | {
        "size": size,
        "num_starts": len(points),
        "possible_supports": math.comb(latent_dim, rank),
        "lowest_curvature": spectra.min().item(),
        "flat_directions": sorted(set((spectra.abs() < 1e-6).sum(1).tolist())),
        "expected_flat_directions": num_flat,
        "lowest_other_curvature": spectra[:, num_flat].min().item(),
        "pass_height": energy.at(between)[0].item() - result["optimum"],
        "pass_gradient": grad_and_value(energy.at, has_aux=True)(between)[0].abs().max().item(),
        "pass_descents": int((curvatures(energy, between) < -1e-6).sum()),
    }


def measure(settings, cells, args):
    device = "cuda" if args.scale == "gpu" and torch.cuda.is_available() else "cpu"
    for size in settings["sizes"]:
        cells("d{}-kappa{}-r{}".format(*size), lambda size=size: one_size(size, settings, device))
    for gamma in settings["gammas"]:
        cells(
            f"gamma-{gamma:g}",
            lambda gamma=gamma: (
                {"gamma": gamma, "size": settings["descent_size"]}
                | run_starts(settings["descent_size"], gamma, settings["descent_starts"], device)[2]
            ),
        )


def split(cells: dict) -> tuple[list[dict], list[dict]]:
    """Cells of the sizes, and those on the way to gamma -> 0."""
    return [c for n, c in cells.items() if n[0] == "d"], [c for n, c in cells.items() if n[0] == "g"]


def table(cells: dict) -> str:
    sizes, descent = split(cells)
    lines = [
        f"| d, kappa, r | of {sizes[0]['num_starts']} starts at the optimum | worst relative gap | active units |"
        " sets of active units met / C(kappa, r) | if all were equally likely | lowest curvature (flat ones aside) |"
        " pass to another set, nats |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in sizes:
        possible = cell["possible_supports"]
        equal = possible * (1 - (1 - 1 / possible) ** cell["num_starts"])
        lines.append(
            f"| {', '.join(map(str, cell['size']))} | {round(cell['fraction_at_optimum'] * cell['num_starts'])} |"
            f" {cell['worst_relative_gap']:.0e} | {numbers(cell['active_units'])} | {cell['supports']} / {possible} |"
            f" {equal:.0f} | {cell['lowest_other_curvature']:.3f} | {cell['pass_height']:.3f} |"
        )
    lines += [
        "",
        "As gamma -> 0 (d, kappa, r = {}, {}, {}):".format(*descent[0]["size"]),
        "",
        "| gamma | starts at the optimum | active units (eigenvalues above gamma) | energy | expected squared error |",
        "|---|---|---|---|---|",
    ]
    for cell in descent:
        lines.append(
            f"| {cell['gamma']:g} | {cell['fraction_at_optimum']:.0%} | {numbers(cell['active_units'])}"
            f" ({cell['expected_active_units']}) | {cell['optimum']:.2f} | {cell['squared_error']:.2e} |"
        )
    return "\n".join(lines)


def numbers(values: list[int]) -> str:
    return " or ".join(map(str, values))


def draw(cells: dict, path: Path):
    from matplotlib.figure import Figure

    sizes, descent = split(cells)
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    falling, supports, balance = figure.subplots(1, 3)
    for color, cell in enumerate(sizes):
        label = "d={}, kappa={}, r={}".format(*cell["size"])
        falling.loglog(cell["rounds"], [max(gap, 1e-14) for gap in cell["median_gap"]], color=f"C{color}", label=label)
        falling.loglog(cell["rounds"], [max(gap, 1e-14) for gap in cell["worst_gap"]], color=f"C{color}", ls=":")
    falling.set(xlabel="round of L-BFGS", ylabel="nats above the optimum", title="all starts (dotted: the worst)")
    falling.legend(fontsize=8)

    places = torch.arange(len(sizes))
    for shift, key, label in ((-0.2, "possible_supports", "C(kappa, r)"), (0.2, "supports", "met")):
        bars = supports.bar(places + shift, [cell[key] for cell in sizes], 0.4, label=label)
        supports.bar_label(bars)
    supports.set(title=f"sets of active units ({sizes[0]['num_starts']} starts)", yscale="log", xlabel="d, kappa, r")
    supports.set_xticks(places, [", ".join(map(str, cell["size"])) for cell in sizes])
    supports.legend(fontsize=8)

    gammas = [cell["gamma"] for cell in descent]
    balance.loglog(gammas, [cell["squared_error"] for cell in descent], "o-", label="squared error")
    balance.loglog([], [], "s--", color="C1", label="active units (right)")
    balance.set(xlabel="gamma", title="d={}, kappa={}, r={} as gamma -> 0".format(*descent[0]["size"]))
    balance.invert_xaxis()
    balance.legend(fontsize=8, loc="upper right")
    units = balance.twinx()
    units.plot(gammas, [cell["active_units"][-1] for cell in descent], "s--", color="C1")
    units.set(ylim=(-0.2, descent[0]["size"][1] + 0.2))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    raise SystemExit(reproduce("theorem1", __doc__.split("\n")[0], SETTINGS, measure, table, draw))
