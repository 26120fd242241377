"""How near images come to real ones as `sharpness` of the mean, or the temperature of a detail model, grows.

    python benchmarks/sharpness.py PIPELINE --train_data_dir FOLDER --features EXTRACTOR.onnx

Samples and reconstructions have the same codes in every row, and every set has `--num_images` images. Distances are
over that of Downsample, by each extractor; kernel distances, precision and coverage stand beside them. Writes
results/bench_sharpness.json.
"""

import argparse
from pathlib import Path

from common import Unseen

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.files import write_json
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
    unseen, rows = Unseen(pipe, args), []
    settings = [{"sharpness": each, "deterministic": True} for each in args.sharpness]
    settings += [{"detail_temperature": each, "deterministic": False} for each in args.detail_temperature]
    for setting in settings:
        rows.append(unseen.compare(pipe, **setting))
        print(rows[-1], flush=True)
    write_json(Path(args.output), {**made, **unseen.told, "split": args.split, "rows": rows})


if __name__ == "__main__":
    main()
