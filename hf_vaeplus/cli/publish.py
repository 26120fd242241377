"""`vaeplus card`, `push` and `encode`: what goes to the Hub."""

import json
from pathlib import Path

from .flags import (
    add_data,
    add_json,
    add_label_column,
    add_pipeline,
    data_options,
    load_pipeline,
    local_path,
    weights_path,
    writable,
    written,
    written_record,
)


def add_card(commands):
    parser = commands.add_parser(
        "card",
        help="write the model card of a run",
        description="Write the README.md of a Hub repository, with its pictures, from what `vaeplus train` left:\n"
        "how to use the model, what it learnt from, options, measured figures, samples, curves, limits.",
        epilog="examples:\n"
        "  vaeplus card vaeplus-quickstart your-name/vaeplus-drawings\n"
        "  vaeplus card runs/cats your-name/vaeplus-cats --evaluation results.json"
        " --data_license 'CC BY 4.0, photographs by the author'",
    )
    parser.add_argument("run_dir", type=weights_path, metavar="RUN", help="--output_dir of a finished `vaeplus train`")
    parser.add_argument("model_id", metavar="REPO_ID", help="repository that the card is for: organisation/name")
    parser.add_argument(
        "--evaluation", type=local_path, default=None, help="results.json of `vaeplus evaluate` for this pipeline"
    )
    parser.add_argument("--data_license", default=None, help="licence of the training images, where it is not known")
    parser.add_argument("--license", default="other", help="licence of the weights, by the Hub's ids (default: other)")
    parser.add_argument(
        "--output", type=local_path, default=None, help="folder of the card (default: the run's pipeline folder)"
    )
    add_json(parser)
    parser.set_defaults(run=_card, interrupted="the same command writes the whole card again")


def _card(args):
    from ..hub.cards import PICTURES, write_card

    evaluation = None
    if args.evaluation:
        evaluation = _read_results(Path(args.evaluation))
    output = Path(args.run_dir, "pipeline") if args.output is None else Path(args.output)
    replaced = [name for name in ("README.md", *PICTURES) if (output / name).exists()]
    wanted = dict(evaluation=evaluation, data_license=args.data_license, license=args.license)
    card = write_card(Path(args.run_dir), args.model_id, output, **wanted)
    print(f"saved {card} and its pictures" + (f", replacing {', '.join(replaced)}" if replaced else ""))
    return {"files": [str(card), *(str(card.with_name(name)) for name in PICTURES)], "repository": args.model_id}


def _read_results(path: Path) -> dict:
    from ..evaluation.tables import results_table

    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"--evaluation {path} is no JSON ({error}): give evaluate's output.") from error
    if not isinstance(results, dict) or "protocol" not in results:
        raise ValueError(f"--evaluation {path} holds no protocol: give evaluate's output.")
    try:
        results_table(results)
        [results[name] for name in ("command", "commit", "date")]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--evaluation {path} is not complete ({error!r}): give evaluate's output.") from error
    return results


def add_push(commands):
    parser = commands.add_parser(
        "push",
        help="upload a pipeline to the Hub",
        description="Upload a pipeline, with its card and pictures, in one commit. The repository also loads without\n"
        "this package, by trust in the code that it carries. Log in with `hf auth login`, or set HF_TOKEN.\n"
        "After a failure the same command goes on where it stopped.",
        epilog="examples:\n"
        "  vaeplus push runs/cats/pipeline your-name/vaeplus-cats --private\n"
        "  vaeplus push runs/cats/pipeline your-name/vaeplus-cats --revision longer --tag v2\n"
        "  vaeplus push runs/cats/pipeline your-name/vaeplus-cats --variant bf16\n"
        "  vaeplus push model_cards/vaeplus-celeba128 org/vaeplus-celeba128",
    )
    parser.add_argument(
        "pipeline", type=weights_path, metavar="PIPELINE", help="folder of a saved pipeline, or its id on the Hub"
    )
    parser.add_argument("repo_id", metavar="REPO_ID", help="repository, created if need be: organisation/name")
    parser.add_argument("--private", action="store_true", help="if the repository is created, as a private one")
    parser.add_argument("--revision", default=None, help="branch, created if need be (default: main)")
    parser.add_argument("--tag", default=None, help="name for the new commit, such as v1")
    parser.add_argument(
        "--variant",
        choices=("bf16", "fp16"),
        default=None,
        help="add weights of half the size to those that are there",
    )
    parser.add_argument("--message", default=None, help="title of the commit")
    add_json(parser)
    parser.set_defaults(run=_push, device="cpu", interrupted="the same command goes on where it stopped")


