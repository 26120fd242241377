"""Generators that win a distance without having learnt anything: does the evaluation find them out?

    python benchmarks/gaming.py --pipeline model_cards/vaeplus-celeba128 --celeba celeba128 --mnist mnist \\
        --features inception_v3_mixed6c.onnx

Every run splits real images anew into training images, a reference, other real images, and fresh ones. Each generator
knows the training images alone, or is made of fresh real images:

    held-out            fresh real images: nothing may be flagged
    copies              training images, drawn with replacement
    bootstrap, h        copies with noise, h times the covariance's root, shrunk to the training images' moments
    dropped modes       fresh real images without those of 3 of the 10 clusters of the training images
    matched moments     Gaussian noise with the mean and the covariance of the training images

They are rows of numbers in the space in which they are compared. "decoded" rows of codes, 200 a run, go through the
images: they are decoded, rounded to 8 bits and encoded again, as `vaeplus evaluate` sees them. A run is flagged when
`hf_vaeplus.evaluation.comparison.warnings_of` says a sentence, "copies" counts the runs in which it is that of copies.
"""

from pathlib import Path

import torch
from common import benchmark, goal
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.pixels import to_uint8, to_unit_range
from hf_vaeplus.evaluation.comparison import FeatureComparison, warnings_of
from hf_vaeplus.evaluation.features import open_extractor
from hf_vaeplus.metrics.prdc import NAMES
from hf_vaeplus.metrics.running import RunningMoments
from hf_vaeplus.progress import tqdm

BATCH, CLUSTERS, DROPPED = 50, 10, 3
WIDTHS = (0.1, 0.3, 0.5, 0.9)
NUM_DECODED = 200
HONEST = "held-out"


def rows_of(images, embed, count: int, name: str, keep: str | None) -> torch.Tensor:
    """What `embed` makes of the first images: of `keep` if it is there, which is made once."""
    count = min(count, len(images))
    path = keep and Path(keep) / f"{name.replace(' ', '-')}-{images.fingerprint}.safetensors"
    if path and path.exists():
        return load_file(path)["rows"][:count]
    starts = tqdm(range(0, count, BATCH), desc=name)
    parts = (images.batch(range(start, min(start + BATCH, count))) for start in starts)
    rows = torch.cat([embed(part["pixel_values"]) for part in parts])
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"rows": rows}, path)
    return rows


def generators(training: torch.Tensor, fresh: torch.Tensor, count: int, seed: int) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    moments = RunningMoments(training.shape[1])
    moments.update(training)
    values, vectors = torch.linalg.eigh(moments.covariance)
    root = vectors * values.clamp(min=0).sqrt()

    def noise():
        return torch.randn(count, len(root), generator=source, dtype=torch.float64) @ root.T

    copies = training[torch.randint(len(training), (count,), generator=source)].double()
    found = {HONEST: fresh[:count], "copies": copies}
    for width in WIDTHS:
        smoothed = (copies - moments.mean + width * noise()) / (1 + width**2) ** 0.5
        found[f"bootstrap, {width}"] = moments.mean + smoothed
    clusters = KMeans(CLUSTERS, n_init=1, random_state=seed).fit(training.float().numpy())
    kept = fresh[torch.from_numpy(clusters.predict(fresh.float().numpy())) < CLUSTERS - DROPPED]
    return found | {"dropped modes": kept[:count], "matched moments": moments.mean + noise()}


