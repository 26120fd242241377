"""The command line `vaeplus`: parses and wires, nothing else."""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import yaml

_EPILOG = """\
Begin with `vaeplus quickstart`; `vaeplus COMMAND --help` explains a command.

exit codes:
  0    done
  2    the command or its input was wrong: one sentence on standard error says what to do
  3    training diverged; the last good state is saved
  130  interrupted; 143 terminated (training saves its state first)

with --json, where a command has it, standard output is one line with one JSON object: what was done, with the files
written, or {"error": "the sentence"}. Everything for people goes to standard error.

examples:
  vaeplus quickstart
  vaeplus sample vaeplus-quickstart/pipeline --seed 1 --output samples.png --json
"""


class UsageError(ValueError):
    """What argparse refuses."""


class CommandParser(argparse.ArgumentParser):
    """Flags must be written out, and a mistake gives one sentence like any other, not the usage of sixty flags."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message):
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def main(argv: list[str] | None = None) -> int:
    """Entry point of `vaeplus`."""
    return run_command(lambda: _dispatch(argv), argv)


def run_command(command, argv: list[str] | None = None) -> int:
    """Run `command()`; a user's mistake becomes one sentence and an exit code instead of a traceback."""
    from huggingface_hub.errors import (
        HTTPError,  # of httpx, whichever it uses
        LocalTokenNotFoundError,
        StrictDataclassError,
    )
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    from .hub import explain, redact_record, redacted
    from .training import TrainingDiverged

    disable_progress_bar()  # one bar for the training, none for each file that is read or written
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in (None, "huggingface_hub", "transformers"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(redact_record)
    words = sys.argv if argv is None else argv
    if argv is None:  # this process is the command's
        sys.excepthook = lambda *error: print(redacted("".join(traceback.format_exception(*error))), file=sys.stderr)

    def complain(error, code: int) -> int:
        sentence = redacted(" ".join(str(error).split()))
        print(f"vaeplus: error: {sentence}", file=sys.stderr)
        if "--json" in words:
            print(json.dumps({"error": sentence}))
        return code

    try:
        command()
    except TrainingDiverged as error:
        return complain(error, 3)
    except UsageError as error:
        return complain(error, 2)
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, HTTPError, SafetensorError, StrictDataclassError) as error:
        if "--debug" in words:
            raise
        if isinstance(error, HTTPError | LocalTokenNotFoundError):
            error = explain(error)
        return complain(error, 2)
    except KeyboardInterrupt as error:
        return complain(
            f"{str(error) or 'interrupted'}; a training goes on from its newest checkpoint with the same command (of"
            " train_stage.py: and --resume_from_checkpoint latest), anything else begins anew",
            128 + getattr(error, "signal", 2),
        )
    return 0


def _dispatch(argv):
    from .hub import redacted

    args = build_parser().parse_args(argv)
    as_json = getattr(args, "json", False)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        found = args.run(args)
    if as_json and found is not None:  # of the main process, where there are several
        print(redacted(json.dumps(found)))


def build_parser() -> CommandParser:
    """The parser of `vaeplus`; what it parses has a `run` that takes the result and returns what `--json` prints."""
    parser = CommandParser(
        prog="vaeplus",
        description="VAE+: train a generative autoencoder in three stages, then sample from it in one pass.",
        epilog=_EPILOG,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_quickstart,
        _add_train,
        _add_evaluate,
        _add_sample,
        _add_reconstruct,
        _add_interpolate,
        _add_encode,
        _add_card,
        _add_push,
        _add_demo,
        _add_completion,
    ):
        add(commands)
    return parser


# ------------------------------------------------------------------------------------------- options of a stage


