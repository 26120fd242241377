"""The first VAE with and without the decoder in its loss: time, error, distance and active units of each form.

    python benchmarks/pullback.py --train_data_dir celeba --autoencoder runs/autoencoder --features extractor.onnx

Four questions about one trained autoencoder, answered in `results/bench_pullback_<resolution>.json`: how many codes
the metric needs; how far its quadratic form holds; what a first VAE trained on images, by the metric and on bare codes
comes to after the same steps, and when; and what a second stage and the samples make of each. `docs/pullback.md` has
the derivation.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from hf_vaeplus.data.pixels import to_unit_range
from hf_vaeplus.evaluation.evaluate import evaluate
from hf_vaeplus.evaluation.features import Pixels, open_extractor
from hf_vaeplus.modeling_vaeplus import VAEPlusAutoencoderModel, VAEPlusVAEModel, sum_of_squares
from hf_vaeplus.provenance import provenance
from hf_vaeplus.training.codes import encode_dataset, load_frozen
from hf_vaeplus.training.loop import train
from hf_vaeplus.training.options import stage_options
from hf_vaeplus.training.stages import build_pipeline, build_stage, open_images, run_stage

FORMS = ("image", "pullback", "input")


def mean_error(decoder, images, codes) -> float:
    """||x - decoder(code)||^2, mean over the images."""
    parts = zip(images.split(250), codes.split(250), strict=True)
    return float(torch.cat([sum_of_squares(decoder(code), image) for image, code in parts]).mean())


# ----------------------------------------------------------------------------------------------------- the metric


def how_many_codes(autoencoder, codes, counts) -> dict:
    """Metrics of the first n codes beside that of all of them, and the seconds that each takes."""
    metrics, seconds, done = {}, {}, 0
    total, elapsed = 0.0, 0.0
    for count in tqdm(counts, desc="metrics"):
        started = time.perf_counter()
        total = total + (count - done) * autoencoder.pullback_metric(codes[done:count])
        elapsed, done = elapsed + time.perf_counter() - started, count
        metrics[count], seconds[count] = total / count, elapsed
    best = metrics[counts[-1]]
    values, axes = torch.linalg.eigh(best)
    whiten = axes / values.clamp(min=1e-9 * float(values[-1])).sqrt()
    return {
        "metric": best,
        "rows": [
            {
                "codes": count,
                "seconds": seconds[count],
                "relative_distance": float((metric - best).norm() / best.norm()),
                # by how much the metric misjudges a direction, at most: 1 is no error
                "directions": torch.linalg.eigvalsh(whiten.T @ metric @ whiten)[[0, -1]].tolist(),
            }
            for count, metric in metrics.items()
        ],
        "eigenvalues": values.flip(0).tolist(),
    }


@torch.no_grad()
def how_far_it_holds(autoencoder, metric, vae, images, codes, factors) -> dict:
    """True and predicted change of images when the codes change as the trained VAE's posterior samples do, scaled."""
    noise = torch.randn(len(codes), vae.config.latent_dim, generator=torch.Generator().manual_seed(0))
    change = vae.decode(vae.encode(codes).sample(noise)) - codes
    decoded, error = autoencoder.decode(codes), mean_error(autoencoder.decode, images, codes)
    along = torch.func.jvp(autoencoder.decode, (codes,), (change,))[1]
    rows = []
    for factor in factors:
        moved = codes + factor * change
        rows.append({
            "factor": factor,
            "change_of_image": mean_error(autoencoder.decode, decoded, moved),
            "change_of_error": mean_error(autoencoder.decode, images, moved) - error,
            "by_the_metric_at_each_code": factor**2 * float(along.square().flatten(1).sum(1).mean()),
            "by_the_mean_metric": factor**2 * float(((change @ metric.to(change)) * change).sum(1).mean()),
        })  # fmt: skip
    return {"error_of_the_autoencoder": error, "rows": rows}


def cross_term(autoencoder, metric, images, codes) -> dict:
    """What J^T r, which the quadratic form drops, could win: the error after one Gauss-Newton step of every code."""
    steps, inverse = (
        [],
        torch.linalg.inv(metric + 1e-6 * metric.trace() / len(metric) * torch.eye(len(metric)).double()),
    )
    for image, code in zip(images.split(50), codes.split(50), strict=True):
        code = code.clone().requires_grad_()
        slope = torch.autograd.grad(-0.5 * (image - autoencoder.decode(code)).square().sum(), code)[0]  # J^T r
        steps.append(slope @ inverse.to(slope))
    step = torch.cat(steps)
    with torch.no_grad():
        before, *after = (mean_error(autoencoder.decode, images, codes + size * step) for size in (0, 0.25, 0.5, 1))
    return {"error": before, "after_quarter_half_and_whole_step": after}


