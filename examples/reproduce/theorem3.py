"""Theorem 3: for which penalties h is a global optimum of Eq. (6) balanced: no error and at most r active rows?

    python examples/reproduce/theorem3.py --scale cpu        # 3 minutes on one core; --scale smoke: seconds

Result: of what is tried, only u^p with p <= 1/2 reconstructs exactly at the optimum. With orthonormal columns the
identity loses 25% of the variance and fills every row, u^0.75 (unbounded gradient!) loses 8 to 9% in r rows, and
log(u + eps) loses 0.2% at eps = 1e-2 and 2e-7 at 1e-4: a share that falls with eps^2.

Affine autoencoders on data of exactly r factors. Every cell compares three energies: the least that many random
starts find, that of the balanced solution (r principal components, exactly), and the global optimum, which the known
singular values give by a search over scalars (`global_optimum`).
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import Cells, reproduce
from torch.func import functional_call, stack_module_state, vmap

from hf_vaeplus import PenalizedAutoencoderConfig, PenalizedAutoencoderModel
from hf_vaeplus.modeling_baselines import penalty_function

SMALLEST_VARIANCE = 0.05  # of a factor; the largest has 1
FLOOR = 1e-12  # shares of unexplained variance below this are drawn here

CPU = dict(
    num_cells=48,
    problems=[  # Theta, d, kappa, r
        ["orthonormal", 8, 6, 2],
        ["orthonormal", 16, 16, 4],
        ["orthonormal", 12, 20, 3],
        ["unit_columns", 12, 20, 3],
    ],
    powers=[1, 0.9, 0.75, 0.6, 0.5, 0.4, 0.25],
    epsilons=[1, 1e-1, 1e-2, 1e-4, 1e-6],
    starts=64,
    steps=1000,
)
SETTINGS = {
    "smoke": dict(
        num_cells=6,
        problems=[["orthonormal", 6, 8, 2], ["unit_columns", 6, 8, 2]],
        powers=[1, 0.5],
        epsilons=[1e-2],
        starts=16,
        steps=300,
    ),
    "cpu": CPU,
    "gpu": CPU | dict(starts=1024, steps=4000),
}


def penalty_fields(kind: str, value: float) -> dict:
    """Config fields of h = u^value or log(u + value)."""
    if kind == "log":
        return dict(penalty="log", penalty_eps=value)
    named = {1: dict(penalty="identity"), 0.5: dict(penalty="sqrt")}
    return named.get(value, dict(penalty="power", penalty_power=value))


def h(u, kind: str, value: float) -> np.ndarray:
    """h of Eq. (6) on an array."""
    fields = penalty_fields(kind, value)
    u = torch.as_tensor(u, dtype=torch.float64)
    return penalty_function(u, fields["penalty"], eps=value, power=value).numpy()


# -------------------------------------------------------------------------------------------------------- theory


def factor_variances(r: int) -> np.ndarray:
    """Variances of the r factors of the data, from 1 down, `(r,)`."""
    return np.geomspace(1, SMALLEST_VARIANCE, r)


def balanced_energy(variances: np.ndarray, d: int, kappa: int, kind: str, value: float) -> float:
    """Eq. (6) of perfect reconstruction from r principal components, in r of the kappa rows."""
    rows = np.r_[variances, np.zeros(kappa - len(variances))]
    return float(h(0.0, kind, value) + h(rows, kind, value).sum() / d)


def global_optimum(theta: str, d: int, kappa: int, variances: np.ndarray, kind: str, value: float):
    """Least energy of Eq. (6) over all affine autoencoders and its squared error per value: `(energy, error)`.

    Let s be the data's singular values over sqrt(n) and m those of the reconstruction. The error is at least
    sum (s - m)^2 / d (Mirsky). The rows cost at least sum h(m^2) / d, reached by principal components,
      - for orthonormal columns, as a concave symmetric sum is least at the eigenvalues (Schur);
      - for unit columns, if t -> h(t^2) is concave (Rotfel'd): powers up to 1/2.
    For unit columns and powers from 1/2 on they cost at least kappa h((sum m / kappa)^2) / d (Jensen), reached by
    kappa equal rows (Schur-Horn). There remains a search over m; as h is concave, the best m also minimizes
    c (s - m)^2 + h(m^2) for every component alone, with c = h' of the error: one search over c. Grids: 1e-6 in energy.

    Returns None for unit columns and the log, for which none of the two holds.
    """
    s = np.sqrt(variances)
    if theta == "unit_columns" and kind == "log":
        return None
    if theta == "unit_columns" and value > 0.5:
        threshold = np.r_[0, np.geomspace(1e-9, 1, 4001)][:, None]
        m = np.maximum(s - threshold, 0)  # the least error for a given sum of m
        cost = kappa * h((m.sum(1) / kappa) ** 2, kind, value) / d
    else:
        lost = np.r_[0, np.geomspace(1e-9, 0.5, 4000), 1 - np.geomspace(0.49, 1e-6, 1000), 1]
        kept = (1 - lost)[None, :] * s[:, None]  # (r, grid)
        row_cost = h(kept**2, kind, value)
        best = [s]  # c = infinity
        for c in np.geomspace(0.1, 1e7, 4001):
            choice = np.argmin(c * (s[:, None] - kept) ** 2 + row_cost, axis=1)
            best.append(kept[np.arange(len(s)), choice])
        m = np.array(best)
        cost = (h(m**2, kind, value).sum(1) + (kappa - len(s)) * h(0.0, kind, value)) / d
    error = ((s - m) ** 2).sum(1) / d
    energy = h(error, kind, value) + cost
    return float(energy.min()), float(error[energy.argmin()])


# -------------------------------------------------------------------------------------------------- optimization


def linear_data(d: int, r: int, n: int = 32, seed: int = 0) -> torch.Tensor:
    """`(n, d)`, float64: mean 0, and a covariance whose nonzero eigenvalues are exactly `factor_variances(r)`."""
    random = np.random.default_rng(seed)
    ones_and_factors = np.linalg.qr(np.c_[np.ones(n), random.normal(size=(n, r))])[0]
    directions = np.linalg.qr(random.normal(size=(d, r)))[0]
    factors = math.sqrt(n) * ones_and_factors[:, 1:] * np.sqrt(factor_variances(r))
    return torch.from_numpy(factors @ directions.T)


def schedule(progress: float) -> tuple[float, float]:
    """Share of the learning rate, and exponent that takes the smoothing from its start (0) to its end (1)."""
    return min(1.0, 10 ** (-10 * (progress - 0.4))), min(1.0, progress / 0.8)


def best_of_starts(config: PenalizedAutoencoderConfig, inputs: torch.Tensor, starts: int, steps: int):
    """The output of least energy, Eq. (6), of full-batch Adam from `starts` random starts at once.

    The smoothing of h falls to 1e-14 from a value between 1 and 1e-3, another for every start: Section 5's homotopy.
    """
    torch.manual_seed(0)
    models = [PenalizedAutoencoderModel(config).to(inputs) for _ in range(starts)]
    parameters, _ = stack_module_state(models)
    first_smoothing = torch.logspace(0, -3, starts).to(inputs)
    optimizer = torch.optim.Adam(parameters.values(), lr=0.03)

    def energy(parameters, smoothing):
        return functional_call(models[0], parameters, (inputs,), dict(smoothing=smoothing)).loss

    for step in range(steps):
        rate, exponent = schedule(step / steps)
        optimizer.param_groups[0]["lr"] = 0.03 * rate
        energies = vmap(energy)(parameters, first_smoothing ** (1 - exponent) * 1e-14**exponent)
        optimizer.zero_grad()
        energies.sum().backward()
        optimizer.step()
    with torch.no_grad():
        best = vmap(energy)(parameters, torch.zeros_like(first_smoothing)).argmin()
        return functional_call(models[0], {name: stack[best] for name, stack in parameters.items()}, (inputs,))


def affine_cell(theta, d, kappa, r, kind, value, settings, device) -> dict:
    start = time.perf_counter()
    variances = factor_variances(r)
    config = PenalizedAutoencoderConfig(
        input_shape=(d,), latent_dim=kappa, network="affine", constraint=theta, **penalty_fields(kind, value)
    )
    found = best_of_starts(config, linear_data(d, r).to(device), settings["starts"], settings["steps"])
    optimum = global_optimum(theta, d, kappa, variances, kind, value)
    return dict(
        theta=theta,
        d=d,
        kappa=kappa,
        r=r,
        kind=kind,
        value=value,
        energy_found=found.loss.item(),
        energy_balanced=balanced_energy(variances, d, kappa, kind, value),
        energy_optimum=optimum and optimum[0],
        unexplained_found=found.squared_error.item() / variances.sum(),
        unexplained_optimum=optimum and optimum[1] * d / variances.sum(),
        active_found=int(found.active_units),
        seconds=time.perf_counter() - start,
    )


# -------------------------------------------------------------------------------------------------------- report


def measure(settings: dict, cells: Cells, args):
    device = torch.device("cuda" if args.scale == "gpu" and torch.cuda.is_available() else "cpu")
    penalties = [("power", p) for p in settings["powers"]] + [("log", eps) for eps in settings["epsilons"]]
    for theta, d, kappa, r in settings["problems"]:
        for kind, value in penalties:
            name = f"{theta}-d{d}-kappa{kappa}-r{r}-{kind}{value:g}"
            problem = (theta, d, kappa, r, kind, value)
            cells(name, lambda problem=problem: affine_cell(*problem, settings, device))


def by_problem(cells: dict) -> dict[str, dict]:
    """Heading of a problem -> (kind, value) -> cell."""
    problems = {}
    for cell in cells.values():
        heading = f"{cell['theta'].replace('_', ' ')}: d = {cell['d']}, κ = {cell['kappa']}, r = {cell['r']}"
        problems.setdefault(heading, {})[cell["kind"], cell["value"]] = cell
    return problems


def table(cells: dict) -> str:
    """Rows: h. Entries: active rows, share of the variance not explained, least energy found minus the balanced."""
    problems = by_problem(cells)
    penalties = list(dict.fromkeys(penalty for problem in problems.values() for penalty in problem))
    lines = [f"| h | {' | '.join(problems)} |", "|---" * (len(problems) + 1) + "|"]
    for kind, value in penalties:
        label = f"log(u + {value:g})" if kind == "log" else {1: "u", 0.5: "√u"}.get(value, f"u^{value:g}")
        entries = []
        for problem in problems.values():
            cell = problem[kind, value]
            gap = cell["energy_found"] - cell["energy_balanced"]
            entries.append(f"{cell['active_found']}; {cell['unexplained_found']:.2%}; {gap:+.4f}")
        lines.append(f"| {label} | {' | '.join(entries)} |")
    return "\n".join(lines)


def draw(cells: dict, path: Path):
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for number, (heading, problem) in enumerate(by_problem(cells).items()):
        for column, kind in enumerate(("power", "log")):
            chosen = sorted((value, cell) for (of, value), cell in problem.items() if of == kind)
            values = [value for value, _ in chosen]
            style = dict(color=f"C{number}", marker="osD^"[number], markersize=6, fillstyle="none")
            unexplained = [max(cell["unexplained_found"], FLOOR) for _, cell in chosen]
            axes[0, column].plot(values, unexplained, linestyle="none", label=heading, **style)
            excess = [cell["active_found"] - cell["r"] for _, cell in chosen]
            axes[1, column].plot(values, excess, linestyle=":", **style)
            derived = [(value, cell["unexplained_optimum"]) for value, cell in chosen]
            derived = [(value, max(share, FLOOR)) for value, share in derived if share is not None]
            if derived:
                axes[0, column].plot(*zip(*derived, strict=True), color=f"C{number}", linewidth=0.8)
    axes[0, 0].set(yscale="log", ylabel="variance not explained\n(markers: found; lines: derived optimum)")
    axes[0, 0].set_title("h(u) = u^p: gradient at 0 unbounded for p < 1, slope in |z| for p ≤ 1/2", fontsize=9)
    axes[0, 1].set_title("h(u) = log(u + ε): gradient at 0 is 1/ε", fontsize=9)
    axes[1, 0].set(xlabel="p", ylabel="active rows beyond r")
    axes[1, 1].set(xlabel="ε", xscale="log")
    for axis in (axes[0, 0], axes[1, 0]):
        axis.axvline(0.5, color="grey", linestyle="--", linewidth=0.8)
    for axis in axes[1]:
        axis.axhline(0, color="grey", linewidth=0.8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(reproduce("theorem3", __doc__.split("\n\n")[0], SETTINGS, measure, table, draw))
