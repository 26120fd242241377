"""Theorem 2: silent latent dimensions get no gradient, and the affine skip of Eq. (5) is a way out.

    python examples/reproduce/theorem2.py --scale cpu        # 4 minutes on one core; --scale smoke: seconds

Result: the gradients vanish as stated: the heads' exactly, the first decoder layer's in expectation over noise, and
all of them only if the biases of the heads are zero too. With every latent silent the point is a saddle at each depth
tried, flatter the deeper the decoder: lowest curvature -1.9 with 3 hidden layers, -0.3 with 17. Without the skip 1,500
steps of Adam leave it for -23 nats with 6 active units (3 layers) and -15 with 2 (17 layers); with the skip and W_x
near 0, for -27 with 10 and -30 with 7. A random W_x keeps all 16 active and is slower: -20 and -8.

The paper's case: plain feed-forward encoder and decoder (`network="mlp"`, no residual blocks), fixed gamma. Latent
dimension j is *silent* where column j of the decoder's first layer and rows j of both encoder heads are zero, biases
of the heads included: then mu_j = 0 and sigma_j = 1 for every x, and the decoder does not look.
"""

from pathlib import Path

import torch
from common import mean_and_spread, reproduce
from sklearn.datasets import load_digits
from theorem1 import ppca_energy
from torch.func import functional_call, grad, jacrev

from hf_vaeplus import VAEPlusVAEConfig, VAEPlusVAEModel

LATENT_DIM = 16
GAMMA = 0.02  # the digits' covariance has 30 eigenvalues above it, so every latent dimension is worth its price
ARMS = {  # name -> affine skip, silent units at the start, random W_x (else as near to zero as the silent weights)
    "no skip, usual start": (False, False, False),
    "no skip": (False, True, False),
    "skip, W_x near 0": (True, True, False),
    "skip, W_x random": (True, True, True),
}
# `decoder_blocks` b: the decoder has 1 + 2 b hidden layers. `perturbation`: standard deviation of silent weights.
SETTINGS = {
    "smoke": dict(decoder_blocks=[1, 4], hidden_dim=8, steps=40, seeds=[0], perturbation=1e-3, num_cells=12),
    "cpu": dict(
        decoder_blocks=[1, 2, 4, 8], hidden_dim=64, steps=1500, seeds=[0, 1, 2], perturbation=1e-3, num_cells=56,
    ),
    "gpu": dict(
        decoder_blocks=[1, 2, 4, 8], hidden_dim=512, steps=20_000, seeds=[0, 1, 2, 3, 4], perturbation=1e-3,
        num_cells=88,
    ),
}  # fmt: skip


def digits() -> torch.Tensor:
    """The 1,797 embedded digits in [0, 1], flat: `(1797, 64)`."""
    return torch.from_numpy(load_digits().data / 16).float()


def affine_optimum(latent_dim: int = LATENT_DIM) -> float:
    """Loss of the best affine VAE on the digits (Theorem 1), nats per digit; without latents, of the collapsed one."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(digits().double().T, correction=0)).flip(0)
    return ppca_energy(eigenvalues, latent_dim, GAMMA)


def plain_vae(decoder_blocks: int, hidden_dim: int, affine_skip: bool) -> VAEPlusVAEModel:
    """The paper's networks: feed-forward, an encoder of 3 hidden layers, a decoder of `1 + 2 * decoder_blocks`."""
    config = VAEPlusVAEConfig(
        input_shape=(64,),
        latent_dim=LATENT_DIM,
        hidden_dim=hidden_dim,
        encoder_blocks=1,
        num_blocks=decoder_blocks,
        encoder_residual=False,
        decoder_residual=False,
        affine_skip=affine_skip,
        gamma="fixed",
        gamma_init=GAMMA,
    )
    model = VAEPlusVAEModel(config)
    # Beside a skip the class starts the last layer of f at zero. Between two zero layers f would never move again.
    torch.nn.init.normal_(model.decoder[-1].weight, std=hidden_dim**-0.5)
    return model


@torch.no_grad()
def silence(model: VAEPlusVAEModel, units, perturbation: float = 0.0):
    """Theorem 2's point for these latent dimensions, or a normal perturbation of that standard deviation from it."""
    for unit in units:
        model.decoder[0].weight[:, unit].normal_(std=perturbation)
        for row in (unit, LATENT_DIM + unit):  # the heads of the mean and of log sigma^2
            model.encoder[-1].weight[row].normal_(std=perturbation)
            model.encoder[-1].bias[row] = 0


# ----------------------------------------------------------------------------------------------------- gradients


