"""Theorem 1: every local minimum of the affine VAE is a global one, and regularization is balanced as gamma -> 0.

    python examples/reproduce/theorem1.py --scale cpu

EXPECTED

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

from hf_vaeplus import VAEPlusVAEConfig, VAEPlusVAEModel
from hf_vaeplus.modeling_vaeplus import gaussian_nll

# `sizes` and `descent_size` are (d, kappa, r): numbers in one sample, latent dimensions, rank of the data's covariance.
# `gammas` is the way down to gamma -> 0 at `descent_size`: 10 exceeds every eigenvalue, 1.5 some, the others none.
SETTINGS = {
    "smoke": dict(
        sizes=[(4, 3, 2), (6, 4, 2)], gamma=0.1, num_starts=20, descent_size=(4, 3, 2), gammas=[10.0, 1e-3],
        descent_starts=5, num_hessians=2, num_cells=4,
    ),
    "cpu": dict(
        sizes=[(6, 3, 2), (10, 5, 3), (20, 10, 4)], gamma=0.1, num_starts=200, descent_size=(10, 5, 3),
        gammas=[10.0, 1.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-5], descent_starts=20, num_hessians=20, num_cells=10,
    ),
    "gpu": dict(
        sizes=[(6, 3, 2), (10, 5, 3), (20, 10, 4), (50, 20, 5), (100, 40, 8)], gamma=0.1, num_starts=2000,
        descent_size=(20, 10, 4), gammas=[10.0, 1.5, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6], descent_starts=200,
        num_hessians=20, num_cells=13,
    ),
}  # fmt: skip
MAX_ROUNDS = 20_000
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
        posterior = self.vae.encode(self.mean[None])
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


def descend(value_and_gradient, points: torch.Tensor, memory: int = 12, tolerance: float = 1e-7):
    """L-BFGS from all points at once: one evaluation of all a round, but each with its own history and step.

    A point whose step does not lower its energy enough (Armijo) stays and tries half the length in the next round;
    after 20 failures it forgets its history and tries the bare gradient. It rests when its largest gradient is below
    `tolerance`, or after 20 more failures: then rounding is all that is left.

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
        demanded = 1e-4 * length * (direction * gradient).sum(1)  # Armijo; negative
        lower = moving & (demanded < 0) & (trial_energy <= energy + demanded)
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


if __name__ == "__main__":
    for (d, k, r), n in [((6, 3, 2), 200), ((10, 5, 3), 20), ((20, 10, 4), 50)]:
        for gamma in (1.5, 0.1, 1e-3, 1e-5):
            mean, cov, ev, _ = data_of_rank(d, r)
            e = AffineEnergy(k, gamma, mean, cov)
            opt = ppca_energy(ev, k, e.vae.log_gamma.exp().item())
            gv = vmap(grad_and_value(e.at, has_aux=True))

            def vg(p):
                g, (f, _) = gv(p)
                return f.detach(), g.detach()

            t = time.time()
            p, h = descend(vg, random_starts(e, n, 0))
            gap = (h[-1] - opt) / max(1, abs(opt))
            W = e.unflatten(p)["vae.decoder.weight"]
            sup = {tuple((w.norm(dim=0) > 1e-3).tolist()) for w in W}
            print(
                (d, k, r),
                gamma,
                "iters",
                len(h),
                "gap",
                gap.min().item(),
                gap.max().item(),
                (gap < 1e-6).float().mean().item(),
                "sup",
                len(sup),
                "t",
                round(time.time() - t, 1),
                round(time.process_time(), 1),
                "g",
                vg(p)[1].abs().max().item(),
                flush=True,
            )
