"""`vaeplus demo`."""

import socket
from pathlib import Path

from .flags import add_data, add_json, data_options, given_options, load_pipeline, local_path, weights_path


def add_demo(commands):
    parser = commands.add_parser(
        "demo",
        help="try a pipeline in a browser",
        description="Serve a page that samples, reconstructs, interpolates and explores latent directions, until it\n"
        "is interrupted. With a data set, such as --train_data_dir FOLDER, visitors also see its pictures that are\n"
        "nearest to a picture. Needs Gradio: pip install 'hf-vaeplus[demo]'.",
        epilog="examples:\n"
        "  vaeplus demo\n  vaeplus demo vaeplus-quickstart/pipeline\n"
        "  vaeplus demo your-name/vaeplus-drawings --host 0.0.0.0 --port 8000",
    )
    parser.add_argument(
        "pipeline",
        type=weights_path,
        nargs="?",
        default=None,
        help="folder of a saved pipeline, or its id on the Hub (default: a model of model_cards/, in a clone)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: this machine alone, 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=None, help="(default: the first free one from 7860)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--directions",
        type=local_path,
        default=None,
        help="file of named directions, each a slider (default: directions.safetensors beside the pipeline)",
    )
    add_data(parser, "show the nearest pictures of")
    add_json(parser)
    parser.set_defaults(run=_demo, interrupted="the page is closed")


def _model_of_the_zoo() -> str:
    """The trained faces of `model_cards/`, or the first other model there."""
    found = sorted(path.parent for path in Path("model_cards").glob("*/model_index.json"))
    if not found:
        raise ValueError(
            "no pipeline is named and ./model_cards holds none: name a folder or an id on the Hub, train one with"
            " `vaeplus quickstart`, or run this in a clone of the project, whose model_cards/ holds trained models."
        )
    faces = Path("model_cards/vaeplus-celeba128")
    return str(faces if faces in found else found[0])


def _demo(args):
    args.pipeline = args.pipeline or _model_of_the_zoo()
    try:
        from ..demo import build_demo, serve
    except ImportError as error:
        raise ValueError(str(error)) from error
    try:
        socket.create_server((args.host, args.port or 0)).close()
    except (OSError, OverflowError) as error:
        address = f"{args.host}:{args.port or ''}"
        raise ValueError(f"cannot serve at {address} ({error}): choose another --host or --port.") from error
    pipe = load_pipeline(args)
    directions = None
    if args.directions:
        from ..directions import load_directions

        directions = load_directions(pipe, args.directions)
    known = None
    if {"train_data_dir", "train_data_files", "dataset_name"} & given_options(args).keys():
        from ..training.stages import open_images

        known = open_images(data_options(args, pipe))
    serve(
        build_demo(pipe, directions, known=known),
        server_name=args.host,
        server_port=args.port,
        ready=lambda address: args.print_json({"url": address}),
    )