def silent_gradients(model: VAEPlusVAEModel, unit: int, inputs: torch.Tensor, paired: bool = True) -> dict:
    """Norms of the gradient of the loss in the weights of one silent unit, and in those of all units.

    Args:
        inputs (`torch.Tensor` of shape `(batch, 64)`).
        paired (`bool`): every noise vector comes twice, with eps_unit and with -eps_unit, which makes the expectation
            over it exact at a silent unit, where the decoder cannot tell the two apart.
    """
    noise = torch.randn(len(inputs), LATENT_DIM, generator=torch.Generator().manual_seed(0)).to(inputs)
    if paired:
        mirrored = noise.clone()
        mirrored[:, unit] *= -1
        inputs, noise = inputs.repeat(2, 1), torch.cat([noise, mirrored])
    model.zero_grad()
    model(inputs, noise=noise).loss.backward()
    first, heads = model.decoder[0].weight.grad, model.encoder[-1].weight.grad
    return {
        "first layer": first[:, unit].norm().item(),
        "head of mu": heads[unit].norm().item(),
        "head of log sigma^2": heads[LATENT_DIM + unit].norm().item(),
        "all first layer": first.norm().item(),
        "all heads": heads.norm().item(),
    }


def gradients_at_silent_units(decoder_blocks: int, hidden_dim: int) -> dict:
    """Largest gradient of any unit that is silent, alone and with all others, with every other weight random."""
    cases = {}

    def look(case, units, affine_skip=False, paired=True, skip_column=None, head_bias=0.0):
        torch.manual_seed(0)
        model = plain_vae(decoder_blocks, hidden_dim, affine_skip).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
            silence(model, units)
            model.encoder[-1].bias[units] = head_bias
            if skip_column is not None:
                model.affine_skip.weight[:, units] = skip_column
        inputs = digits()[:64].double()
        found = [silent_gradients(model, unit, inputs, paired) for unit in units]
        cases[case] = {key: max(norms[key] for norms in found) for key in found[0]}

    everyone = list(range(LATENT_DIM))
    look("all silent", everyone)
    for unit in everyone:
        look(f"unit {unit} alone silent", [unit])
    alone = [cases.pop(f"unit {unit} alone silent") for unit in everyone]
    cases["one silent"] = {key: max(norms[key] for norms in alone) for key in alone[0]}
    look("one draw of the noise", everyone, paired=False)
    look("bias of mu's head 0.3", everyone, head_bias=0.3)
    look("skip, W_x = 0", everyone, affine_skip=True, skip_column=0.0)
    look("skip, W_x random", everyone, affine_skip=True)
    return {"decoder_blocks": decoder_blocks, "cases": cases}


def lowest_curvature(decoder_blocks: int, hidden_dim: int, affine_skip: bool, inputs: torch.Tensor) -> float:
    """Smallest Hessian eigenvalue of the expected loss where all units are silent, W_x = 0 and the output is the mean.

    There, different units do not interact, so the Hessian in the weights of one unit is enough; and the noise enters
    squared, so eps = +1 and -1 stand for the expectation.
    """
    torch.manual_seed(0)
    model = plain_vae(decoder_blocks, hidden_dim, affine_skip).double()
    silence(model, range(LATENT_DIM))
    model.decoder[-1].bias.data = inputs.mean(0)
    noise = inputs.new_zeros(2 * len(inputs), LATENT_DIM)
    noise[: len(inputs), 0], noise[len(inputs) :, 0] = 1, -1
    inputs = inputs.repeat(2, 1)
    first, heads = model.decoder[0].weight.detach(), model.encoder[-1].weight.detach()
    sizes = [len(first), heads.shape[1], heads.shape[1], 64 if affine_skip else 0]

    def loss(point):
        column, mu_row, logvar_row, skip_column = point.split(sizes)
        weights = {
            "decoder.0.weight": torch.cat([column[:, None], first[:, 1:]], dim=1),
            f"encoder.{len(model.encoder) - 1}.weight": torch.cat(
                [mu_row[None], heads[1:LATENT_DIM], logvar_row[None], heads[LATENT_DIM + 1 :]]
            ),
        }
        if affine_skip:
            weights["affine_skip.weight"] = torch.cat(
                [skip_column[:, None], torch.zeros(64, LATENT_DIM - 1).to(inputs)], dim=1
            )
        return functional_call(model, weights, (inputs,), {"noise": noise}).loss

    hessian = jacrev(grad(loss), chunk_size=32)(inputs.new_zeros(sum(sizes)))
    return torch.linalg.eigvalsh(hessian)[0].item()


# -------------------------------------------------------------------------------------------------------- escape