def add_stage_options(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()):
    """One flag for every field of [`StageOptions`]. Flags that are not given leave no attribute behind."""
    from .stages import StageOptions

    hints = get_type_hints(StageOptions)
    for entry in dataclasses.fields(StageOptions):
        if entry.name in leave_out:
            continue
        kinds = [kind for kind in get_args(hints[entry.name]) or (hints[entry.name],) if kind is not type(None)]
        flag = dict(default=argparse.SUPPRESS, help=entry.metadata["help"])
        if kinds[0] is bool:
            flag["action"] = argparse.BooleanOptionalAction
        elif kinds[0] is dict:
            flag.update(nargs="+", action="extend", metavar="FIELD=VALUE", type=_assignment)
        else:
            flag.update(type=kinds[0], choices=entry.metadata.get("choices"), metavar=kinds[0].__name__.upper())
            if flag["choices"]:
                flag["metavar"] = "|".join(flag["choices"])
            if entry.default not in (None, dataclasses.MISSING):
                flag["help"] += f" (default: {entry.default})"
        parser.add_argument(f"--{entry.name}", **flag)


def _assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, yaml.safe_load(value)
    except Exception as error:  # PyYAML lets through nearly anything that its constructors meet
        raise argparse.ArgumentTypeError(f"{text!r} has no readable value") from error


def _given(args: argparse.Namespace) -> dict:
    """The stage options that the command line gives, as keyword arguments."""
    from .stages import StageOptions

    names = {entry.name for entry in dataclasses.fields(StageOptions)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if "model" in given:
        given["model"] = dict(given["model"])
    return given


def parse_stage_options(description: str, argv: list[str] | None = None):
    """The options of `examples/train_stage.py`: flags over a preset over defaults. `None` after `--dry_run`."""
    from .stages import load_preset, stage_options

    parser = CommandParser(description=description)
    parser.add_argument("--config", metavar="PRESET", help="preset by name, or a YAML file, that the flags override")
    parser.add_argument("--dry_run", action="store_true", help="print the options as a preset for --config, then stop")
    add_stage_options(parser)
    args = parser.parse_args(argv)
    given = _given(args)
    if "stage" not in given:
        raise ValueError("--stage is missing: choose autoencoder, vae or second_stage.")
    options = stage_options(given.pop("stage"), load_preset(args.config) if args.config else None, **given)
    if args.dry_run:
        section = {n: value for n, value in dataclasses.asdict(options).items() if n not in ("stage", "hub_token")}
        print(yaml.safe_dump({options.stage: section}, sort_keys=False), end="")
        return None
    return options


# ------------------------------------------------------------------------------------------------------ training


def _add_quickstart(commands):
    parser = commands.add_parser(
        "quickstart",
        help="train all three stages on embedded drawings, in minutes",
        description="Train all three stages on drawings of faces made from r known factors, save the pipeline\n"
        "and draw what it does. Needs no network, no data and no GPU. Run it again to go on after an interruption.",
        epilog="examples:\n  vaeplus quickstart\n  vaeplus quickstart --num_factors 4 --output_dir runs/four",
    )
    parser.add_argument(
        "--output_dir", default="vaeplus-quickstart", help="where everything goes (default: %(default)s)"
    )
    parser.add_argument("--num_factors", type=int, default=8, help="r: factors the drawings vary in (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--cache_dir", default=None, help="where decoded images are kept (default: $VAEPLUS_CACHE)")
    parser.set_defaults(
        run=lambda args: _train(
            "quickstart",
            Path(args.output_dir),
            {"num_factors": args.num_factors, "seed": args.seed, "cache_dir": args.cache_dir},
        )
    )


def _add_train(commands):
    parser = commands.add_parser(
        "train",
        help="train all three stages from one preset and save the pipeline",
        description="Train autoencoder, first VAE and second stage one after the other, then save the pipeline.\n"
        "The same command again goes on where it stopped. Options given here hold for every stage; --set changes one.",
        epilog="examples:\n"
        "  vaeplus train --config celeba64-cpu --train_data_dir celeba --output_dir runs/celeba64\n"
        "  vaeplus train --config quickstart --set vae.max_train_steps=200 vae.model.latent_dim=8\n"
        "  accelerate launch -m hf_vaeplus.cli train --config celeba64-cpu --dataset_name celeba",
    )
    parser.add_argument("--config", required=True, metavar="PRESET", help="preset by name, or a YAML file")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        type=_assignment,
        metavar="STAGE.OPTION=VALUE",
        help="change an option of one stage; STAGE.model.FIELD=VALUE for the model's config",
    )
    parser.add_argument("--evaluation_split", default=None, help="split to measure on (default: the training images)")
    add_stage_options(
        parser,
        leave_out=("stage", "autoencoder", "vae", "model", "resume_from_checkpoint", "output_dir", "hub_subfolder"),
    )
    parser.add_argument("--output_dir", default="runs/vaeplus", help="where everything goes (default: %(default)s)")
    parser.set_defaults(
        run=lambda args: _train(
            args.config,
            Path(args.output_dir),
            {name: value for name, value in _given(args).items() if name != "output_dir"},
            args.set,
            args.evaluation_split,
        )
    )


