"""Do conditional samples show what they were asked for? Digits of a class, and drawings of given factors.

    python benchmarks/conditional.py --data ../shared/data/mnist --work_dir runs/conditional --threads 1

Digits: autoencoder and first VAE of the preset `mnist`, and conditional second stages of its latents. A convolutional
classifier, trained on the real training digits alone, names the class of 10,000 samples, 1,000 of each class (standard
error of an accuracy of .97: .0017); beside them stand the real test digits and their reconstructions. The deviation of
a pixel within a class, a mean over pixels and classes, says how diverse they are.

Drawings: r = 8 factors, the first VAE of model_cards/vaeplus-drawings, and second stages conditioned on the factors. A
convolutional regressor, trained on real drawings alone, reads the factors of 2,000 samples back, whose factors no
training image has: R2 of each factor, 1 minus the mean squared error over the variance.

What is in `--work_dir` is not measured again. Without `--data` the digits are left out.
"""

import json
from dataclasses import replace
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from common import ROOT, benchmark, goal
from torch import nn

from hf_vaeplus import VAEPlusAutoencoderModel, VAEPlusPipeline, VAEPlusVAEModel
from hf_vaeplus.cli.flags import local_path
from hf_vaeplus.data.labels import read_labels
from hf_vaeplus.data.pixels import to_unit_range
from hf_vaeplus.data.rendered_faces import factors_of, render_faces
from hf_vaeplus.training.codes import load_frozen
from hf_vaeplus.training.loop import train
from hf_vaeplus.training.options import StageOptions, load_preset, stage_options
from hf_vaeplus.training.stages import build_stage, fit_mixture, open_images, run_stage

# Second stage and fields of its config, by what a row is called.
PRIORS = {
    "vae": ("vae", {}),
    "flow_matching": ("flow_matching", {}),
    "guided": ("flow_matching", {"distillation_guidance": 1.5}),
    "mixture": ("mixture", {"num_components": 10}),
    "mixture of 30": ("mixture", {"num_components": 30}),
    "coupling_flow": ("coupling_flow", {}),
}
SCALES = (1.5, 3.0)  # of guidance


def add_options(parser):
    parser.add_argument("--data", type=local_path, default=None, help="folder of MNIST's four files")
    parser.add_argument("--work_dir", type=local_path, default="runs/conditional", help="runs and what was measured")
    parser.add_argument("--priors", nargs="+", choices=list(PRIORS), default=list(PRIORS))
    parser.add_argument("--steps_share", type=float, default=1.0, help="of the steps of each training")
    parser.add_argument("--only", nargs="+", choices=("digits", "drawings"), default=("digits", "drawings"))
    parser.add_argument("--seed", type=int, default=0)


def once(path: Path, work) -> dict:
    """What `work()` returns, or returned in an earlier run."""
    if not path.exists():
        found = work()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def convolutions(num_channels: int, size: int, num_outputs: int) -> nn.Module:
    """The judge: three scales of convolutions, then linear."""
    widths, layers = (num_channels, 16, 32, 64), []
    for before, after in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    side = size // 8
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * side**2, num_outputs))


