"""Evaluation: what distances, bins and MMD cost beside the extraction of features.

    python benchmarks/evaluation.py --features inception_v3_mixed6c.onnx

Two sets of images are compared as `vaeplus evaluate` compares them; features of the sets are drawn from a Gaussian of
the extractor's width, so that our part is measured alone. With `--features` the time of the extractor is measured on
some images and scaled to all. Bins of NDB are fitted once per data set and kept: that has its own row.
"""

import torch
from common import benchmark, goal, in_turn, seconds_of

from hf_vaeplus.features import open_extractor
from hf_vaeplus.metrics.frechet import frechet_distance
from hf_vaeplus.metrics.kernel import kernel_distance
from hf_vaeplus.metrics.mmd import imq_mmd
from hf_vaeplus.metrics.ndb import NDB
from hf_vaeplus.metrics.running import RunningMoments

BATCH, LATENT_DIM = 64, 64


def moments_of(features: torch.Tensor) -> RunningMoments:
    moments = RunningMoments(features.shape[1])
    moments.update(features)
    return moments


def measure(args) -> dict:
    count, size = args.pick(1_000, 10_000, 10_000), args.size
    bins, some = args.pick(4, 100, 100), args.pick(64, 128, 1_024)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    dim, extractor = args.dim, None
    if args.features:
        extractor = open_extractor(args.features)
        dim = extractor(images[:2]).shape[1]
    features = [torch.randn(count, dim, generator=generator) for _ in range(2)]
    latents = [torch.randn(count, LATENT_DIM, generator=generator) for _ in range(2)]
    ndb = NDB.fit(images[:1_000], bins, n_init=1, max_iter=2)  # how good they are takes no time
    moments = [moments_of(each) for each in features]
    parts = {
        "mean and covariance": lambda: moments_of(features[0]),
        "Frechet distance": lambda: frechet_distance(*moments),
        "kernel distance": lambda: kernel_distance(*features),
        f"NDB, {bins} bins": lambda: [ndb.assign(batch) for batch in images.split(BATCH)],
        "MMD of q(z) and N(0, I)": lambda: imq_mmd(*latents),
    }
    timed = {name: seconds_of(part) for name, part in parts.items()}
    if extractor is not None:
        timed["features"] = seconds_of(lambda: [extractor(batch) for batch in images[:some].split(BATCH)])
    seconds = in_turn(timed, args, "evaluation")
    extraction = seconds["features"] * count / some if extractor is not None else None
    rows = [
        {
            "part": name,
            "seconds": seconds[name],
            "of_extraction": seconds[name] / extraction if extraction else None,
        }
        for name in parts
    ]
    named = [row["seconds"] for row in rows if row["part"] != "kernel distance"]  # Frechet, NDB and MMD
    sums = {"Frechet, NDB and MMD": sum(named), "all": sum(row["seconds"] for row in rows)}
    for part, ours in sums.items():
        rows.append({"part": part, "seconds": ours, "of_extraction": ours / extraction if extraction else None})
    if extraction:
        rows.append(
            {"part": f"features of {count:,} images, from {some}", "seconds": extraction, "of_extraction": 1.0}
        )
    if args.fit_bins or args.pick(False, False, True):
        fitting = seconds_of(lambda: NDB.fit(images, bins), calls=1)
        rows.append({"part": f"fitting {bins} bins, once per data set", "seconds": fitting()})
    return {
        "images": count,
        "image_size": size,
        "feature_dim": dim,
        "extractor": extractor.description() if extractor else None,
        "evaluation": rows,
        "goals": [
            goal("Frechet, NDB and MMD over extraction", sum(named) / extraction if extraction else None, "<= 0.05")
        ],
    }


def options(parser):
    parser.add_argument("--features", help="extractor: an .onnx file, fid:WEIGHTS, pixels; see vaeplus evaluate")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--dim", type=int, default=768, help="width of the features, without an extractor")
    parser.add_argument("--fit_bins", action="store_true", help="time the fit of the bins in a quick run as well")


if __name__ == "__main__":
    raise SystemExit(benchmark("evaluation", __doc__, measure, options))