def _train(preset_name: str, output_dir: Path, overrides: dict, settings=(), evaluation_split: str | None = None):
    from .checkpoints import sole_run
    from .stages import all_stage_options, load_preset, process_state

    preset = load_preset(preset_name)
    for name, value in settings:
        stage, _, option = name.partition(".")
        if not option:
            raise ValueError(f"--set takes STAGE.OPTION=VALUE, got {name}={value}.")
        target = preset.setdefault(stage, {})
        if option.startswith("model."):
            target, option = target.setdefault("model", {}), option.removeprefix("model.")
        target[option] = value
    options = all_stage_options(preset, output_dir, **overrides)
    _writable(output_dir, output_dir, "--output_dir")
    with sole_run(output_dir) if process_state().is_main_process else contextlib.nullcontext():
        _train_and_report(preset, options, output_dir, overrides, evaluation_split)


def _train_and_report(preset: dict, options: dict, output_dir: Path, overrides: dict, evaluation_split: str | None):
    from .evaluation import report
    from .stages import open_images, process_state, train_all

    started = time.perf_counter()
    last = dataclasses.replace(options["second_stage"], random_flip=False, streaming=False)
    if options["second_stage"].streaming:  # no cache was wanted: one of the images that `report` looks at
        last.max_train_samples = min(last.max_train_samples or 2_000, 2_000)
    images = open_images(last, evaluation_split)  # by all processes, and before hours of training
    if len(images) < 2:
        raise ValueError(f"{images.name} holds one image: the statistics of a posterior need at least two.")
    pipe, _ = train_all(preset, output_dir, **overrides)
    if not process_state().is_main_process:
        return
    num_factors = last.num_factors if last.dataset_name == "rendered-faces" else None
    folders = {stage: Path(each.output_dir) for stage, each in options.items()}
    summary = report(pipe, images, folders, output_dir, last.seed, num_factors)
    print(_table(summary, time.perf_counter() - started))
    print(
        f"\nsaved in {output_dir}: pipeline/ samples.png reconstructions.png interpolation.png curves.png summary.json"
    )
    print(f"sample again: vaeplus sample {output_dir / 'pipeline'} --num_images 64 --seed 1")
    if last.push_to_hub:
        _push_result(pipe, output_dir, last)