def judge(pixels_of, count: int, targets: torch.Tensor, loss, model: nn.Module, epochs: int, seed: int) -> nn.Module:
    """Train `model` on real images alone: `pixels_of(rows)` are float images in [0, 1]."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    steps = max(1, epochs * (count // 128))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for step in common.tqdm(range(steps), desc="judge"):
        if step % (count // 128) == 0:
            order = torch.randperm(count, generator=generator)
        rows = order[step % (count // 128) * 128 :][:128]
        optimizer.zero_grad()
        loss(model(pixels_of(rows)), targets[rows]).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def judged(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part) for part in images.split(500)])


def fitted(options: StageOptions):
    """The trained second stage, and the seconds that its training took."""
    stage = replace(build_stage(options), preview=None)
    start = common.now()
    model = fit_mixture(stage, options) if options.second_stage == "mixture" else train(stage, options)
    return model.eval().requires_grad_(False), common.now() - start


def ways_of(name: str) -> dict[str, dict]:
    """Options of sampling, by what a row is called."""
    ways = {name: {}}
    if name == "flow_matching":
        ways["flow_matching, its ODE"] = {"num_inference_steps": 16}
        ways |= {f"flow_matching, guidance {scale:g}": {"guidance_scale": scale} for scale in SCALES}
    return ways


def first_stages_of_digits(data: str, work: Path, cache_dir: str, seed: int, steps_share: float, **more):
    """Trains autoencoder and first VAE of the preset `mnist` in `work`; returns what makes the options of a stage."""
    own = dict(train_data_dir=data, cache_dir=cache_dir, seed=seed, resume_from_checkpoint="latest", **more)
    preset = load_preset("mnist")

    def options_of(stage, **changes) -> StageOptions:
        options = stage_options(stage, preset, **own, **changes)
        return replace(options, max_train_steps=max(2, round(options.max_train_steps * steps_share)))

    autoencoder = str(work / "autoencoder")
    run_stage(options_of("autoencoder", output_dir=autoencoder))
    run_stage(options_of("vae", autoencoder=autoencoder, output_dir=str(work / "vae")))
    return options_of


def digits(args) -> dict:
    work, more = Path(args.work_dir) / "digits", args.pick({"max_train_samples": 2000}, {}, {})
    options_of = first_stages_of_digits(
        args.data, work, str(Path(args.work_dir) / "cache"), args.seed, args.steps_share, **more
    )
    earlier = {stage: str(work / stage) for stage in ("autoencoder", "vae")}
    autoencoder = load_frozen(VAEPlusAutoencoderModel, earlier["autoencoder"])
    vae = load_frozen(VAEPlusVAEModel, earlier["vae"])
    start = options_of("second_stage", **earlier, label_column="label")
    images, test = open_images(start), open_images(start, "test")
    labels, test_labels = read_labels(images, "label").values, read_labels(test, "label").values

    torch.manual_seed(args.seed)
    model, path = convolutions(1, 28, 10), work / "judge.safetensors"
    judge_of(path, model, lambda: judge(
        lambda rows: to_unit_range(images.batch(rows.tolist())["pixel_values"]), len(images), labels,
        nn.CrossEntropyLoss(label_smoothing=0.05), model, args.pick(1, 1, 3), args.seed))  # fmt: skip

    def accuracy(pixels, wanted) -> float:
        return float((judged(model, pixels).argmax(1) == wanted).double().mean())

    real = test.pixels(0, len(test))
    pipe = VAEPlusPipeline(vae, autoencoder)
    pipe.set_progress_bar_config(disable=True)
    decoded = pipe.reconstruct(real, "pt", 500)
    rows = [
        {"digits": "real test digits", "accuracy": accuracy(real, test_labels)},
        {"digits": "their reconstructions", "accuracy": accuracy(decoded, test_labels)},
    ]
    for row, pixels in zip(rows, (real, decoded), strict=True):
        row["mean_deviation"] = float(torch.stack([pixels[test_labels == d].std(0).mean() for d in range(10)]).mean())
    wanted = torch.arange(10).repeat(args.pick(5, 100, 1000))
    for name in args.priors:
        (kind, fields), folder = PRIORS[name], work / f"{name}-{args.seed}"
        settings = {
            "second_stage": kind,
            "label_column": "label",
            "output_dir": str(folder / "model"),
            "model": fields,
        }
        if kind != "mixture":
            settings |= dict(max_train_steps=3000, use_ema=True)
        if kind == "coupling_flow":  # a step takes ten times as long
            settings |= dict(max_train_steps=500, learning_rate=2e-3)
        options = options_of("second_stage", **earlier, **settings)

        def measure(options=options, name=name) -> list[dict]:
            second, seconds = fitted(options)
            whole = VAEPlusPipeline(vae, autoencoder, second)
            whole.set_progress_bar_config(disable=True)
            found = []
            for row, way in ways_of(name).items():
                drawn = whole(class_labels=wanted, generator=torch.Generator().manual_seed(1), output_type="pt",
                              decode_batch_size=500, **way).images  # fmt: skip
                found.append({"digits": row, "accuracy": accuracy(drawn, wanted), "training_seconds": seconds,
                              "mean_deviation": float(drawn.reshape(-1, 10, 784).std(0).mean())})  # fmt: skip
            return found

        rows += once(folder / "rows.json", measure)
    best = max((row["accuracy"] for row in rows[2:] if row["digits"] in PRIORS), default=None)
    goals = [goal("class accuracy of conditional digits, one pass", best, ">= 0.97")]
    return {"digits": rows, "num_digits": len(wanted), "goals_of_digits": goals}


def judge_of(path: Path, model: nn.Module, work) -> None:
    """Trains `model` by `work`, or takes the weights that an earlier run has left."""
    from safetensors.torch import load_model, save_model

    if path.exists():
        load_model(model.eval().requires_grad_(False), path)
    else:
        work()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, path)


def r2(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of each factor; both of shape `(n, r)`."""
    found, wanted = found.double(), wanted.double()
    return 1 - (found - wanted).square().mean(0) / wanted.var(0, correction=0)


