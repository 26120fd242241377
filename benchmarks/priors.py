"""Second stages side by side: held-out likelihood of z, samples, seconds, and the two small cases of docs/priors.md.

    python benchmarks/priors.py --data ../shared/data/celeba128 --work_dir runs/priors --threads 2

Faces: the first VAE of model_cards/vaeplus-celeba128 encodes 25,000 training images and their mirror images, on which
each prior is trained by the real loop; it is measured on one z for each of the validation images, which no stage has
seen. `energy` is the energy distance of 5,000 generated codes (second stage, then the decoder of the first VAE) to
those of 5,000 images that the prior was not trained on; without the pairs of a row with itself it can be below 0.
`copies` is the share of the generated codes that the guard against copies counts. With `--features`, decoded codes and
these 5,000 images are compared at half their size: the distance over Downsample, and the coverage. Drawings: r = 8
factors, the first VAE of model_cards/vaeplus-drawings, active dimensions alone against all of them. Bimodal: 8
independent latents of unit variance with two modes each; a coordinate lies between the modes below 0.4. What is in
`--work_dir` is not measured again. Without `--data` the faces are left out.
"""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import common
import torch
from common import ROOT, OverDownsample, benchmark, goal
from torch.nn.functional import avg_pool2d

from hf_vaeplus import VAEPlusAutoencoderModel, VAEPlusVAEModel
from hf_vaeplus.cli.flags import local_path
from hf_vaeplus.data.pixels import to_uint8, to_unit_range
from hf_vaeplus.metrics.latents import PosteriorStatistics
from hf_vaeplus.metrics.memorisation import MemorisationGuard
from hf_vaeplus.training.codes import TensorRows, encode_dataset, load_frozen
from hf_vaeplus.training.loop import train
from hf_vaeplus.training.options import StageOptions
from hf_vaeplus.training.stages import build_stage, fit_mixture, open_images, prior_stage

WIDTH = 0.31  # of a mode
TRAINING = {  # of the faces; --steps_share shortens all of them
    "gaussian": dict(second_stage="mixture", model={"num_components": 1}),
    "mixture": dict(second_stage="mixture", model={"num_components": 10}),
    "flow_matching": dict(
        second_stage="flow_matching", max_train_steps=8000, learning_rate=2e-3, use_ema=True, distillation_share=0.1
    ),
    "coupling_flow": dict(second_stage="coupling_flow", max_train_steps=1000, learning_rate=2e-3, use_ema=True),
}


def add_options(parser):
    parser.add_argument(
        "--data", type=local_path, default=None, help="folder of CelebA at 128 x 128, as parquet files"
    )
    parser.add_argument("--features", type=local_path, default=None, help="as in `vaeplus evaluate`, for the faces")
    parser.add_argument("--work_dir", type=local_path, default="runs/priors", help="runs and what was measured so far")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps_share", type=float, default=1.0, help="of the steps of each training")
    parser.add_argument("--num_scored", type=int, default=400, help="z whose density is taken under the ODE")
    parser.add_argument("--priors", nargs="+", choices=[*TRAINING, "vae"], default=[*TRAINING, "vae"])
    parser.add_argument("--only", nargs="+", choices=("faces", "drawings", "bimodal"),
                        default=("faces", "drawings", "bimodal"))  # fmt: skip


def once(path: Path, work) -> dict:
    """What `work()` returns, or returned in an earlier run."""
    if not path.exists():
        found = work()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def timed(work) -> tuple[float, object]:
    start = common.now()
    found = work()
    return common.now() - start, found


def fit(stage, options):
    return fit_mixture(stage, options) if options.second_stage == "mixture" else train(stage, options)


@torch.no_grad()
def log_density(model, z: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.log_prob(part).double() for part in z.split(250)])