def _push_result(pipe, run_dir: Path, options):
    """The whole pipeline, beside the stages that training has pushed. The run is done: a failure is a warning."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    from .cards import DATA, write_card
    from .hub import explain, full_repo_id, push

    repo_id = options.hub_model_id
    by_hand = f"vaeplus push {run_dir / 'pipeline'} {repo_id}"
    try:
        repo_id = full_repo_id(repo_id, HfApi(token=options.hub_token))
        if options.dataset_name in DATA:
            write_card(run_dir, repo_id)
        else:
            print(f"a short card goes with it: vaeplus card {run_dir} {repo_id} --data_license ... writes a full one")
        push(
            pipe, repo_id, card_folder=run_dir / "pipeline", private=options.hub_private_repo, token=options.hub_token
        )
    except (HTTPError, OSError, ValueError) as error:
        logging.warning("push failed, try again with `%s`: %s", by_hand, explain(error))
    else:
        print(f"pushed to {repo_id}")


def _table(summary: dict, seconds: float) -> str:
    vae, second = summary["vae"], summary["second_stage"]
    known = f" (known factors: r = {summary['num_factors']})" if summary["num_factors"] else ""
    rows = [
        ("squared error per image, autoencoder alone", f"{summary['autoencoder_squared_error']:.2f}"),
        ("squared error per image, whole model", f"{summary['squared_error']:.2f}"),
        ("first VAE: active units", f"{vae['active_units_by_variance']} of {vae['latent_dim']}{known}"),
        ("first VAE: active units by Burda's count", f"{vae['active_units']}"),
        ("first VAE: KL, gamma", f"{vae['kl']:.2f} nats, {vae['gamma']:.3g}"),
        ("second stage: KL, gamma", f"{second['kl']:.2f} nats, {second['gamma']:.3g}"),
        ("wall time", f"{seconds:.0f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"{name:<{width}}  {value}" for name, value in rows)])


# ---------------------------------------------------------------------------------------------------- evaluation

_DATA_OPTIONS = (
    "dataset_name",
    "train_data_dir",
    "train_data_files",
    "dataset_revision",
    "image_column",
    "crop",
    "num_factors",
    "on_bad_image",
    "cache_dir",
)


def _add_data(parser, purpose: str):
    from .stages import StageOptions

    fields = dataclasses.fields(StageOptions)
    add_stage_options(parser, leave_out=tuple(entry.name for entry in fields if entry.name not in _DATA_OPTIONS))
    parser.add_argument("--split", default="train", help=f"split to {purpose}, or a slice of it (default: train)")
    parser.add_argument("--max_images", type=int, default=None, help="decode only the first images of a split")


def _data_options(args, pipe, **options):
    """What `_add_data` parsed, as the options of a stage: images as the pipeline takes them."""
    from .stages import StageOptions

    channels, size, _ = pipe.image_shape
    source = {"resolution": size, "num_channels": channels, "max_train_samples": args.max_images}
    source |= {name: value for name, value in _given(args).items() if name in _DATA_OPTIONS}
    return StageOptions(split=args.split, **source, **options)


def _add_evaluate(commands):
    parser = commands.add_parser(
        "evaluate",
        help="measure a saved pipeline on a data set",
        description="Measure reconstructions and samples of a pipeline: distances to real images, bins (NDB),\n"
        "errors, posteriors and likelihoods. Prints a table and writes all of it, with the protocol, as JSON.\n"
        "Images are read at the size that the pipeline was trained on. On several processes:\n"
        "accelerate launch -m hf_vaeplus.cli evaluate ...",
        epilog="examples:\n"
        "  vaeplus evaluate vaeplus-quickstart/pipeline --dataset_name rendered-faces --num_images 2000\n"
        "  vaeplus evaluate runs/celeba64/pipeline --train_data_dir celeba --split 'train[20000:]'"
        " --ndb_split 'train[:20000]' --ndb 100 200 300 --sampler second_stage prior mixture --features net.onnx",
    )
    _add_pipeline(parser, "results.json")
    parser.set_defaults(output="results.json")
    _add_data(parser, "measure on")
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
        help="second_stage: the whole pipeline; sharpened: at sharpness 1; prior: without its second stage; mixture,"
        " gaussian: 10 Gaussians or 1 fitted to the codes of training images (default: the pipeline as it is)",
    )
    parser.add_argument("--ndb", nargs="+", type=int, default=[], metavar="K", help="numbers of bins: 100 200 300")
    parser.add_argument(
        "--ndb_split", default=None, help="training images, for bins and for fitted Gaussians (default: train)"
    )
    parser.add_argument("--ndb_images", type=int, default=20_000, help="only so many of them (default: 20000)")
    parser.add_argument(
        "--num_importance_samples", type=int, default=0, help="per image, for likelihoods (default: 0, none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise (default: 0)")
    parser.set_defaults(run=_evaluate)


def _evaluate(args):
    from .evaluation import evaluate, provenance, results_table
    from .features import open_extractor
    from .hub import redacted
    from .stages import open_images, process_state

    output = Path(args.output)
    if output.is_dir():
        raise IsADirectoryError(f"--output must name a file such as results.json, got the folder {output}.")
    _writable(output, output.parent)
    args.device = args.device or str(process_state().device)  # of this process, where there are several
    pipe = _load_pipeline(args)
    try:
        extractors = [open_extractor(spec, args.device) for spec in args.features]
    except ImportError as error:  # of a package that is not needed otherwise
        raise ValueError(str(error)) from error
    options = _data_options(args, pipe)
    training_images = None
    if args.ndb_split or args.ndb or {"mixture", "gaussian"} & set(args.sampler):
        training_images = open_images(dataclasses.replace(options, split=args.ndb_split or "train"))
    results = evaluate(
        pipe,
        open_images(options),
        extractors,
        args.sampler,
        num_images=args.num_images,
        training_images=training_images,
        num_training_images=args.ndb_images,
        num_bins=args.ndb,
        num_importance_samples=args.num_importance_samples,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    if not process_state().is_main_process:
        return None
    found = {**provenance(), "pipeline": args.pipeline, **results}
    text = redacted(json.dumps(found, indent=2)) + "\n"
    _write_output(output, lambda partial: partial.write_text(text))
    print(f"\n{results_table(results)}\n\nsaved in {output}")
    return found


# ----------------------------------------------------------------------------------------------------- inference


def _add_sample(commands):
    parser = commands.add_parser(
        "sample",
        help="draw new images",
        description="Sample images from a pipeline: a grid as one PNG, or --separate files.",
        epilog="examples:\n"
        "  vaeplus sample runs/faces/pipeline --num_images 64 --seed 1 --output samples.png\n"
        "  vaeplus sample org/vaeplus-celeba128 --num_images 1000 --separate --output samples/",
    )
    _add_pipeline(parser, "samples.png, with --separate samples/")
    parser.add_argument("--num_images", type=int, default=64, help="how many (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="factor on all noise (default: 1)")
    _add_sharpness(parser)
    parser.add_argument("--separate", action="store_true", help="write one file per image into the folder --output")
    parser.set_defaults(run=_sample)


def _add_sharpness(parser):
    told = "0 for the decoder's mean, 1 for the power spectrum of real images (default: 0)"
    parser.add_argument("--sharpness", type=float, default=0.0, help=told)


def _add_reconstruct(commands):
    parser = commands.add_parser(
        "reconstruct",
        help="pass pictures through the model",
        description="Encode pictures and decode them again: a PNG of pairs, the original left of its reconstruction.\n"
        "Pictures are cropped to their centre and resized to what the model was trained on.",
        epilog="example:\n  vaeplus reconstruct runs/faces/pipeline a.png b.jpg --output reconstructions.png",
    )
    _add_pipeline(parser, "reconstructions.png")
    _add_sharpness(parser)
    parser.set_defaults(output="reconstructions.png")
    parser.add_argument("images", nargs="+", help="pictures")
    _add_crop(parser)
    parser.set_defaults(run=_reconstruct)


def _add_interpolate(commands):
    parser = commands.add_parser(
        "interpolate",
        help="walk between two pictures",
        description="Draw the way from one picture to another through the latent space, as one row of images.\n"
        "Pictures are cropped to their centre and resized to what the model was trained on.",
        epilog="example:\n  vaeplus interpolate runs/faces/pipeline a.png b.png --steps 9 --output interpolation.png",
    )
    _add_pipeline(parser, "interpolation.png")
    parser.set_defaults(output="interpolation.png")
    parser.add_argument("images", nargs=2, metavar="IMAGE", help="first and last picture")
    _add_crop(parser)
    parser.add_argument("--steps", type=int, default=9, help="images on the way, ends included (default: 9)")
    parser.set_defaults(run=_interpolate)


def _add_pipeline(parser, output: str):
    parser.add_argument("pipeline", help="folder of a saved pipeline, or its id on the Hub")
    parser.add_argument("--output", help=f"what to write; missing folders are made (default: {output})")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    _add_json(parser)


def _add_json(parser):
    parser.add_argument("--json", action="store_true", help="for programs: one line of JSON on standard output")


def _add_crop(parser):
    parser.add_argument(
        "--crop", type=int, default=None, help="side of the centre crop in pixels, as in training (default: largest)"
    )


def _output_picture(path: str) -> Path:
    """A picture that can be written there, found out before the work."""
    from .data import PICTURE_SUFFIXES

    path = Path(path)
    if path.suffix.lower() not in PICTURE_SUFFIXES or path.is_dir():
        raise ValueError(f"--output must name a picture such as samples.png, got {path}.")
    return _writable(path, path.parent)


def _writable(path: Path, folder: Path, option: str = "--output") -> Path:
    """`path`, after `folder` is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{option} {path} cannot be written: the folder {folder} cannot be made ({error.strerror}), name another."
        ) from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{option} {path} cannot be written: {folder} allows no writing.")
    return path


