"""Planted cases: models whose fault is known, and what `hf_vaeplus.diagnose` says of each.

    python benchmarks/diagnose.py --mnist FOLDER                    # all cases, seeds 0 to 2: results/diagnose.json
    python benchmarks/diagnose.py --calibration --mnist FOLDER      # other seeds, r and sizes: nothing is reported

Each case trains a small model, or sets an affine one to its optimum, measures it on images that it was not trained on,
and compares the verdict with what was planted. The thresholds of hf_vaeplus/diagnosis/verdict.py were chosen on the
calibration cases alone. Measures are kept in `--work_dir`, so that a run goes on where it stopped.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import adaptive_avg_pool2d

from hf_vaeplus import (
    VAEPlusAutoencoderConfig,
    VAEPlusAutoencoderModel,
    VAEPlusPipeline,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
    diagnose,
)
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.rendered_faces import factors_of, render_faces
from hf_vaeplus.diagnosis.figure import draw
from hf_vaeplus.diagnosis.measures import measure
from hf_vaeplus.diagnosis.models import Autoencoder, as_autoencoder
from hf_vaeplus.diagnosis.verdict import judge
from hf_vaeplus.files import write_json
from hf_vaeplus.progress import tqdm
from hf_vaeplus.provenance import provenance
from hf_vaeplus.training.randomness import derived_seed


@dataclass
class Case:
    """A planted model, what must be said of it, and what must not."""

    name: str
    build: Callable[[int], tuple[Autoencoder, torch.Tensor]]
    regularization: str
    findings: tuple[str, ...] = ()
    not_findings: tuple[str, ...] = ()
    r: int | None = None


# ---------------------------------------------------------------------------------------------------------- training


def fit(loss_of: Callable, parameters: list, num_rows: int, steps: int, seed: int, batch=64, rate=2e-3) -> None:
    """Adam with a falling rate on `loss_of(rows)`."""
    generator = torch.Generator().manual_seed(derived_seed(seed, 50))
    optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50 + 0.05, 3 * (1.02 - step / steps))
    )
    for _ in range(steps):
        loss = loss_of(torch.randint(num_rows, (batch,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def train_vae(rows, config: dict, steps=1500, seed=0, kl_weight=1.0, deterministic=False, metric=None, floor=0.0):
    """A small VAE of rows `(n, dim)`; `metric` is a scalar: pixels squared per unit of the rows squared."""
    torch.manual_seed(derived_seed(seed, 51))
    space = {} if metric is None else {"reconstruction_space": "pullback"}
    config = {"hidden_dim": 192, "num_blocks": 1, "latent_init_scale": 0.3, **space, **config}
    model = VAEPlusVAEModel(VAEPlusVAEConfig(input_shape=(rows.shape[1],), **config))
    if metric is not None:
        model.set_pullback_metric(metric * torch.eye(rows.shape[1]), floor)
    else:
        model.set_input_statistics(rows.mean(0), rows.std(0).clamp(min=0.05))

    def loss_of(chosen):
        batch = rows[chosen]
        if deterministic:
            scale = 1.0 if metric is None else metric
            return scale * (model.decode(model.encode(batch).mean) - batch).square().sum(1).mean()
        return model(batch, kl_weight=kl_weight).loss

    others = [p for name, p in model.named_parameters() if name != "log_gamma"]
    groups = [{"params": others, "lr": 2e-3}]
    if isinstance(model.log_gamma, torch.nn.Parameter):
        groups.append({"params": [model.log_gamma], "lr": 5e-3})
    model.train()
    fit(loss_of, groups, len(rows), steps, seed)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------- drawings


def drawn(r: int, seed: int, which: int, number: int) -> torch.Tensor:
    """`(number, 3, 32, 32)` in [0, 1]; `which` tells training images from those held out."""
    pixels = render_faces(factors_of(range(number), r, derived_seed(seed, which) % 2**31), 32)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


class Drawings:
    """Drawings of r factors, and their first 64 principal components in the place of a trained autoencoder."""

    def __init__(self, r: int, seed: int, count: int, held_out: int):
        images, self.images = drawn(r, seed, 60, count), drawn(r, seed, 61, held_out)
        rows = images.flatten(1)
        self.num_values, self.shape = rows.shape[1], images.shape[1:]
        self.mean = rows.mean(0)
        torch.manual_seed(derived_seed(seed, 62))
        _, _, axes = torch.svd_lowrank(rows[:3_000] - self.mean, 70, niter=4)
        self.axes = axes[:, :64]
        codes = (rows - self.mean) @ self.axes
        self.scale = float(codes.square().mean().sqrt())
        self.codes = codes / self.scale
        self.variance = float((rows - self.mean).square().sum(1).mean())  # squared pixels per image
        self.floor = max(0.0, self.variance - float(codes.square().sum(1).mean()))

    def encode(self, images):
        return (images.flatten(1) - self.mean) @ self.axes / self.scale

    def decode(self, codes):
        return (codes @ self.axes.T * self.scale + self.mean).unflatten(1, self.shape)

    def vae(self, **options):
        config = {"target_dim": self.num_values, "latent_dim": 24, **options.pop("config")}
        return train_vae(self.codes, config, metric=self.scale**2, floor=self.floor, **options)

    def joined(self, vae, deterministic=False, second_stage=None) -> Autoencoder:
        def encode(images):
            posterior = vae.encode(self.encode(images))
            return posterior.mean, None if deterministic else posterior.logvar

        gamma = None if deterministic else math.exp(float(vae.decoder_log_variance.detach()))
        return Autoencoder("planted", encode, lambda z: self.decode(vae.decode(z)), gamma, second_stage=second_stage)


def drawing_cases(rs, count: int, held_out: int, steps: int) -> list[Case]:
    """Over-, under- and balanced VAEs of drawings."""
    known = {}

    def data(r, seed):
        if (r, seed) not in known:
            known[r, seed] = Drawings(r, seed, count, held_out)
        return known[r, seed]

    def balanced(r, seed):
        """Gamma falls slowly and stops above the misfit of so small a network, as in the preset `quickstart`."""
        if (r, seed, "vae") not in known:
            drawn = data(r, seed)
            unit = drawn.variance / drawn.num_values
            config = {"latent_dim": 24, "gamma": "learned", "gamma_init": 48 * unit, "min_gamma": 0.8 * unit}
            known[r, seed, "vae"] = drawn.vae(config=config, steps=steps, seed=seed)
        return known[r, seed, "vae"]

    def joined(r):
        return lambda seed: (data(r, seed).joined(balanced(r, seed)), data(r, seed).images)

    def vae(r, deterministic=False, kappa=24, share=None, faster=1.0):
        """`share`: a gamma that is fixed there, as a share of the variance of the data per value."""

        def build(seed):
            drawn = data(r, seed)
            unit = drawn.variance / drawn.num_values
            gamma = {"gamma": "learned", "gamma_init": 48 * unit, "min_gamma": 0.8 * unit}
            if share is not None:
                gamma = {"gamma": "fixed", "gamma_init": share * unit}
            options = dict(config={"latent_dim": kappa, **gamma}, steps=int(steps * faster), seed=seed)
            model = drawn.vae(**options, deterministic=deterministic)
            return drawn.joined(model, deterministic), drawn.images

        return build

    cases = []
    for r in rs:
        # Beside the 3,072 values that gamma is a variance of, few directions vary: 400 times the variance per value
        # exceeds that of most of them.
        cases += [
            Case(f"drawings r={r}: gamma learned", joined(r), "balanced", not_findings=("large_gamma",), r=r),
            Case(f"drawings r={r}: gamma fixed far too small", vae(r, share=1e-4, faster=0.5), "under", r=r),
            Case(f"drawings r={r}: no KL term", vae(r, deterministic=True, faster=0.5), "under", r=r),
            Case(f"drawings r={r}: gamma fixed far too large", vae(r, share=400.0, faster=0.3), "over",
                 ("large_gamma",), r=r),
        ]  # fmt: skip
    low, high = rs[0], rs[-1]
    middle = rs[len(rs) // 2]
    cases += [
        Case(f"drawings r={middle}: kappa = {middle // 3}", vae(middle, kappa=middle // 3, faster=0.5), "over",
             r=middle),
        Case(f"drawings r={high}: kappa = {high // 2}", vae(high, kappa=high // 2, faster=0.5), "over", r=high),
        Case(f"drawings r={low}: every dimension dead", vae(low, share=3e4, faster=0.2), "over", r=low),
        Case(f"drawings r={low}: kappa = r, no KL term", vae(low, True, kappa=low, faster=1.2), "balanced",
             ("prior_hole",), r=low),
    ]  # fmt: skip

    def shifted(seed):
        view, images = joined(low)(seed)

        def encode(pixels):
            mean, logvar = view.encode(pixels)
            return 3 * mean + 1, logvar + 2 * math.log(3)

        return Autoencoder("planted", encode, lambda z: view.decode((z - 1) / 3)), images

    cases.append(Case(f"drawings r={low}: codes at another scale", shifted, "balanced", ("prior_hole",), r=low))

    def staged(dead):
        def build(seed):
            drawn = data(low, seed)
            model = balanced(low, seed)
            with torch.no_grad():
                posterior = model.encode(drawn.codes)
                z = posterior.sample(generator=torch.Generator().manual_seed(seed))
            gamma = {"gamma": "fixed", "gamma_init": 1.0} if dead else {"gamma": "learned", "gamma_init": 0.1}
            second = train_vae(z, {"latent_dim": z.shape[1], **gamma}, steps=steps // 2, seed=seed + 7)
            if not dead:
                second.match_moments(z.mean(0), torch.cov(z.T), torch.Generator().manual_seed(seed))
            return drawn.joined(model, second_stage=second), drawn.images

        return build

    finding = ("dead_second_stage",)
    cases += [
        Case(f"drawings r={low}: dead second stage", staged(True), "balanced", finding, r=low),
        Case(f"drawings r={low}: second stage alive", staged(False), "balanced", (), finding, r=low),
    ]
    return cases


# ------------------------------------------------------------------------------------------------------------- MNIST


def mnist_cases(folder: str | None, count: int, held_out: int, steps: int) -> list[Case]:
    def images(split, most):
        if folder is None:
            found = load_images("digits", resolution=28, num_channels=1)
            half = len(found) // 2
            return found.pixels(0, half) if split == "train" else found.pixels(half, len(found))
        found = load_images("mnist", train_data_dir=folder, resolution=28, split=split)
        return found.pixels(0, most)

    def vae(kappa=32, share=None, deterministic=False, faster=1.0):
        def build(seed):
            rows = images("train", count).flatten(1)
            unit = float(rows.var(0).mean())
            gamma = {"gamma": "learned", "gamma_init": unit, "min_gamma": 1e-4}
            if share is not None:
                gamma = {"gamma": "fixed", "gamma_init": share * unit}
            config = {"latent_dim": kappa, "hidden_dim": 192, **gamma}
            model = train_vae(rows, config, int(steps * faster), seed, deterministic=deterministic)

            def encode(pixels):
                posterior = model.encode(pixels.flatten(1))
                return posterior.mean, None if deterministic else posterior.logvar

            stated = None if deterministic else math.exp(float(model.decoder_log_variance.detach()))
            decode = lambda z: model.decode(z).reshape(-1, 1, 28, 28)  # noqa: E731
            return Autoencoder("planted", encode, decode, stated), images("test", held_out)

        return build

    name = "digits" if folder is None else "MNIST"
    return [
        Case(f"{name}: gamma learned", vae(), "balanced", not_findings=("large_gamma",)),
        Case(f"{name}: gamma fixed far too large", vae(share=15.0, faster=0.5), "over", ("large_gamma",)),
        Case(f"{name}: kappa = 2", vae(kappa=2, faster=0.7), "over"),
        Case(f"{name}: kappa = 64, no KL term", vae(kappa=64, deterministic=True), "under"),
    ]


# ------------------------------------------------------------------------------------------------------ affine model


def affine_cases(dim: int, kappa: int, rank: int, held_out: int) -> list[Case]:
    """The affine VAE at its optimum (Theorem 1): W_x = U (Lambda - gamma)^(1/2), and the encoder that fits it."""

    def data(seed, clusters=False):
        generator = torch.Generator().manual_seed(derived_seed(seed, 70))
        axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0][:, :rank]
        deviations = torch.logspace(0.5, -0.5, rank, base=2)
        factors = torch.randn(held_out, rank, generator=generator)
        if clusters:
            side = torch.randint(2, (held_out, rank), generator=generator) * 2 - 1
            factors = (side + 0.15 * factors) / (1 + 0.15**2) ** 0.5
        return axes, deviations, factors @ (axes * deviations).T

    def at(gamma, clusters=False, repeated=False):
        def build(seed):
            axes, deviations, rows = data(seed, clusters)
            kept = (deviations.square() - gamma).clamp(min=0).sqrt()
            loadings = torch.zeros(dim, kappa)
            loadings[:, :rank] = axes * kept
            if repeated:  # every direction in several dimensions, all of them sure of themselves
                generator = torch.Generator().manual_seed(derived_seed(seed, 71))
                mixing = torch.randn(rank, kappa, generator=generator) / rank**0.5
                encoder = (axes / deviations @ mixing).T
                loadings, logvar = torch.linalg.pinv(encoder), torch.full((kappa,), -9.0)
            else:
                precision = torch.eye(kappa) + loadings.T @ loadings / gamma
                encoder = torch.linalg.solve(precision, loadings.T / gamma)
                logvar = -precision.diagonal().log()
            encode = lambda rows: (rows @ encoder.T, logvar.expand(len(rows), -1))  # noqa: E731
            stated = None if repeated else gamma
            return Autoencoder("planted", encode, lambda z: z @ loadings.T, stated), rows

        return build

    text = f"affine d={dim}, kappa={kappa}, r={rank}"
    return [
        Case(f"{text}: gamma near 0", at(1e-3), "balanced", (), ("prior_hole",), r=rank),
        Case(f"{text}: gamma above most eigenvalues", at(1.3), "over", r=rank),
        Case(f"{text}: each direction coded several times", at(1e-3, repeated=True), "under", r=rank),
        Case(f"{text}: data in clusters", at(1e-3, clusters=True), "balanced", ("prior_hole",), r=rank),
    ]


# ----------------------------------------------------------------------------------------------------- AutoencoderKL


def small_autoencoder_kl(images, kl_weight: float, channels: int, steps: int, seed: int) -> AutoencoderKL:
    """diffusers' class made small, trained on squared errors in [-1, 1] plus the weighted KL term."""
    torch.manual_seed(derived_seed(seed, 52))
    blocks = 2
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(12, 24), norm_num_groups=4, latent_channels=channels, layers_per_block=1,
        mid_block_add_attention=False, sample_size=images.shape[2],
    )  # fmt: skip

    def loss_of(chosen):
        pixels = 2 * images[chosen] - 1
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        error = (decoded - pixels).square().flatten(1).sum(1).mean()
        return error + kl_weight * posterior.kl().mean()

    fit(loss_of, list(model.parameters()), len(images), steps, seed, batch=16, rate=4e-3)
    return model.eval()