def escape(arm: str, decoder_blocks: int, seed: int, settings: dict, device: str) -> dict:
    """Train with Adam from the over-regularised point, its decoder's output at the data's mean."""
    affine_skip, starts_silent, random_skip = ARMS[arm]
    data = digits().to(device)
    torch.manual_seed(seed)
    model = plain_vae(decoder_blocks, settings["hidden_dim"], affine_skip)
    if starts_silent:
        silence(model, range(LATENT_DIM), settings["perturbation"])
    if affine_skip and not random_skip:
        torch.nn.init.normal_(model.affine_skip.weight, std=settings["perturbation"])
    model.decoder[-1].bias.data = digits().mean(0)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(seed)
    test_noise = torch.randn(len(data), LATENT_DIM, generator=torch.Generator().manual_seed(0)).to(device)
    result = {"arm": arm, "decoder_blocks": decoder_blocks, "steps": [], "loss": []}
    for step in range(settings["steps"] + 1):
        if step % (settings["steps"] // 20) == 0:
            with torch.no_grad():
                output = model(data, noise=test_noise)
            result["steps"].append(step)
            result["loss"].append(output.loss.item())
        batch = data[torch.randint(len(data), (64,), generator=generator).to(device)]
        loss = model(batch, noise=torch.randn(64, LATENT_DIM, generator=generator).to(device)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return result | {
        "active_units": output.active_units.item(),
        "squared_error": output.squared_error.item(),
        "final_loss": output.loss.item(),
    }


def measure(settings, cells, args):
    device = "cuda" if args.scale == "gpu" and torch.cuda.is_available() else "cpu"
    hidden_dim = settings["hidden_dim"]
    for blocks in settings["decoder_blocks"]:
        cells(f"gradients-{blocks}", lambda blocks=blocks: gradients_at_silent_units(blocks, hidden_dim))

        def curvature(blocks=blocks):
            inputs = digits()[:200].double()
            both = {skip: lowest_curvature(blocks, hidden_dim, skip, inputs) for skip in (False, True)}
            return {"decoder_blocks": blocks, "no skip": both[False], "skip, W_x near 0": both[True]}

        cells(f"curvature-{blocks}", curvature)
        for number, arm in enumerate(ARMS):
            for seed in settings["seeds"]:
                cells(
                    f"escape-{blocks}-arm{number}-seed{seed}",
                    lambda arm=arm, blocks=blocks, seed=seed: escape(arm, blocks, seed, settings, device),
                )


def kinds(cells: dict) -> tuple[list[dict], dict[int, dict], dict[tuple[int, str], list[dict]]]:
    """Gradients; curvatures by decoder blocks; runs, one for each seed, by decoder blocks and arm."""
    runs = {}
    for name, cell in cells.items():
        if name.startswith("escape"):
            runs.setdefault((cell["decoder_blocks"], cell["arm"]), []).append(cell)
    gradients = [cell for name, cell in cells.items() if name.startswith("gradients")]
    curvatures = {cell["decoder_blocks"]: cell for name, cell in cells.items() if name.startswith("curvature")}
    return gradients, curvatures, runs


def table(cells: dict) -> str:
    gradients, curvatures, runs = kinds(cells)
    columns = ["first layer", "head of mu", "head of log sigma^2"]
    lines = [
        f"Largest gradient norm of a silent unit, over units and {len(gradients)} depths:",
        "",
        "| where | " + " | ".join(columns) + " |",
        "|---|---|---|---|",
    ]
    for case in gradients[0]["cases"]:
        norms = [max(cell["cases"][case][column] for cell in gradients) for column in columns]
        lines.append(f"| {case} | " + " | ".join(f"{norm:.0e}" if norm else "0" for norm in norms) + " |")
    seeds = len(next(iter(runs.values())))
    lines += [
        "",
        f"After {next(iter(runs.values()))[0]['steps'][-1]:,} steps from a perturbed all-silent start, mean of {seeds}"
        f" seeds (loss where all is silent {affine_optimum(0):.1f}, of the best affine VAE {affine_optimum():.1f}):",
        "",
        f"| hidden layers | start | lowest curvature | active units (of {LATENT_DIM}) | squared error | loss, nats |",
        "|---|---|---|---|---|---|",
    ]
    for (blocks, arm), cell in runs.items():
        curvature = curvatures[blocks].get(arm)
        ends = [
            mean_and_spread([run[key] for run in cell], digits)
            for key, digits in (("active_units", 1), ("squared_error", 2), ("final_loss", 1))
        ]
        lines.append(
            f"| {1 + 2 * blocks} | {arm} | {'' if curvature is None else f'{curvature:.2f}'} | {' | '.join(ends)} |"
        )
    return "\n".join(lines)


def draw(cells: dict, path: Path):
    from matplotlib.figure import Figure

    _, _, runs = kinds(cells)
    depths = sorted({blocks for blocks, _ in runs})
    figure = Figure(figsize=(3.2 * len(depths), 3.2), layout="constrained")
    for axes, blocks in zip(figure.subplots(1, len(depths), sharey=True, squeeze=False)[0], depths, strict=True):
        for color, arm in enumerate(ARMS):
            for number, run in enumerate(runs[blocks, arm]):
                axes.plot(run["steps"], run["loss"], color=f"C{color}", lw=1, label=None if number else arm)
        axes.axhline(affine_optimum(), color="0.5", ls="--", lw=1, label="best affine VAE")
        axes.set(title=f"{1 + 2 * blocks} hidden layers", xlabel="step", ylim=(-40, 120))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("loss, nats per digit")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    raise SystemExit(reproduce("theorem2", __doc__.split("\n")[0], SETTINGS, measure, table, draw))
