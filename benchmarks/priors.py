"""Second stages side by side: held-out likelihood, samples, seconds, and the two small cases of docs/priors.md.

    python benchmarks/priors.py --faces ../shared/data/celeba128 --digits ../shared/data/mnist --features FILE.onnx \\
        --work_dir runs/priors --threads 1 --processor_time --seeds 3

Faces: autoencoder and first VAE of model_cards/vaeplus-celeba128; each prior is trained by the real loop on 25,000
training images and their mirror images, and compared with 5,000 other training images. NLL is taken on one z for each
of the validation images, which no stage has seen. Digits: autoencoder and first VAE of the preset `mnist`, all
training digits, and the test digits for comparison and for NLL. Both are done on the latents of the first VAE and,
with the first seed and without this VAE, on the codes of the autoencoder.

`energy` is the energy distance of as many generated codes (second stage, then the decoder of the first VAE) as there
are images to compare with; without the pairs of a row with itself it can be below 0. `copies` is the share of the
generated codes that the guard against copies counts. The generated codes are decoded, faces to half their size:
`distance` over Downsample and `coverage` by the features (faces: `--features`, digits: pixels averaged to 16 x 16),
`copies_in_features`, and `ndb`, the share of 100 bins of the training images that are filled differently.

Drawings: r = 8 factors, the first VAE of model_cards/vaeplus-drawings, active dimensions alone against all of them.
Bimodal: 8 independent latents of unit variance with two modes each; a coordinate lies between the modes below 0.4.
What is in `--work_dir` is not measured again. Without `--faces` or `--digits` these are left out.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import common
import torch
from common import ROOT, OverDownsample, benchmark, goal
from conditional import first_stages_of_digits, fitted, once
from torch.nn.functional import avg_pool2d

from hf_vaeplus import VAEPlusAutoencoderModel, VAEPlusVAEModel
from hf_vaeplus.cli.flags import local_path
from hf_vaeplus.data.pixels import to_uint8, to_unit_range
from hf_vaeplus.metrics.latents import PosteriorStatistics
from hf_vaeplus.metrics.memorisation import MemorisationGuard
from hf_vaeplus.metrics.ndb import NDB
from hf_vaeplus.training.codes import TensorRows, encode_dataset, load_frozen
from hf_vaeplus.training.loop import train
from hf_vaeplus.training.options import StageOptions
from hf_vaeplus.training.stages import fit_mixture, open_images, prior_stage

WIDTH = 0.31  # of a mode
NUM_BINS = 100
PRIORS = ("gaussian", "mixture", "vae", "flow_matching", "coupling_flow")
SPACES = ("latents", "codes")
STEPS = {"vae": 10_000, "flow_matching": 8_000, "coupling_flow": 1_000}  # of faces; --steps_share shortens all of them
STEPS_OF_DIGITS = {"vae": 2_000, "flow_matching": 2_000, "coupling_flow": 500}
NETWORK, NETWORK_OF_DIGITS = dict(hidden_dim=512, num_blocks=3), dict(hidden_dim=256, num_blocks=2)


def add_options(parser):
    parser.add_argument(
        "--faces", type=local_path, default=None, help="folder of CelebA at 128 x 128, as parquet files"
    )
    parser.add_argument("--digits", type=local_path, default=None, help="folder of MNIST's four files")
    parser.add_argument("--features", type=local_path, default=None, help="as in `vaeplus evaluate`, for the faces")
    parser.add_argument("--work_dir", type=local_path, default="runs/priors", help="runs and what was measured so far")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps_share", type=float, default=1.0, help="of the steps of each prior")
    parser.add_argument("--num_scored", type=int, default=400, help="z whose density is taken under the ODE")
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=PRIORS)
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=SPACES)
    parser.add_argument("--only", nargs="+", choices=("faces", "digits", "drawings", "bimodal"),
                        default=("faces", "digits", "drawings", "bimodal"))  # fmt: skip


def settings_of(prior: str, steps: dict[str, int], network: dict, share: float) -> dict:
    """Options of a second stage."""
    if prior in ("gaussian", "mixture"):
        return dict(second_stage="mixture", model={"num_components": 1 if prior == "gaussian" else 10})
    own = dict(second_stage=prior, max_train_steps=max(2, round(steps[prior] * share)), use_ema=True)
    if prior == "coupling_flow":
        return {**own, "learning_rate": 2e-3}
    return {**own, "model": network, **(dict(distillation_share=0.1) if prior == "flow_matching" else {})}


def timed(work) -> tuple[float, object]:
    start = common.now()
    found = work()
    return common.now() - start, found


@torch.no_grad()
def log_density(model, z: torch.Tensor) -> torch.Tensor:
    if isinstance(model, VAEPlusVAEModel):  # a bound
        noise = torch.randn(256, len(z), model.config.latent_dim, generator=torch.Generator().manual_seed(4))
        return model.log_prob_bound(z, noise).double()
    return torch.cat([model.log_prob(part).double() for part in z.split(250)])


@torch.no_grad()
def energy(a: torch.Tensor, b: torch.Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| (Szekely and Rizzo 2013), without the pairs of a row with itself."""
    within = sum(torch.pdist(each).double().mean() for each in (a, b))
    return float(2 * torch.cdist(a, b).double().mean() - within)