# ------------------------------------------------------------------------------------------------------- training


def first_vae(form, args, images, codes, autoencoder, **model) -> dict:
    """Train one form and follow its true error: per image of `images`, in image space, latents sampled."""
    name = "-".join([form, *map(str, model.values())])
    folder = args.output_dir / f"vae-{name}"
    record = folder / "record.json"
    if record.exists():
        return json.loads(record.read_text(encoding="utf-8"))
    shape = {"latent_dim": 64, "hidden_dim": 512, "num_blocks": 3, "reconstruction_space": form}
    preset = {"common": args.common, "vae": {"max_train_steps": args.steps, "model": {**shape, **model}}}
    clip = {"image": args.max_grad_norm, "pullback": args.max_grad_norm, "input": 0.0}[form]
    options = stage_options(
        "vae", preset, autoencoder=args.autoencoder, max_grad_norm=clip, train_batch_size=64, use_ema=True,
        sample_steps=args.watch_steps, checkpointing_steps=args.steps, output_dir=str(folder),
    )  # fmt: skip
    noise = torch.randn(len(codes), shape["latent_dim"], generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    stage = build_stage(options)
    setup, curve, paused, clock = time.perf_counter() - started, [], 0.0, None

    def timed(*batch):
        nonlocal clock
        clock = clock or time.perf_counter()
        return stage.prepare(*batch)

    def watch(model):
        nonlocal paused
        asked = time.perf_counter()
        latents = model.encode(codes).sample(noise[:, : model.config.latent_dim])
        error = mean_error(lambda z: autoencoder.decode(model.decode(z)), images, latents)
        curve.append({"seconds": asked - clock - paused, "squared_error": error})
        paused += time.perf_counter() - asked
        return Image.new("L", (1, 1))

    trained = train(replace(stage, prepare=timed, preview=watch), options)
    last = json.loads((folder / "stats.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    result = {
        "form": form,
        **model,
        "setup_seconds": setup,
        "seconds": curve[-1]["seconds"],
        "curve": curve,
        "squared_error": curve[-1]["squared_error"],
        "training_squared_error": last["squared_error"],
        "kl": last["kl"],
        "gamma": float(trained.decoder_log_variance.exp()),
        "active_units": last["active_units"],
    }
    record.write_text(json.dumps(result), encoding="utf-8")
    return result


def time_to(result: dict, error: float) -> float | None:
    """Seconds of training after which the true error stays below `error`."""
    above = [place for place, point in enumerate(result["curve"]) if point["squared_error"] > error]
    place = above[-1] + 1 if above else 0
    return result["curve"][place]["seconds"] if place < len(result["curve"]) else None


def judge(form, args, validation, extractor) -> dict:
    """A second stage on top of one form, and what all metrics say of the pipeline."""
    record = args.output_dir / f"second-{form}" / "record.json"
    if record.exists():
        return json.loads(record.read_text(encoding="utf-8"))
    preset = {"common": args.common, "second_stage": {"model": {"hidden_dim": 512, "num_blocks": 3}}}
    options = stage_options(
        "second_stage", preset, autoencoder=args.autoencoder, vae=str(args.output_dir / f"vae-{form}"),
        max_train_steps=args.second_steps, train_batch_size=256, use_ema=True, checkpointing_steps=args.second_steps,
        output_dir=str(record.parent), resume_from_checkpoint="latest",
    )  # fmt: skip
    pipe = build_pipeline(options, run_stage(options))
    pipe.set_progress_bar_config(disable=True)
    found = evaluate(pipe, validation, [extractor], ["prior", "second_stage"], num_images=args.num_images)
    record.write_text(json.dumps(found), encoding="utf-8")
    return found


def summary_of(found: dict, run: dict, num_dims: int) -> dict:
    """The figures that a first VAE is judged by; -ELBO with the gamma that is best for its true error (Eq. 2)."""
    error = run["squared_error"]
    negative_elbo = 0.5 * num_dims * (math.log(2 * math.pi * error / num_dims) + 1) + found["vae"]["kl"]
    sets = {name: next(iter(one["distances"].values()))["frechet"] for name, one in found["sets"].items()}
    return {
        "frechet": sets,
        "negative_elbo": negative_elbo,
        "kl": found["vae"]["kl"],
        "mmd": found["vae"]["mmd"],
        "second_stage_kl": found["second_stage"]["kl"],
        "active_units_by_variance": found["vae"]["active_units_by_variance"],
        "squared_error_of_the_mean": found["squared_error"],
    }


def table(results: dict) -> str:
    """The trained forms, as Markdown."""
    lines = [
        "| form | metric and codes | training | to 1% of the exact form | squared error | KL | active |",
        "|---" * 7 + "|",
    ]
    for run in results["first_vae"]:
        reached = run["seconds_to_the_exact_error"]
        kappa = f", kappa = {run['latent_dim']}" if "latent_dim" in run else ""
        row = [f"{run['form']}{kappa}", f"{run['setup_seconds']:.1f} s", f"{run['seconds']:.1f} s",
               "never" if reached is None else f"{reached:.1f} s", f"{run['squared_error']:.2f}", f"{run['kl']:.1f}",
               f"{run['active_units']:.0f}"]  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoder", required=True, help="folder of a trained autoencoder")
    parser.add_argument("--dataset_name", default="celeba", help="data set that it was trained on")
    parser.add_argument("--train_data_dir", default=None, help="its folder")
    parser.add_argument("--validation_split", default="validation", help="split that errors are measured on")
    parser.add_argument("--features", default=None, help="feature extractor for distances (default: pixels)")
    parser.add_argument("--output_dir", type=Path, default=None, help="models (default: runs/bench/pullback-<size>)")
    parser.add_argument("--output", type=Path, default=None, help="JSON (default: results/bench_pullback_<size>.json)")
    parser.add_argument("--steps", type=int, default=4_000, help="of each first VAE")
    parser.add_argument("--watch_steps", type=int, default=50, help="steps between two measurements of the true error")
    parser.add_argument("--second_steps", type=int, default=4_000, help="of each second stage; 0: no samples")
    parser.add_argument("--num_images", type=int, default=1_000, help="images that are measured on")
    parser.add_argument("--max_grad_norm", type=float, default=20_000.0, help="clip of the forms in image units")
    parser.add_argument(
        "--latent_dims", type=int, nargs="*", default=[16], help="further kappas, where errors are large"
    )
    parser.add_argument("--codes", type=int, nargs="+", default=[4, 16, 64, 256], help="codes of a metric")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    autoencoder = load_frozen(VAEPlusAutoencoderModel, args.autoencoder)
    size = autoencoder.config.image_size
    args.output_dir = args.output_dir or Path(f"runs/bench/pullback-{size}")
    args.common = {
        "dataset_name": args.dataset_name, "train_data_dir": args.train_data_dir, "resolution": size,
        "num_channels": autoencoder.config.num_channels, "random_flip": True, "mixed_precision": "bf16",
    }  # fmt: skip
    options = stage_options("autoencoder", {"common": args.common})
    validation, training = open_images(options, args.validation_split), open_images(options)
    images = validation.pixels(0, args.num_images)
    with torch.no_grad():
        codes = torch.cat([autoencoder.encode(part) for part in images.split(250)])
        encode_dataset(training, autoencoder, autoencoder.encode)  # all forms start from cached codes
        of_training = to_unit_range(training.batch(range(1000))["pixel_values"])
        codes_of_training = torch.cat([autoencoder.encode(part) for part in of_training.split(250)])
        found = how_many_codes(autoencoder, codes_of_training, args.codes)
    metric = found.pop("metric")
    runs = [first_vae(form, args, images, codes, autoencoder) for form in FORMS]
    runs += [first_vae(form, args, images, codes, autoencoder, latent_dim=kappa)
             for kappa in args.latent_dims for form in FORMS]  # fmt: skip
    for run in runs:
        exact = next(
            each for each in runs if each["form"] == "image" and each.get("latent_dim") == run.get("latent_dim")
        )
        reached = time_to(run, 1.01 * exact["squared_error"])
        metric_seconds = run["setup_seconds"] - exact["setup_seconds"] if run["form"] == "pullback" else 0.0
        run["seconds_to_the_exact_error"] = None if reached is None else reached + max(0.0, metric_seconds)
    vae = VAEPlusVAEModel.from_pretrained(args.output_dir / "vae-image").eval()
    results = {
        **provenance(),
        "threads": args.threads,
        "resolution": size,
        "steps": args.steps,
        "num_images": len(images),
        "metric": found,
        "range": how_far_it_holds(autoencoder, metric, vae, images[:500], codes[:500], [0.1, 0.3, 1, 3, 10, 30]),
        "cross_term": {
            "training": cross_term(autoencoder, metric, of_training, codes_of_training),
            "validation": cross_term(autoencoder, metric, images, codes),
        },
        "first_vae": runs,
    }
    if args.second_steps:
        extractor = open_extractor(args.features) if args.features else Pixels(8)
        results["extractor"] = extractor.description()
        results["samples"] = {
            run["form"]: summary_of(judge(run["form"], args, validation, extractor), run, images[0].numel())
            for run in runs[: len(FORMS)]
        }
    output = args.output or Path(f"results/bench_pullback_{size}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results), f"saved in {output}", sep="\n\n")
    return results


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
