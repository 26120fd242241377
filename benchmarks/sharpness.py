"""How near images come to real ones as `sharpness` of the mean, or the temperature of a detail model, grows.

    python benchmarks/sharpness.py PIPELINE --train_data_dir FOLDER --features EXTRACTOR.onnx

Samples and reconstructions have the same codes in every row, and every set has `--num_images` images. Distances are
over that of Downsample, by each extractor; kernel distances, precision and coverage stand beside them. Writes
results/bench_sharpness.json.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
from common import OverDownsample

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.pixels import to_uint8
from hf_vaeplus.evaluation.evaluate import sample_images
from hf_vaeplus.files import write_json
from hf_vaeplus.progress import tqdm
from hf_vaeplus.provenance import provenance


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder of a saved pipeline")
    parser.add_argument("--train_data_dir", required=True, help="folder of parquet files named by split")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--features", required=True, nargs="+", help="as in `vaeplus evaluate`")
    parser.add_argument("--sharpness", type=float, nargs="*", default=[0, 0.5, 0.75, 1, 1.25, 1.5])
    parser.add_argument("--detail_temperature", type=float, nargs="*", default=[], help="of a detail model")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/bench_sharpness.json")
    args = parser.parse_args()

    made, pipe = provenance(), VAEPlusPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    images = load_images(
        train_data_dir=args.train_data_dir,
        split=args.split,
        resolution=pipe.image_shape[1],
        crop=pipe.image_processor.crop,
    )
    parts = torch.arange(min(args.num_images, len(images))).split(50)
    real = [batch["pixel_values"] for batch in islice(images.in_order(50), len(parts))]
    judged = OverDownsample(args.features, real)

    def reconstructions(**wanted):
        for number, batch in enumerate(real):
            generator = torch.Generator().manual_seed(args.seed * 1000 + number)
            yield to_uint8(pipe.reconstruct(batch, "pt", generator=generator, **wanted))

    settings = [{"sharpness": each, "deterministic": True} for each in args.sharpness]
    settings += [{"detail_temperature": each, "deterministic": False} for each in args.detail_temperature]
    rows = []
    for setting in settings:
        bar = tqdm(parts, desc=", ".join(f"{name} {value:g}" for name, value in setting.items()))
        sets = {
            "samples": sample_images(pipe, bar, args.seed, **setting),
            "reconstructions": reconstructions(**setting),
        }
        row = dict(setting)
        for kind, batches in sets.items():
            compared = judged.compare(batches)
            row[kind] = {name: each["over_downsample"] for name, each in compared.items()}
            row[f"{kind}_kernel"] = {name: each["kernel"] and each["kernel"][0] for name, each in compared.items()}
            row[f"{kind}_prdc"] = {name: each["prdc"] for name, each in compared.items()}
        rows.append(row)
        print(row, flush=True)
    found = {"num_images": sum(map(len, parts)), "seed": args.seed, "split": args.split, "downsample": judged.units}
    write_json(Path(args.output), {**made, **found, "rows": rows})


if __name__ == "__main__":
    main()