def _push(args):
    import torch

    from ..hub.repository import is_repository, push_repository
    from ..provenance import redacted

    pipe = load_pipeline(args)  # a folder that is exported already must load as well
    names = dict(revision=args.revision, tag=args.tag, variant=args.variant)
    if is_repository(args.pipeline) and not args.variant:
        place = dict(revision=args.revision, tag=args.tag, private=args.private or None)
        commit = push_repository(args.pipeline, args.repo_id, commit_message=args.message, **place)
    else:
        if args.variant:
            pipe.to({"bf16": torch.bfloat16, "fp16": torch.float16}[args.variant])
        commit = pipe.push_to_hub(args.repo_id, args.message, private=args.private or None, **names)
    print(redacted(f"pushed: {commit}"))
    return {"repository": args.repo_id, **names, "url": commit}


def add_export(commands):
    parser = commands.add_parser(
        "export",
        help="write a pipeline into a folder as the Hub would have it",
        description="Write the repository that `vaeplus push` would upload into a new folder: card, pictures, code,\n"
        "configs and weights. The folder loads with and without this package, and `vaeplus push` uploads it as it is.",
        epilog="example:\n  vaeplus export runs/cats/pipeline vaeplus-cats --weights bf16",
    )
    parser.add_argument(
        "pipeline", type=weights_path, metavar="PIPELINE", help="folder of a saved pipeline, with its card"
    )
    parser.add_argument("folder", type=weights_path, metavar="FOLDER", help="new folder of the repository")
    parser.add_argument(
        "--weights",
        choices=("float32", "bf16"),
        default="float32",
        help="how matrices are stored; bf16 halves the files (default: float32)",
    )
    add_json(parser)
    parser.set_defaults(run=_export, device="cpu")


def _export(args):
    from ..hub.repository import export_with_card

    files = export_with_card(load_pipeline(args), args.folder, args.weights)
    size = sum((Path(args.folder) / name).stat().st_size for name in files)
    print(f"saved {len(files)} files, {size / 1e6:.1f} MB, in {args.folder}")
    return {"files": [str(Path(args.folder) / name) for name in files], "pipeline": args.pipeline, "bytes": size}


def add_encode(commands):
    parser = commands.add_parser(
        "encode",
        help="turn a data set of images into a data set of latents",
        description="Encode every image of a data set: mean and log-variance of the first VAE's posterior, as\n"
        "parquet files that `datasets.load_dataset` reads, one row an image, in the order of the source. Names of\n"
        "files and labels go with it where the source has them: folders, MNIST's files, --label_column.\n"
        "Images are read at the size that the pipeline was trained on.",
        epilog="examples:\n"
        "  vaeplus encode vaeplus-quickstart/pipeline --dataset_name rendered-faces --max_images 2000\n"
        "  vaeplus encode runs/celeba64/pipeline --dataset_name celeba --streaming --output latents"
        " --push_to_hub your-name/celeba-latents --private",
    )
    add_pipeline(parser, "latents.parquet")
    parser.set_defaults(output="latents.parquet")
    add_data(parser, "encode")
    add_label_column(parser)
    parser.add_argument(
        "--streaming", action="store_true", help="decode on the way, without a cache: for huge sources"
    )
    parser.add_argument("--push_to_hub", metavar="REPO_ID", default=None, help="upload to this data set on the Hub")
    parser.add_argument("--private", action="store_true", help="make the data set on the Hub private")
    parser.set_defaults(run=_encode)


def _encode(args):
    from huggingface_hub.errors import HTTPError
    from pyarrow.parquet import read_metadata, read_schema

    from ..hub.latents import check_output, encode_to_parquet, latents_card, open_repository, push_latents
    from ..provenance import redacted
    from ..training.stages import open_images

    output = check_output(args.output)
    writable(output, output.parent)
    if args.private and not args.push_to_hub:
        raise ValueError("--private is of --push_to_hub, which is missing: name a repository, or leave it out.")
    pipe = load_pipeline(args)
    pipe.need_vae("posteriors to encode")
    options = data_options(args, pipe, streaming=args.streaming)
    images = open_images(options)
    if args.push_to_hub:
        open_repository(args.push_to_hub, args.private)
    files = encode_to_parquet(pipe, images, output, args.split, args.batch_size, label_column=args.label_column)
    columns = read_schema(files[0]).names
    num_images = sum(read_metadata(file).num_rows for file in files)
    about = pipe, args.pipeline, images, args.split, options.source_crop, num_images
    if output.is_dir():
        (output / "README.md").write_text(latents_card(*about, output.name, columns), encoding="utf-8")
    print(f"saved {num_images:,} posteriors in {output}")
    written.extend(files)
    found = written_record(args, files, "split", num_images=num_images, latent_dim=pipe.vae.config.latent_dim)
    if not args.push_to_hub:
        return found
    try:
        address = push_latents(files, latents_card(*about, args.push_to_hub, columns), args.push_to_hub, args.split)
    except (HTTPError, OSError) as error:
        raise OSError(f"{output} is complete, but pushing it to {args.push_to_hub} failed: {error}") from error
    print(redacted(f"pushed to {address}"))
    return {**found, "repository": args.push_to_hub, "url": address}