def kl_cases(r: int, count: int, held_out: int, steps: int) -> list[Case]:
    def build_with(kl_weight, channels):
        def build(seed):
            images, held = (
                adaptive_avg_pool2d(drawn(r, seed, which, number), 16)
                for which, number in ((60, count), (61, held_out))
            )
            return as_autoencoder(small_autoencoder_kl(images, kl_weight, channels, steps, seed)), held

        return build

    text = f"AutoencoderKL, 16 x 16 drawings r={r}"
    return [
        Case(f"{text}: KL weight 1e-6", build_with(1e-6, 2), "under", (), ("unused_channels",), r=r),
        Case(f"{text}: 8 channels, KL weight 0.02", build_with(0.02, 8), "any", ("unused_channels",), r=r),
    ]


# -------------------------------------------------------------------------------------------------------------- runs


def cost(args) -> None:
    """Seconds of a diagnosis of the largest default pipeline at 64 x 64, untrained, on 5,000 drawings."""
    torch.manual_seed(0)
    autoencoder = VAEPlusAutoencoderModel(VAEPlusAutoencoderConfig(image_size=64, latent_dim=64)).eval()
    own = {"reconstruction_space": "pullback", "target_dim": 3 * 64**2}
    vae, second = (VAEPlusVAEModel(VAEPlusVAEConfig(input_shape=(64,), latent_dim=64, **each)).eval()
                   for each in (own, {}))  # fmt: skip
    images = torch.from_numpy(render_faces(factors_of(range(5_000), 8, 3), 64)).permute(0, 3, 1, 2).contiguous()
    made, wall, processor = provenance(), time.perf_counter(), time.process_time()
    diagnosis = diagnose(VAEPlusPipeline(vae, autoencoder, second), images)
    diagnosis.save_figure(Path(args.work_dir, "cost.png"))
    found = {
        "num_images": len(images),
        "threads": torch.get_num_threads(),
        "processor_seconds": time.process_time() - processor,
        "wall_seconds": time.perf_counter() - wall,
        "load_average": os.getloadavg()[0],
    }
    write_json(Path(args.output), {**made, **found})
    print(found)


