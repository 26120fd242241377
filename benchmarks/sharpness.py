"""How near samples come to real images as `sharpness` grows: distances over that of Downsample.

    python benchmarks/sharpness.py PIPELINE --train_data_dir FOLDER --features EXTRACTOR.onnx

Every set has `--num_images` images; samples are the same ones at every sharpness. Writes results/bench_sharpness.json.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.evaluation.evaluate import Judge, downsample, sample_images
from hf_vaeplus.evaluation.features import open_extractor
from hf_vaeplus.files import write_json
from hf_vaeplus.progress import tqdm
from hf_vaeplus.provenance import provenance


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder of a saved pipeline whose autoencoder can sharpen")
    parser.add_argument("--train_data_dir", required=True, help="folder of parquet files named by split")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--features", required=True, help="as in `vaeplus evaluate`")
    parser.add_argument("--sharpness", type=float, nargs="+", default=[0, 0.5, 0.75, 1, 1.25, 1.5])
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="results/bench_sharpness.json")
    args = parser.parse_args()

    made, pipe = provenance(), VAEPlusPipeline.from_pretrained(args.pipeline)
    images = load_images(
        train_data_dir=args.train_data_dir,
        split=args.split,
        resolution=pipe.image_shape[1],
        crop=pipe.image_processor.crop,
    )
    parts = torch.arange(min(args.num_images, len(images))).split(50)
    real = [batch["pixel_values"] for batch in islice(images.in_order(50), len(parts))]
    judge = Judge(open_extractor(args.features), tqdm(real, desc="reference"))
    unit = judge(map(downsample, real))["frechet"]
    rows = []
    for sharpness in args.sharpness:
        drawn = sample_images(pipe, tqdm(parts, desc=f"sharpness {sharpness:g}"), args.seed, sharpness)
        rows.append({"sharpness": sharpness, "over_downsample": judge(drawn)["frechet"] / unit})
        print(rows[-1], flush=True)
    found = {
        "num_images": sum(map(len, parts)),
        "seed": args.seed,
        "split": args.split,
        "downsample": unit,
        "rows": rows,
    }
    write_json(Path(args.output), {**made, **found})


if __name__ == "__main__":
    main()