def drawings(args) -> dict:
    card, work = ROOT / "model_cards" / "vaeplus-drawings", Path(args.work_dir) / "drawings"
    count = args.pick(400, 4000, 20_000)
    base = dict(
        stage="second_stage", dataset_name="rendered-faces", num_factors=8, resolution=32, max_train_samples=count,
        autoencoder=str(card / "autoencoder"), vae=str(card / "vae"), cache_dir=str(Path(args.work_dir) / "cache"),
        label_column="factors", train_batch_size=256, use_ema=True, logging_steps=250,
        model={"hidden_dim": 256, "num_blocks": 2}, resume_from_checkpoint="latest", seed=args.seed,
        max_train_steps=max(4, round(args.pick(8, 300, 3000) * args.steps_share)),
    )  # fmt: skip
    images = open_images(StageOptions(**base))
    factors = read_labels(images, "factors").values
    torch.manual_seed(args.seed)
    model, path = convolutions(3, 32, 8), work / "judge.safetensors"
    judge_of(path, model, lambda: judge(
        lambda rows: to_unit_range(images.batch(rows.tolist())["pixel_values"]), len(images), factors, F.mse_loss,
        model, args.pick(1, 2, 10), args.seed))  # fmt: skip
    wanted = torch.from_numpy(factors_of(range(10**6, 10**6 + args.pick(50, 500, 2000)), 8))
    real = to_unit_range(torch.from_numpy(render_faces(wanted.numpy(), 32)).permute(0, 3, 1, 2))
    autoencoder = load_frozen(VAEPlusAutoencoderModel, str(card / "autoencoder"))
    vae = load_frozen(VAEPlusVAEModel, str(card / "vae"))

    def row(name, pixels, **more) -> dict:
        each = r2(judged(model, pixels), wanted)
        return {"drawings": name, "r2": float(each.mean()), "r2_of_the_worst": float(each.min()), **more,
                "r2_of_each": " ".join(f"{value:.3f}" for value in each.tolist())}  # fmt: skip

    pipe = VAEPlusPipeline(vae, autoencoder)
    pipe.set_progress_bar_config(disable=True)
    rows = [row("real drawings", real), row("their reconstructions", pipe.reconstruct(real, "pt", 500))]
    for name in [name for name in args.priors if PRIORS[name] in (("vae", {}), ("flow_matching", {}))]:
        folder = work / f"{name}-{args.seed}"
        options = StageOptions(**base, second_stage=name, output_dir=str(folder / "model"))

        def measure(options=options, name=name) -> list[dict]:
            second, seconds = fitted(options)
            whole = VAEPlusPipeline(vae, autoencoder, second)
            whole.set_progress_bar_config(disable=True)
            return [
                row(each, whole(conditions=wanted, generator=torch.Generator().manual_seed(1), output_type="pt",
                                decode_batch_size=500, **way).images, training_seconds=seconds)
                for each, way in ways_of(name).items()
            ]  # fmt: skip

        rows += once(folder / "rows.json", measure)
    best = max((row["r2"] for row in rows[2:] if row["drawings"] in PRIORS), default=None)
    goals = [goal("R2 of the factors of conditional drawings, one pass", best, ">= 0.95")]
    return {"drawings": rows, "num_drawings": len(wanted), "goals_of_drawings": goals}


def measure(args) -> dict:
    found = {}
    if args.data and "digits" in args.only:
        found |= digits(args)
    if "drawings" in args.only:
        found |= drawings(args)
    return found


if __name__ == "__main__":
    raise SystemExit(benchmark("conditional", __doc__, measure, add_options))