def is_right(case: Case, verdict) -> bool:
    names = set(verdict.names)
    right = case.regularization in ("any", verdict.regularization)
    return right and set(case.findings) <= names and not set(case.not_findings) & names


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", default=None, help="folder of MNIST's idx files (without it: the embedded digits)")
    parser.add_argument("--calibration", action="store_true", help="other seeds, factors and sizes")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--measured", action="store_true", help="only what is measured already: judge it again")
    parser.add_argument("--only", default="", help="cases whose name has these words")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work_dir", default="runs/diagnose", help="where measures are kept")
    parser.add_argument("--output", default="results/diagnose.json")
    parser.add_argument("--figures", default=None, help="folder to draw the diagnosis of every case to")
    parser.add_argument("--cost", action="store_true", help="measure the time of a diagnosis instead")
    args = parser.parse_args()
    if args.cost:
        return cost(args)

    count, held_out, steps = (400, 200, 20) if args.smoke else (5_000, 2_500, 1_500)
    if args.calibration:
        cases = [*drawing_cases((3, 6, 10), count, held_out, steps), *mnist_cases(None, count, held_out, steps),
                 *affine_cases(48, 12, 5, held_out), *kl_cases(5, count, held_out, steps // 4)]  # fmt: skip
    else:
        cases = [*drawing_cases((4, 8, 12), count, held_out, steps), *mnist_cases(args.mnist, count, held_out, steps),
                 *affine_cases(64, 16, 6, held_out), *kl_cases(8, count, held_out, steps // 4)]  # fmt: skip
    seeds = args.seeds or ([100] if args.calibration else [0, 1, 2])
    made, rows = provenance(), []
    for seed in seeds:
        for case in tqdm([case for case in cases if args.only in case.name], desc=f"seed {seed}"):
            path = Path(args.work_dir, f"{''.join(c if c.isalnum() else '-' for c in case.name)}-{seed}.json")
            if not path.exists() and args.measured:
                continue
            if not path.exists():
                start = time.perf_counter()
                model, images = case.build(seed)
                trained = time.perf_counter()
                measures = measure(model, images, seed, batch_size=250)
                path.parent.mkdir(parents=True, exist_ok=True)
                seconds = {"build": trained - start, "measure": time.perf_counter() - trained}
                write_json(path, {"seconds": seconds, "measures": measures})
            kept = json.loads(path.read_text(encoding="utf-8"))
            verdict = judge(kept["measures"])
            if args.figures and seed == seeds[0]:
                Path(args.figures).mkdir(parents=True, exist_ok=True)
                draw(verdict, kept["measures"], Path(args.figures, path.stem + ".png"))
            rows.append(row_of(case, seed, kept, verdict))
            print(rows[-1], flush=True)
    if not args.calibration and not args.smoke and not args.only:
        write_json(Path(args.output), {**made, "seeds": seeds, "num_images": held_out, **summary(rows)})
    print(json.dumps({key: value for key, value in summary(rows).items() if key != "rows"}, indent=2))


def row_of(case: Case, seed: int, kept: dict, verdict) -> dict:
    measures = kept["measures"]
    return {
        "case": case.name,
        "seed": seed,
        "planted": {"regularization": case.regularization, "findings": list(case.findings), "r": case.r},
        "verdict": verdict.regularization,
        "confidence": verdict.confidence,
        "findings": verdict.names,
        "right": is_right(case, verdict),
        "estimated_r": verdict.estimated_r,
        "active_units": measures["units"]["active"],
        "unexplained": measures["error"]["unexplained"],
        "redundancy": measures["redundancy"]["half"],
        "gamma_over_error": (measures["gamma"] or {}).get("over_error"),
        "prior": {k: round(v, 3) for k, v in measures["aggregate"]["prior"].items()},
        "seconds": kept["seconds"],
        "jacobian_rank": measures["jacobian_rank"],
        "second_stage": verdict.second_stage,
        "doubts": verdict.doubts,
    }


def summary(rows: list[dict]) -> dict:
    """A case counts as right if it is right for every seed."""
    cases = {row["case"]: True for row in rows}
    for row in rows:
        cases[row["case"]] &= row["right"]
    near = [abs(row["estimated_r"] - row["planted"]["r"]) for row in rows
            if row["case"].startswith("drawings") and row["estimated_r"]]  # fmt: skip
    return {
        "num_cases": len(cases),
        "num_right": sum(cases.values()),
        "runs": len(rows),
        "runs_right": sum(row["right"] for row in rows),
        "wrong": [f"{row['case']}, seed {row['seed']}" for row in rows if not row["right"]],
        "worst_error_of_r": max(near, default=None),
        "rows": rows,
    }


if __name__ == "__main__":
    main()