def _write_output(path: Path, write: Callable[[Path], object]):
    """`write(path)`, whole or not at all: what was there stays until there is something in its place."""
    from .checkpoints import write_whole

    try:
        write_whole(path, write)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}): free some space or name another --output."
        ) from error


def _add_card(commands):
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
    parser.add_argument("run_dir", metavar="RUN", help="--output_dir of a finished `vaeplus train`")
    parser.add_argument("model_id", metavar="REPO_ID", help="repository that the card is for: organisation/name")
    parser.add_argument("--evaluation", default=None, help="results.json of `vaeplus evaluate` for this pipeline")
    parser.add_argument("--data_license", default=None, help="licence of the training images, where it is not known")
    parser.add_argument("--license", default="other", help="licence of the weights, by the Hub's ids (default: other)")
    parser.add_argument("--output", default=None, help="folder of the card (default: the run's pipeline folder)")
    _add_json(parser)
    parser.set_defaults(run=_card)


def _card(args):
    from .cards import PICTURES, write_card

    evaluation = None
    if args.evaluation:
        evaluation = _read_results(Path(args.evaluation))
    output = None if args.output is None else Path(args.output)
    wanted = dict(evaluation=evaluation, data_license=args.data_license, license=args.license)
    card = write_card(Path(args.run_dir), args.model_id, output, **wanted)
    print(f"saved {card}")
    return {"files": [str(card), *(str(card.with_name(name)) for name in PICTURES)], "repository": args.model_id}