@torch.no_grad()
def energy(a: torch.Tensor, b: torch.Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| (Szekely and Rizzo 2013), without the pairs of a row with itself."""
    within = sum(torch.pdist(each).double().mean() for each in (a, b))
    return float(2 * torch.cdist(a, b).double().mean() - within)


def mean_and_error(values: torch.Tensor) -> dict:
    return {"nll": -float(values.mean()), "standard_error": float(values.std() / math.sqrt(len(values)))}


def encoded(card: Path, options: StageOptions, split: str | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a split, or of the images that are trained on, and one z of each."""
    autoencoder = load_frozen(VAEPlusAutoencoderModel, str(card / "autoencoder"))
    vae = load_frozen(VAEPlusVAEModel, str(card / "vae"))
    codes = encode_dataset(open_images(options, split), autoencoder, autoencoder.encode)
    with torch.no_grad():
        q = vae.encode(codes)
    return codes, q.sample(torch.randn(q.mean.shape, generator=torch.Generator().manual_seed(seed)))


class ImageJudge:
    """Decoded codes beside the held-out images: `half_size` of both."""

    def __init__(self, features: str, autoencoder: VAEPlusAutoencoderModel, held_out):
        self.autoencoder = autoencoder
        real = [half_size(to_unit_range(batch["pixel_values"])) for batch in held_out.in_order(250)]
        self.distances = OverDownsample([features], real)

    @torch.no_grad()
    def __call__(self, codes: torch.Tensor) -> dict:
        images = (half_size(self.autoencoder.decode(part)) for part in codes.split(250))
        (found,) = self.distances.compare(images).values()
        return {"distance": found["over_downsample"], "coverage": found["prdc"]["coverage"]}


def half_size(images: torch.Tensor) -> torch.Tensor:
    return to_uint8(avg_pool2d(images.clamp(0, 1), 2))


def faces(args) -> dict:
    card, work = ROOT / "model_cards" / "vaeplus-celeba128", Path(args.work_dir) / "faces"
    base = dict(
        stage="second_stage", train_data_dir=args.data, split="train[:25000]", resolution=128, logging_steps=250,
        autoencoder=str(card / "autoencoder"), vae=str(card / "vae"), cache_dir=str(Path(args.work_dir) / "cache"),
        train_batch_size=256, resume_from_checkpoint="latest", random_flip=True,
    )  # fmt: skip
    start = StageOptions(**base, second_stage="mixture")
    training_codes, _ = encoded(card, start, None, 0)
    held_codes, _ = encoded(card, start, "train[25000:30000]", 1)
    _, z = encoded(card, start, "validation", 2)
    vae = load_frozen(VAEPlusVAEModel, str(card / "vae"))
    count = len(held_codes)
    rows = [{"prior": "training images", "seed": None, "energy": energy(training_codes[:count], held_codes)}]
    guard, judge = MemorisationGuard(training_codes, held_codes), None
    if args.features:
        autoencoder = load_frozen(VAEPlusAutoencoderModel, str(card / "autoencoder"))
        judge = ImageJudge(args.features, autoencoder, open_images(start, "train[25000:30000]"))
        held = {"prior": "held-out images, reconstructed", "seed": None}
        rows.append({**held, **once(work / "reconstructed.json", lambda: judge(held_codes))})

    def drawn(sample) -> dict:
        generator = torch.Generator().manual_seed(3)
        u, noise = (torch.randn(count, z.shape[1], generator=generator) for _ in range(2))
        with torch.no_grad():
            sample(u[:64], noise[:64])
            seconds, made = timed(lambda: sample(u, noise))
            codes = vae.decode(made)
        found = {"energy": energy(codes, held_codes), "copies": guard.compare(codes)["share"]}
        return {**found, **(judge(codes) if judge else {}), "ms_per_1000": 1e6 * seconds / count}

    rows += [{"prior": "N(0, I)", "seed": None, **mean_and_error(-0.5 * (z.square() + math.log(2 * math.pi)).sum(1)),
             **drawn(lambda u, noise: u)}]  # fmt: skip
    if "vae" in args.priors:
        second = load_frozen(VAEPlusVAEModel, str(card / "second_stage"))

        def of_the_vae():
            noise = torch.randn(256, len(z), second.config.latent_dim, generator=torch.Generator().manual_seed(4))
            with torch.no_grad():
                bound = second.log_prob_bound(z, noise).double()
            return {**mean_and_error(bound), **drawn(second.sample)}

        rows.append({"prior": "vae (its card's, bound of 256)", "seed": 0, **once(work / "vae.json", of_the_vae)})
    for seed in range(args.seeds):
        for name in [name for name in TRAINING if name in args.priors]:
            settings = dict(TRAINING[name])
            if "max_train_steps" in settings:
                settings["max_train_steps"] = round(settings["max_train_steps"] * args.steps_share)
            folder = work / f"{name}-{seed}"
            options = StageOptions(**{**base, **settings, "seed": seed, "output_dir": str(folder / "model")})

            def of_a_prior(options=options, name=name):
                stage = replace(build_stage(options), preview=None)
                seconds, model = timed(lambda: fit(stage, options))
                model = model.eval().requires_grad_(False)
                # An ODE is scored on fewer z; all are compared on these.
                values = log_density(model, z if name != "flow_matching" else z[: args.num_scored])
                found = {**mean_and_error(values), "nll_first": -float(values[: args.num_scored].mean()),
                         "parameters": sum(each.numel() for each in model.parameters()),
                         "training_seconds": seconds, **drawn(model.sample)}  # fmt: skip
                if name == "flow_matching":
                    ode = drawn(lambda u, noise: model.sample(u, num_inference_steps=16))
                    found |= {f"ode_{key}": value for key, value in ode.items()}
                    few = z[: args.num_scored // 8]
                    model.config.num_inference_steps *= 2
                    found["nll_change_with_twice_the_steps"] = float(
                        (values[: len(few)] - log_density(model, few)).mean()
                    )
                if name == "coupling_flow":
                    found["inverse_error"] = float((model.sample(model.to_noise(z)) - z).abs().max())
                return found

            rows.append({"prior": name, "seed": seed, **once(folder / "row.json", of_a_prior)})

    def mean(prior: str, key: str) -> float:
        values = [row[key] for row in rows if row["prior"].startswith(prior) and key in row]
        return statistics.mean(values) if values else math.nan

    def flow(key: str) -> float:
        return mean("flow_matching", key)

    goals = [
        ("nats by which flow matching is better than a mixture of ten",
         mean("mixture", "nll_first") - flow("nll_first"), ">= 6"),
        # Five minutes on two cores, if the second halves the time.
        ("core-seconds of its training", flow("training_seconds") * args.threads, "<= 600"),
        ("copies of its one pass", flow("copies"), "<= 0.06"),
        ("energy of one pass / that of the ODE", flow("energy") / flow("ode_energy"), "<= 1.01"),
        ("distance of its one pass / that of reconstructions",
         flow("distance") / mean("held-out", "distance"), "<= 1.02"),
        ("distance of one pass / that of the ODE", flow("distance") / flow("ode_distance"), "<= 1.01"),
        ("coverage of one pass / that of the second VAE", flow("coverage") / mean("vae", "coverage"), ">= 1"),
    ]  # fmt: skip
    goals = [goal(what, measured, wanted) for what, measured, wanted in goals if not math.isnan(measured)]
    return {"faces": rows, "num_scored": args.num_scored, "goals_of_faces": goals}


def drawings(args) -> dict:
    card, work = ROOT / "model_cards" / "vaeplus-drawings", Path(args.work_dir) / "drawings"
    base = dict(
        stage="second_stage", second_stage="flow_matching", dataset_name="rendered-faces", num_factors=8,
        resolution=32, split="train[:8000]", autoencoder=str(card / "autoencoder"), vae=str(card / "vae"),
        cache_dir=str(Path(args.work_dir) / "cache"), train_batch_size=256, use_ema=True, learning_rate=2e-3,
        logging_steps=250, model={"hidden_dim": 256, "num_blocks": 2}, resume_from_checkpoint="latest",
        max_train_steps=round(args.pick(8, 200, 2000) * args.steps_share),
    )  # fmt: skip
    z = encoded(card, StageOptions(**base), "train[8000:10000]", 1)[1]
    other_z = encoded(card, StageOptions(**base), "train[:2000]", 3)[1]
    normal = mean_and_error(-0.5 * (z[: args.num_scored].square() + math.log(2 * math.pi)).sum(1).double())
    rows = [{"prior": "training images", "energy_of_z": energy(other_z, z)}, {"prior": "N(0, I)", **normal}]
    for seed in range(args.seeds):
        for threshold in (0.01, 0.0):
            folder = work / f"{threshold}-{seed}"
            options = StageOptions(**base, active_threshold=threshold, seed=seed, output_dir=str(folder / "model"))

            def measure(options=options):
                stage = replace(build_stage(options), preview=None)
                seconds, model = timed(lambda: train(stage, options))
                model = model.eval().requires_grad_(False)
                values = log_density(model, z[: args.num_scored])
                found = {"active": model.config.num_active, **mean_and_error(values), "training_seconds": seconds}
                generator = torch.Generator().manual_seed(2)
                u = torch.randn(2000, z.shape[1], generator=generator)
                return {**found, "energy_of_z": energy(model.sample(u), z)}

            name = "flow matching, active dimensions" if threshold else "flow matching, all dimensions"
            rows.append({"prior": name, "seed": seed, **once(folder / "row.json", measure)})
    return {"drawings": rows}


def bimodal(args) -> dict:
    generator = torch.Generator().manual_seed(0)
    modes = 2 * torch.randint(2, (args.pick(500, 20_000, 20_000), 8), generator=generator) - 1
    data = modes * (1 - WIDTH**2) ** 0.5 + WIDTH * torch.randn(modes.shape, generator=generator)
    rows_of = TensorRows({"posterior": torch.cat([data, torch.full_like(data, -1000.0)], 1)})  # z without noise
    moments = PosteriorStatistics(8)
    moments.update(*rows_of.tensors["posterior"].chunk(2, dim=1))

    def between(z):
        return float((z.abs() < 0.4).double().mean())

    rows = [{"prior": "data", "seed": None, "between": between(data)}]
    steps = args.pick(8, 200, 3000)
    for seed in range(args.seeds):
        for name in [name for name in ("mixture", "coupling_flow", "flow_matching") if name in args.priors]:
            folder = Path(args.work_dir) / "bimodal" / f"{name}-{seed}"
            options = StageOptions(
                stage="second_stage", second_stage=name, vae="none", output_dir=str(folder / "model"), seed=seed,
                max_train_steps=round(steps * args.steps_share), train_batch_size=256, use_ema=True,
                learning_rate=2e-3, model={} if name == "mixture" else {"hidden_dim": 128, "num_blocks": 2},
                resume_from_checkpoint="latest", logging_steps=250,
            )  # fmt: skip

            def measure(options=options, name=name):
                model = fit(prior_stage(options, rows_of, moments), options).eval().requires_grad_(False)
                u, noise = torch.randn(2, 20_000, 8, generator=torch.Generator().manual_seed(5))
                found = {"between": between(model.sample(u, noise))}
                if name == "flow_matching":
                    found["between_by_ode"] = between(model.sample(u, num_inference_steps=32))
                return found

            rows.append({"prior": name, "seed": seed, **once(folder / "row.json", measure)})
    flows = [row["between"] for row in rows if row["prior"] == "flow_matching"]
    goals = [goal("share between the modes, one pass", max(flows, default=None), "<= 0.05")]
    return {"bimodal": rows, "goals_of_bimodal": goals}


def measure(args) -> dict:
    found = {}
    if args.data and "faces" in args.only:
        found |= faces(args)
    if "drawings" in args.only:
        found |= drawings(args)
    if "bimodal" in args.only:
        found |= bimodal(args)
    return found


if __name__ == "__main__":
    raise SystemExit(benchmark("priors", __doc__, measure, add_options))