def measure_space(name: str, rows: torch.Tensor, count: int, runs: int, again=None) -> list[dict]:
    """Rows of the table of one space: means over the runs, and in how many a generator was flagged."""
    numbers, told = {}, {}
    for seed in tqdm(range(runs), desc=name):
        order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        reference, real, fresh, training = order.split([count, count, 2 * count, len(order) - 4 * count])
        comparison = FeatureComparison(reference, training)
        other, limit = comparison(real), comparison.sliced_limit(real)
        sets = generators(training, fresh, count, seed)
        if again is not None:
            for each in (HONEST, "bootstrap, 0.3"):
                sets[f"{each}, decoded"] = again(sets[each][:NUM_DECODED].float())
        for each, samples in {"other real images": real, **sets}.items():
            found = comparison(samples)
            flat = {key: found[key] for key in ("frechet", "sliced_wasserstein")}
            flat |= {key: found["prdc"][key] for key in NAMES} | {"memorised": found["memorised"]["share"]}
            numbers.setdefault(each, []).append(flat)
            # decoded sets differ from real images that are not decoded: only the warning of copies counts
            decoded = each.endswith("decoded")
            warnings = warnings_of(found, None if decoded else other, limit)
            told.setdefault(each, []).append((bool(warnings), found["memorised"]["flagged"]))
    found = []
    for each, runs_of in numbers.items():
        means = {key: sum(one[key] for one in runs_of) / runs for key in runs_of[0]}
        flagged, copies = (sum(each) for each in zip(*told[each], strict=True))
        if each == "other real images":  # what the others are compared with
            flagged = None
        found.append({"generator": each, "space": name, **means, "flagged": flagged, "copies": copies, "runs": runs})
    return found


def measure(args) -> dict:
    runs, tables, protocol = args.runs or args.pick(2, 5, 20), [], []

    def space(name, images, embed, total, count, again=None):
        rows = rows_of(images, embed, total, name, args.keep)
        told = {"space": name, "images": images.name, "split": images.split, "in_every_set": count}
        protocol.append({**told, "training_images": len(rows) - 4 * count, "dim": rows.shape[1], "runs": runs})
        tables.append(measure_space(name, rows, count, runs, again))

    if not (args.celeba or args.mnist):
        digits = load_images("digits", resolution=16, num_channels=1, progress=False)
        space("digits, pixels:8", digits, open_extractor("pixels:8"), 1_797, 200)
    if args.mnist:
        mnist = load_images("mnist", train_data_dir=args.mnist, resolution=28)
        space("MNIST, pixels:14", mnist, open_extractor("pixels:14"), args.pick(1_000, 6_000, 9_000), 1_000)
    if args.celeba:
        pipe = VAEPlusPipeline.from_pretrained(args.pipeline)
        size, crop = pipe.image_shape[1], pipe.image_processor.crop
        celeba = load_images("celeba", train_data_dir=args.celeba, resolution=size, crop=crop)
        total = args.pick(1_000, 6_000, 9_000)

        @torch.no_grad()
        def code(batch):
            return pipe.autoencoder.encode(to_unit_range(batch)).float()

        @torch.no_grad()
        def again(codes):
            return torch.cat([code(to_uint8(pipe.autoencoder.decode(part))) for part in codes.split(BATCH)])

        space("CelebA, codes", celeba, code, total, 1_000, again)
        if args.features:
            extractor = open_extractor(args.features)
            space(f"CelebA, {extractor.name}", celeba, extractor, total, 1_000)
    goals = []
    for table in tables:
        name = table[0]["space"]
        flagged = {row["generator"]: row["flagged"] for row in table}
        goals.append(goal(f"{name}: runs in which held-out images are flagged", flagged[HONEST], "<= 0"))
        for each in ("bootstrap, 0.1", "bootstrap, 0.3", "dropped modes", "matched moments"):
            goals.append(goal(f"{name}: runs in which {each} is flagged", flagged[each], f">= {runs}"))
    return {"protocol": protocol, "generators": [row for table in tables for row in table], "goals": goals}


def options(parser):
    parser.add_argument("--celeba", help="folder of CelebA; without data sets the embedded digits are used")
    parser.add_argument("--mnist", help="folder of MNIST's files")
    parser.add_argument("--pipeline", default="model_cards/vaeplus-celeba128", help="of CelebA: its codes are a space")
    parser.add_argument("--features", help="extractor for CelebA, a second space; see vaeplus evaluate")
    parser.add_argument("--keep", help="folder for codes and features, which another run then finds there")
    parser.add_argument("--runs", type=int, default=None, help="splits of the images; default 20")


if __name__ == "__main__":
    raise SystemExit(benchmark("gaming", __doc__, measure, options))