def _read_results(path: Path) -> dict:
    from .evaluation import results_table

    try:
        results = json.loads(path.read_text())
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


def _add_encode(commands):
    parser = commands.add_parser(
        "encode",
        help="turn a data set of images into a data set of latents",
        description="Encode every image of a data set: mean and variance of the first VAE's posterior, as parquet\n"
        "files that `datasets.load_dataset` reads, one row an image, in the order of the source.\n"
        "Images are read at the size that the pipeline was trained on.",
        epilog="examples:\n"
        "  vaeplus encode vaeplus-quickstart/pipeline --dataset_name rendered-faces --max_images 2000\n"
        "  vaeplus encode runs/celeba64/pipeline --dataset_name celeba --streaming --output latents"
        " --push_to_hub your-name/celeba-latents --private",
    )
    _add_pipeline(parser, "latents.parquet")
    parser.set_defaults(output="latents.parquet")
    _add_data(parser, "encode")
    parser.add_argument(
        "--streaming", action="store_true", help="decode on the way, without a cache: for huge sources"
    )
    parser.add_argument("--push_to_hub", metavar="REPO_ID", default=None, help="upload to this data set on the Hub")
    parser.add_argument("--private", action="store_true", help="make the data set on the Hub private")
    parser.set_defaults(run=_encode)


