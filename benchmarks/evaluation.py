"""Evaluation: what distances, neighbours, bins and MMD cost beside the extraction of features.

    python benchmarks/evaluation.py --features inception_v3_mixed6c.onnx

Two sets of images are compared as `vaeplus evaluate` compares them; features of the sets are drawn from a Gaussian of
the extractor's width, so that our part is measured alone. With `--features` the time of the extractor is measured on
some images and scaled to all. Bins of NDB are fitted once per data set and kept: that has its own row.
"""

import torch
from common import benchmark, goal, in_turn, seconds_of

from hf_vaeplus.evaluation.features import open_extractor
from hf_vaeplus.metrics.frechet import frechet_distance
from hf_vaeplus.metrics.kernel import kernel_distance
from hf_vaeplus.metrics.memorisation import MemorisationGuard
from hf_vaeplus.metrics.mmd import imq_mmd
from hf_vaeplus.metrics.ndb import NDB
from hf_vaeplus.metrics.prdc import PRDC
from hf_vaeplus.metrics.running import RunningMoments
from hf_vaeplus.metrics.sliced import sliced_wasserstein

BATCH, LATENT_DIM = 64, 64
NAMED = "Frechet, NDB and MMD"  # what the goal is about


def moments_of(features: torch.Tensor) -> RunningMoments:
    moments = RunningMoments(features.shape[1])
    moments.update(features)
    return moments


def measure_size(size: int, extractor, args) -> list[dict]:
    """Seconds of every part at one size of images, and their shares of the extraction."""
    count = args.pick(1_000, 10_000, 10_000)
    bins, some = args.pick(4, 100, 100), args.pick(64, 128, 1_024)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    dim = extractor(images[:2]).shape[1] if extractor else args.dim
    features = [torch.randn(count, dim, generator=generator) for _ in range(2)]
    latents = [torch.randn(count, LATENT_DIM, generator=generator) for _ in range(2)]
    ndb = NDB.fit(images[:1_000], bins, n_init=1, max_iter=2)  # how good they are takes no time
    moments = [moments_of(each) for each in features]
    balls = PRDC(features[0])
    guard = MemorisationGuard(torch.randn(2 * count, dim, generator=generator), features[0])
    parts = {
        "mean and covariance": lambda: moments_of(features[0]),
        "Frechet distance": lambda: frechet_distance(*moments),
        f"NDB, {bins} bins": lambda: [ndb.assign(batch) for batch in images.split(BATCH)],
        "MMD of q(z) and N(0, I)": lambda: imq_mmd(*latents),
        "kernel distance": lambda: kernel_distance(*features),
        "precision, recall, density, coverage": lambda: balls.compare(features[1]),
        "sliced distance": lambda: sliced_wasserstein(*features),
        f"copies of {2 * count:,} training images": lambda: guard.compare(features[1]),
    }
    timed = {name: seconds_of(part) for name, part in parts.items()}
    if extractor is not None:
        timed["features"] = seconds_of(lambda: [extractor(batch) for batch in images[:some].split(BATCH)])
    seconds = in_turn(timed, args, f"evaluation, {size}")
    found = {name: seconds[name] for name in parts}
    found[NAMED] = sum(seconds[name] for name in list(parts)[:4])
    extraction = seconds["features"] * count / some if extractor is not None else None
    if extraction:
        found[f"features of {count:,} images, from {some}"] = extraction
    if args.fit_bins or args.pick(False, False, True):
        fitting = seconds_of(lambda: NDB.fit(images, bins), calls=1)
        found[f"fitting {bins} bins, once per data set"] = fitting()
    share = {name: each / extraction if extraction else None for name, each in found.items()}
    return [{"part": name, "image_size": size, "seconds": found[name], "of_extraction": share[name]} for name in found]


def measure(args) -> dict:
    extractor = open_extractor(args.features) if args.features else None
    sizes = args.sizes or args.pick([64], [64], [64, 128])
    rows = [row for size in sizes for row in measure_size(size, extractor, args)]
    named = {row["image_size"]: row["of_extraction"] for row in rows if row["part"] == NAMED}
    return {
        "extractor": extractor.description() if extractor else None,
        "evaluation": rows,
        "goals": [goal(f"{NAMED} over extraction, {size} pixels", share, "<= 0.05") for size, share in named.items()],
    }


def options(parser):
    parser.add_argument("--features", help="extractor: an .onnx file, fid:WEIGHTS, pixels; see vaeplus evaluate")
    parser.add_argument("--sizes", type=int, nargs="+", help="heights and widths of images; default 64 and 128")
    parser.add_argument("--dim", type=int, default=768, help="width of the features, without an extractor")
    parser.add_argument("--fit_bins", action="store_true", help="time the fit of the bins in a quick run as well")


if __name__ == "__main__":
    raise SystemExit(benchmark("evaluation", __doc__, measure, options))