def mean_and_error(values: torch.Tensor) -> dict:
    return {"nll": -float(values.mean()), "standard_error": float(values.std() / math.sqrt(len(values)))}


def half_size(images: torch.Tensor) -> torch.Tensor:
    return avg_pool2d(images.clamp(0, 1), 2)


@dataclass
class Study:
    """Trained first stages, and the images by which the priors of their latents are made and judged."""

    name: str
    folder: Path  # of autoencoder and first VAE
    base: dict  # options of the second stage
    held_out: str = ""  # split to compare with
    scored: str = ""  # split of NLL
    steps: dict[str, int] | None = None
    network: dict | None = None
    features: str | None = None
    shown: Callable = torch.clone  # pixels in [0, 1] as they are judged

    def stage(self, name: str):
        kind = VAEPlusAutoencoderModel if name == "autoencoder" else VAEPlusVAEModel
        return load_frozen(kind, str(self.folder / name))

    def images(self, split: str | None):
        return open_images(StageOptions(**{**self.base, "autoencoder": str(self.folder / "autoencoder")}), split)

    @torch.no_grad()
    def rows(self, split: str | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of a split, or of the images that are trained on, and one z of each."""
        autoencoder = self.stage("autoencoder")
        codes = encode_dataset(self.images(split), autoencoder, autoencoder.encode)
        q = self.stage("vae").encode(codes)
        return codes, q.sample(torch.randn(q.mean.shape, generator=torch.Generator().manual_seed(seed)))

    def shown_batches(self, split: str | None):
        """Without mirror images."""
        for batch in self.images(split).unmirrored().in_order(250):
            yield to_uint8(self.shown(to_unit_range(batch["pixel_values"])))


class ImageJudge:
    """Decoded codes beside the held-out images."""

    def __init__(self, study: Study, work: Path):
        self.study, self.autoencoder = study, study.stage("autoencoder")
        training, path = list(study.shown_batches(None)), work / "bins.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            NDB.fit(torch.cat(training), NUM_BINS).save(path)
        held_out = list(study.shown_batches(study.held_out))
        self.distances = OverDownsample([study.features], held_out, bins=[NDB.load(path)], training=training)

    @torch.no_grad()
    def __call__(self, codes: torch.Tensor) -> dict:
        images = (to_uint8(self.study.shown(self.autoencoder.decode(part))) for part in codes.split(250))
        (found,) = self.distances.compare(images).values()
        (filled,) = found["ndb"].values()
        return {
            "distance": found["over_downsample"],
            "coverage": found["prdc"]["coverage"],
            "ndb": filled["ndb_over_k"],
            "copies_in_features": found["memorised"]["share"],
        }


def compare(args, study: Study) -> dict:
    work, name = Path(args.work_dir) / study.name, study.name
    training_codes, _ = study.rows(None, 0)
    held_codes, held_z = study.rows(study.held_out, 1)
    scored_codes, scored_z = study.rows(study.scored, 2)
    vae, count = study.stage("vae"), len(held_codes)
    guard = MemorisationGuard(training_codes, held_codes)

    @cache
    def judge() -> ImageJudge:  # takes minutes, and is not needed where all was measured before
        return ImageJudge(study, work)

    def in_images(codes: torch.Tensor) -> dict:
        return judge()(codes) if study.features else {}

    def judged(codes: torch.Tensor) -> dict:
        found = {"energy": energy(codes, held_codes), "copies": guard.compare(codes)["share"]}
        return {**found, **in_images(codes)}

    def drawn(sample, dim: int, decode) -> dict:
        generator = torch.Generator().manual_seed(3)
        u, noise = (torch.randn(count, dim, generator=generator) for _ in range(2))
        with torch.no_grad():
            sample(u[:64], noise[:64])
            seconds, made = timed(lambda: sample(u, noise))
            codes = decode(made)
        return {**judged(codes), "ms_per_1000": 1e6 * seconds / count}

    one = {"space": "latents", "seed": None}
    found = once(work / "training.json", lambda: judged(training_codes[:count]))
    for key in ("copies", "copies_in_features"):  # they are
        found.pop(key, None)
    rows = [{"prior": "training images", "space": "codes", "seed": None, **found}]
    with torch.no_grad():
        reconstructed = {"codes": held_codes, "latents": vae.decode(held_z)}
    for space, codes in reconstructed.items():
        found = once(work / f"reconstructed-{space}.json", lambda codes=codes: in_images(codes))
        rows.append({**one, "space": space, "prior": "held-out images, reconstructed", **found})
    normal = mean_and_error(-0.5 * (scored_z.square() + math.log(2 * math.pi)).sum(1))
    found = once(work / "normal.json", lambda: drawn(lambda u, noise: u, scored_z.shape[1], vae.decode))
    rows.append({"prior": "N(0, I)", **one, **normal, **found})
    for seed, space, prior in [(s, p, q) for s in range(args.seeds) for p in args.spaces for q in args.priors]:
        if space == "codes" and (seed or prior == "vae"):  # the first VAE is that
            continue
        folder = work / f"{space}-{prior}-{seed}"
        earlier = {"autoencoder": str(study.folder / "autoencoder")}
        earlier |= {"vae": str(study.folder / "vae")} if space == "latents" else {}
        settings = settings_of(prior, study.steps, study.network, args.steps_share)
        options = StageOptions(
            **{**study.base, **earlier, **settings, "seed": seed, "output_dir": str(folder / "model")}
        )
        z, decode = (scored_z, vae.decode) if space == "latents" else (scored_codes, lambda codes: codes)

        def trained(options=options) -> dict:
            model, seconds = fitted(options)
            return {"training_seconds": seconds, "parameters": sum(each.numel() for each in model.parameters())}

        training = once(folder / "training.json", trained)

        def measured(options=options, prior=prior, z=z, decode=decode) -> dict:
            model, _ = fitted(options)  # it is there
            # An ODE is scored on fewer z; all are compared on these.
            values = log_density(model, z if prior != "flow_matching" else z[: args.num_scored])
            found = {**mean_and_error(values), "nll_first": -float(values[: args.num_scored].mean()),
                     **drawn(model.sample, z.shape[1], decode)}  # fmt: skip
            if prior == "flow_matching":
                ode = drawn(lambda u, noise: model.sample(u, num_inference_steps=16), z.shape[1], decode)
                found |= {f"ode_{key}": value for key, value in ode.items()}
                few = z[: args.num_scored // 8]
                model.config.num_inference_steps *= 2
                found["nll_change_with_twice_the_steps"] = float((values[: len(few)] - log_density(model, few)).mean())
            if prior == "coupling_flow":
                found["inverse_error"] = float((model.sample(model.to_noise(z)) - z).abs().max())
            return found

        rows.append({"prior": prior, "space": space, "seed": seed, **training, **once(folder / "row.json", measured)})
        common.tqdm.write(f"{name}: {rows[-1]}")
    return {name: rows, f"means_of_{name}": means(rows)}


def means(rows: list[dict]) -> list[dict]:
    """Mean and largest deviation over seeds, of each prior in each space."""
    found = []
    for space, prior in dict.fromkeys((row["space"], row["prior"]) for row in rows if row["seed"] is not None):
        alike = [row for row in rows if (row["space"], row["prior"]) == (space, prior)]
        row = {"space": space, "prior": prior, "seeds": len(alike)}
        for key in [key for key in alike[0] if key not in ("space", "prior", "seed", "standard_error")]:
            values = [each[key] for each in alike]
            row[key] = statistics.mean(values)
            row[f"{key}_off"] = max(abs(value - row[key]) for value in values)
        found.append(row)
    return found


def faces(args) -> dict:
    base = dict(
        stage="second_stage", second_stage="mixture", train_data_dir=args.faces, split="train[:25000]",
        resolution=128, logging_steps=250,
        cache_dir=str(Path(args.work_dir) / "cache"), train_batch_size=256, resume_from_checkpoint="latest",
        random_flip=True,
    )  # fmt: skip
    folder = ROOT / "model_cards" / "vaeplus-celeba128"
    found = compare(args, Study("faces", folder, base, "train[25000:30000]", "validation", STEPS, NETWORK,
                                args.features, half_size))  # fmt: skip

    def mean(prior: str, key: str, rows=found["means_of_faces"]) -> float:
        values = [row[key] for row in rows if row["prior"] == prior and row["space"] == "latents" and key in row]
        return statistics.mean(values) if values else math.nan

    def flow(key: str) -> float:
        return mean("flow_matching", key)

    reconstructions = mean("held-out images, reconstructed", "distance", found["faces"])
    goals = [
        ("nats by which flow matching is better than a mixture of ten",
         mean("mixture", "nll_first") - flow("nll_first"), ">= 6"),
        # Five minutes on two cores, if the second halves the time.
        ("core-seconds of its training", flow("training_seconds") * args.threads, "<= 600"),
        ("copies of its one pass", flow("copies"), "<= 0.06"),
        ("energy of one pass / that of the ODE", flow("energy") / flow("ode_energy"), "<= 1.01"),
        ("distance of one pass / that of the ODE", flow("distance") / flow("ode_distance"), "<= 1.01"),
        ("distance of its one pass / that of reconstructions", flow("distance") / reconstructions, "<= 1.02"),
        ("distance of the second VAE / that of reconstructions", mean("vae", "distance") / reconstructions, "<= 1.02"),
        ("coverage of one pass / that of the second VAE", flow("coverage") / mean("vae", "coverage"), ">= 1"),
        ("inverse error of the coupling flow", mean("coupling_flow", "inverse_error"), "<= 1e-5"),
    ]  # fmt: skip
    goals = [goal(what, measured, wanted) for what, measured, wanted in goals if not math.isnan(measured)]
    return {**found, "num_scored": args.num_scored, "goals_of_faces": goals}


def digits(args) -> dict:
    folder = Path(args.work_dir) / "digits"
    base = dict(
        stage="second_stage", second_stage="mixture", train_data_dir=args.digits, dataset_name="mnist",
        resolution=28, num_channels=1,
        logging_steps=250, cache_dir=str(Path(args.work_dir) / "cache"), train_batch_size=256,
        resume_from_checkpoint="latest",
    )  # fmt: skip
    first_stages_of_digits(args.digits, folder, base["cache_dir"], seed=0, steps_share=1.0)
    study = Study("digits", folder, base, "test", "test", STEPS_OF_DIGITS, NETWORK_OF_DIGITS, "pixels:16")
    return compare(args, study)


def drawings(args) -> dict:
    card, work = ROOT / "model_cards" / "vaeplus-drawings", Path(args.work_dir) / "drawings"
    base = dict(
        stage="second_stage", second_stage="flow_matching", dataset_name="rendered-faces", num_factors=8,
        resolution=32, split="train[:8000]", autoencoder=str(card / "autoencoder"), vae=str(card / "vae"),
        cache_dir=str(Path(args.work_dir) / "cache"), train_batch_size=256, use_ema=True,
        logging_steps=250, model={"hidden_dim": 256, "num_blocks": 2}, resume_from_checkpoint="latest",
        max_train_steps=round(args.pick(8, 200, 2000) * args.steps_share),
    )  # fmt: skip
    study = Study("drawings", card, base)
    z, other_z = study.rows("train[8000:10000]", 1)[1], study.rows("train[:2000]", 3)[1]
    normal = mean_and_error(-0.5 * (z[: args.num_scored].square() + math.log(2 * math.pi)).sum(1).double())
    rows = [{"prior": "training images", "energy_of_z": energy(other_z, z)}, {"prior": "N(0, I)", **normal}]
    for seed in range(args.seeds):
        for threshold in (0.01, 0.0):
            folder = work / f"{threshold}-{seed}"
            options = StageOptions(**base, active_threshold=threshold, seed=seed, output_dir=str(folder / "model"))

            def measure(options=options):
                model, seconds = fitted(options)
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
    # A map of noise that parts the modes of eight coordinates is steep: it takes a larger network and many steps.
    large = {"model": {"hidden_dim": 256, "num_blocks": 3}, "distillation_share": 0.15}
    settings = {"mixture": {}, "coupling_flow": {"learning_rate": 2e-3}, "flow_matching": large}
    steps = {"mixture": 1, "coupling_flow": args.pick(8, 200, 1000), "flow_matching": args.pick(8, 200, 24_000)}
    for seed in range(args.seeds):
        for name in [name for name in settings if name in args.priors]:
            folder = Path(args.work_dir) / "bimodal" / f"{name}-{seed}"
            options = StageOptions(
                stage="second_stage", second_stage=name, vae="none", output_dir=str(folder / "model"), seed=seed,
                max_train_steps=max(2, round(steps[name] * args.steps_share)), train_batch_size=256, use_ema=True,
                resume_from_checkpoint="latest", logging_steps=250, **settings[name],
            )  # fmt: skip

            def measure(options=options, name=name):
                stage = prior_stage(options, rows_of, moments)
                model = fit_mixture(stage, options) if name == "mixture" else train(stage, options)
                model = model.eval().requires_grad_(False)
                u, noise = torch.randn(2, 20_000, 8, generator=torch.Generator().manual_seed(5))
                found = {"between": between(model.sample(u, noise))}
                if name == "flow_matching":
                    found["between_by_ode"] = between(model.sample(u, num_inference_steps=32))
                return found

            rows.append({"prior": name, "seed": seed, **once(folder / "row.json", measure)})
    goals = []
    for name, key, what in (
        ("coupling_flow", "between", "coupling flow"),
        ("flow_matching", "between", "one pass of flow matching"),
        ("flow_matching", "between_by_ode", "its ODE"),
    ):
        worst = max((row[key] for row in rows if row["prior"] == name), default=None)
        goals.append(goal(f"share between the modes, {what}", worst, "<= 0.05"))
    return {"bimodal": rows, "goals_of_bimodal": goals}


def measure(args) -> dict:
    found = {}
    if args.faces and "faces" in args.only:
        found |= faces(args)
    if args.digits and "digits" in args.only:
        found |= digits(args)
    if "drawings" in args.only:
        found |= drawings(args)
    if "bimodal" in args.only:
        found |= bimodal(args)
    return found


if __name__ == "__main__":
    raise SystemExit(benchmark("priors", __doc__, measure, add_options))
