"""`vaeplus evaluate`."""

import dataclasses
import json
from pathlib import Path

from .flags import (
    add_data,
    add_overwrite,
    add_pipeline,
    data_options,
    load_pipeline,
    local_path,
    output_file,
    write_output,
)


def add_evaluate(commands):
    parser = commands.add_parser(
        "evaluate",
        help="measure a saved pipeline on a data set",
        description="Measure reconstructions and samples of a pipeline: distances to real images, neighbours,\n"
        "copies of training images, bins (NDB), errors, posteriors and likelihoods. Prints a table, with warnings,\n"
        "and writes all of it, with the protocol, as JSON.\n"
        "Images are read at the size that the pipeline was trained on. On several processes:\n"
        "accelerate launch -m hf_vaeplus.cli evaluate ...",
        epilog="examples:\n"
        "  vaeplus evaluate vaeplus-quickstart/pipeline --dataset_name rendered-faces --num_images 2000\n"
        "  vaeplus evaluate runs/pictures/pipeline --train_data_dir unseen --training_data_dir pictures\n"
        "  vaeplus evaluate runs/celeba64/pipeline --train_data_dir celeba --split 'train[20000:]'"
        " --training_split 'train[:20000]' --ndb 100 200 300 --sampler second_stage prior mixture --features net.onnx",
    )
    add_pipeline(parser, "results.json")
    parser.set_defaults(output="results.json")
    add_data(parser, "measure on")
    parser.add_argument(
        "--num_images", type=int, default=10_000, help="images of every set, real ones too (default: 10000)"
    )
    parser.add_argument(
        "--features",
        nargs="+",
        default=["pixels:16"],
        metavar="SPEC",
        help="what distances are measured on: pixels, pixels:SIZE, FILE.onnx, fid:WEIGHTS (default: pixels:16)",
    )
    parser.add_argument(
        "--sampler",
        nargs="+",
        default=[],
        help="second_stage: the whole pipeline; mean: without its detail; sharpened: means at sharpness 1; prior:"
        " without its second stage; mixture,"
        " gaussian: 10 Gaussians or 1 fitted to the codes of training images (default: the pipeline as it is)",
    )
    parser.add_argument("--ndb", nargs="+", type=int, default=[], metavar="K", help="numbers of bins: 100 200 300")
    parser.add_argument(
        "--training_split",
        "--ndb_split",
        default=None,
        help="the images that the model was trained on: the guard looks for copies of them, bins and Gaussians are"
        " fitted to them (default: no guard, and train for the others)",
    )
    parser.add_argument(
        "--training_data_dir",
        type=local_path,
        default=None,
        help="their folder, if it is not that of the images to measure on",
    )
    parser.add_argument(
        "--num_training_images", "--ndb_images", type=int, default=20_000, help="only so many of them (default: 20000)"
    )
    parser.add_argument(
        "--num_importance_samples", type=int, default=0, help="per image, for likelihoods (default: 0, none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise (default: 0)")
    add_overwrite(parser)
    parser.set_defaults(run=_evaluate)


def _evaluate(args):
    from ..data.catalogue import NAMED_DATA_SETS
    from ..evaluation.evaluate import evaluate
    from ..evaluation.features import open_extractor
    from ..evaluation.tables import results_table
    from ..provenance import provenance, redacted
    from ..training.launch import process_state
    from ..training.stages import open_images

    output = Path(args.output)
    if output.is_dir():
        raise IsADirectoryError(f"--output must name a file such as results.json, got the folder {output}.")
    output_file(args)
    args.device = args.device or str(process_state().device)  # of this process, where there are several
    pipe = load_pipeline(args)
    pipe.need_vae("posteriors to measure")
    try:
        extractors = [open_extractor(spec, args.device) for spec in args.features]
    except ImportError as error:  # of a package that is not needed otherwise
        raise ValueError(str(error)) from error
    options = data_options(args, pipe)
    training_images = None
    if args.training_split or args.training_data_dir or args.ndb or {"mixture", "gaussian"} & set(args.sampler):
        source = {"split": args.training_split or "train"}
        if args.training_data_dir:
            name = options.dataset_name if options.dataset_name in NAMED_DATA_SETS else None  # says how to crop
            source |= dict(train_data_dir=args.training_data_dir, train_data_files=None, dataset_name=name)
        training_images = open_images(dataclasses.replace(options, **source))
    results = evaluate(
        pipe,
        open_images(options),
        extractors,
        args.sampler,
        num_images=args.num_images,
        training_images=training_images,
        num_training_images=args.num_training_images,
        num_bins=args.ndb,
        num_importance_samples=args.num_importance_samples,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    if not process_state().is_main_process:
        return None
    results["images_are"] = _seen_in_training(args.pipeline, results["protocol"]["fingerprint"])
    found = {**provenance(), "pipeline": args.pipeline, **results}
    text = redacted(json.dumps(found, indent=2)) + "\n"
    write_output(output, lambda partial: partial.write_text(text, encoding="utf-8"))
    print(f"\n{results_table(results)}\n\nsaved in {output}")
    return found


def _seen_in_training(pipeline: str, fingerprint: str) -> str | None:
    """Whether the images are training images, as the run says that a pipeline lies in; `None` if it does not."""
    from ..training.options import read_record

    run_dir = Path(pipeline).parent
    if read_record(run_dir / "second_stage").get("made_from", {}).get("images") == fingerprint:
        return "seen"
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        return summary["images_are"] if summary["fingerprint"] == fingerprint else None
    except (KeyError, OSError, RecursionError, TypeError, ValueError):
        return None