def _encode(args):
    from huggingface_hub.errors import HTTPError
    from pyarrow.parquet import read_metadata

    from .encoding import check_output, encode_to_parquet, latents_card, open_repository, push_latents
    from .hub import redacted
    from .stages import open_images

    output = check_output(args.output)
    _writable(output, output.parent)
    if args.private and not args.push_to_hub:
        raise ValueError("--private is of --push_to_hub, which is missing: name a repository, or leave it out.")
    pipe = _load_pipeline(args)
    options = _data_options(args, pipe, streaming=args.streaming)
    images = open_images(options)
    if args.push_to_hub:
        open_repository(args.push_to_hub, args.private)
    files = encode_to_parquet(pipe, images, output, args.split, args.batch_size)
    num_images = sum(read_metadata(file).num_rows for file in files)
    about = pipe, args.pipeline, images, args.split, options.source_crop, num_images
    if output.is_dir():
        (output / "README.md").write_text(latents_card(*about, output.name))
    print(f"saved {num_images:,} posteriors in {output}")
    found = _made(args, files, "split", num_images=num_images, latent_dim=pipe.vae.config.latent_dim)
    if not args.push_to_hub:
        return found
    try:
        address = push_latents(files, latents_card(*about, args.push_to_hub), args.push_to_hub, args.split)
    except (HTTPError, OSError) as error:
        raise OSError(f"{output} is complete, but pushing it to {args.push_to_hub} failed: {error}") from error
    print(redacted(f"pushed to {address}"))
    return {**found, "repository": args.push_to_hub, "url": address}


def _add_completion(commands):
    parser = commands.add_parser(
        "completion",
        help="print a script that completes this command in a shell",
        description="Print a script that completes commands, options and paths of `vaeplus` in bash or zsh.",
        epilog="examples:\n"
        "  vaeplus completion bash > ~/.local/share/bash-completion/completions/vaeplus\n"
        "  vaeplus completion zsh > ~/.zfunc/_vaeplus",
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=_completion)


def _completion(args):
    import shtab

    kinds = dict.fromkeys(("output", "images", "config", "evaluation", "train_data_files"), shtab.FILE)
    kinds |= dict.fromkeys(("pipeline", "run_dir", "output_dir", "train_data_dir", "cache_dir"), shtab.DIRECTORY)
    parser = build_parser()
    (commands,) = (action for action in parser._actions if action.dest == "command")
    for command in commands.choices.values():
        for action in command._actions:
            if action.dest in kinds:
                action.complete = kinds[action.dest]
    print(shtab.complete(parser, args.shell))


def _add_push(commands):
    parser = commands.add_parser(
        "push",
        help="upload a pipeline to the Hub",
        description="Upload a pipeline, with its card and pictures, in one commit. The repository also loads without\n"
        "this package, by trust in the code that it carries. Log in with `hf auth login`, or set HF_TOKEN.\n"
        "After a failure the same command goes on where it stopped.",
        epilog="examples:\n"
        "  vaeplus push runs/cats/pipeline your-name/vaeplus-cats --private\n"
        "  vaeplus push runs/cats/pipeline your-name/vaeplus-cats --revision longer --tag v2\n"
        "  vaeplus push runs/cats/pipeline your-name/vaeplus-cats --variant bf16",
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="folder of a saved pipeline, or its id on the Hub")
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
    _add_json(parser)
    parser.set_defaults(run=_push, device="cpu")


def _push(args):
    import torch

    from .hub import redacted

    pipe = _load_pipeline(args)
    if args.variant:
        pipe.to({"bf16": torch.bfloat16, "fp16": torch.float16}[args.variant])
    names = dict(revision=args.revision, tag=args.tag, variant=args.variant)
    commit = pipe.push_to_hub(args.repo_id, args.message, private=args.private or None, **names)
    print(redacted(f"pushed: {commit}"))
    return {"repository": args.repo_id, **names, "url": commit}


def _add_demo(commands):
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
    parser.set_defaults(run=_demo)


