"""`vaeplus demo`."""

import socket

from .flags import add_json, load_pipeline


def add_demo(commands):
    parser = commands.add_parser(
        "demo",
        help="try a pipeline in a browser",
        description="Serve a page that samples, reconstructs, interpolates and explores latent directions, until it\n"
        "is interrupted. Needs Gradio: pip install 'hf-vaeplus[demo]'.",
        epilog="examples:\n"
        "  vaeplus demo vaeplus-quickstart/pipeline\n"
        "  vaeplus demo your-name/vaeplus-drawings --host 0.0.0.0 --port 8000",
    )
    parser.add_argument("pipeline", help="folder of a saved pipeline, or its id on the Hub")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: this machine alone, 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=None, help="(default: the first free one from 7860)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    add_json(parser)
    parser.set_defaults(run=_demo, interrupted="the page is closed")


def _demo(args):
    try:
        from ..demo import build_demo, serve
    except ImportError as error:
        raise ValueError(str(error)) from error
    try:
        socket.create_server((args.host, args.port or 0)).close()
    except (OSError, OverflowError) as error:
        address = f"{args.host}:{args.port or ''}"
        raise ValueError(f"cannot serve at {address} ({error}): choose another --host or --port.") from error
    serve(
        build_demo(load_pipeline(args)),
        server_name=args.host,
        server_port=args.port,
        ready=lambda address: args.print_json({"url": address}),
    )