def _demo(args):
    try:
        from .demo import build_demo, serve
    except ImportError as error:
        raise ValueError(str(error)) from error
    try:
        socket.create_server((args.host, args.port or 0)).close()
    except (OSError, OverflowError) as error:
        address = f"{args.host}:{args.port or ''}"
        raise ValueError(f"cannot serve at {address} ({error}): choose another --host or --port.") from error
    serve(build_demo(_load_pipeline(args)), server_name=args.host, server_port=args.port)


def _load_pipeline(args):
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # AssertionError: built without CUDA
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", args.pipeline)
    if not Path(args.pipeline, "model_index.json").is_file() and (Path(args.pipeline).exists() or not is_hub_id):
        raise FileNotFoundError(
            f"{args.pipeline} is not a saved pipeline: expected a folder with model_index.json, such as the one named"
            " pipeline in the --output_dir of `vaeplus train`, or an id on the Hub."
        )

    import diffusers

    from . import VAEPlusPipeline

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    try:
        pipe = VAEPlusPipeline.from_pretrained(args.pipeline)
    except OSError as error:
        if Path(args.pipeline).exists():
            raise
        raise FileNotFoundError(f"there is no folder {args.pipeline}, and {error}") from error
    return pipe.to(device)


def _sample(args):
    import torch

    from .pictures import image_grid

    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must lie in [0, 2**63), got {args.seed}.")
    if args.separate:
        folder = Path(args.output or "samples")
        _writable(folder, folder)
        if any(folder.iterdir()):  # old samples among the new ones would spoil whatever is measured on them
            raise FileExistsError(f"--output {folder} is not empty: name a new folder.")
    else:
        output = _output_picture(args.output or "samples.png")
    pipe = _load_pipeline(args)
    generator = torch.Generator().manual_seed(args.seed)  # the same noise on every device
    wanted = dict(generator=generator, temperature=args.temperature, sharpness=args.sharpness)
    wanted["batch_size"] = args.batch_size
    if args.separate:
        files = [folder / f"{number:06d}.png" for number in range(args.num_images)]
        for file, image in zip(files, pipe(args.num_images, **wanted).images, strict=True):
            _write_output(file, image.save)
    else:
        files = [output]
        _write_output(output, image_grid(pipe(args.num_images, output_type="pt", **wanted).images).save)
    return _made(args, files, "num_images", "seed", "temperature", "sharpness")


def _made(args, files: list[Path], *options: str, **found) -> dict:
    """What the commands that write files tell under `--json`."""
    named = {name: getattr(args, name) for name in ("pipeline", *options)}
    return {"files": [str(file) for file in files], **named, **found}


def _reconstruct(args):
    import torch

    from .pictures import image_grid

    output = _output_picture(args.output)
    pipe = _load_pipeline(args)
    images = _read_pictures(args, pipe)
    decoded = pipe.reconstruct(images, "pt", args.batch_size, args.sharpness)
    pairs = torch.stack([images, decoded], 1)
    _write_output(output, image_grid(pairs.flatten(0, 1), columns=2 * min(4, len(images))).save)
    return _made(args, [output], "sharpness", num_images=len(images))


def _interpolate(args):
    from .pictures import image_grid

    output = _output_picture(args.output)
    pipe = _load_pipeline(args)
    first, last = _read_pictures(args, pipe)
    path = pipe.interpolate(first, last, args.steps, output_type="pt", batch_size=args.batch_size)
    _write_output(output, image_grid(path[0], columns=args.steps).save)
    return _made(args, [output], "steps")


def _read_pictures(args, pipe):
    """Pictures as the model wants them: `(count, C, H, W)` in [0, 1]."""
    import numpy as np
    import torch

    from .data import to_unit_range
    from .image_processing_vaeplus import decode_image

    channels, size, _ = pipe.image_shape
    if args.crop is not None and args.crop < 1:
        raise ValueError(f"--crop must be positive, got {args.crop}.")
    arrays = [decode_image(Path(path), path, size, args.crop, channels) for path in args.images]
    return to_unit_range(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))


if __name__ == "__main__":
    sys.exit(main())
