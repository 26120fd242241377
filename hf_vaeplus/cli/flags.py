"""Flags and checks that several commands share."""

import argparse
import dataclasses
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

import yaml

from ..fields import from_home, kinds_of, utf8
from ..provenance import redact_record


class UsageError(ValueError):
    """What argparse refuses."""


class CommandParser(argparse.ArgumentParser):
    """Flags must be written out, and a mistake gives one sentence like any other, not the usage of sixty flags.

    A flag may be spelt with hyphens in place of its underscores. What is nearly a flag or a choice is named.
    """

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options})
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self.add_argument("--quiet", action=_Quiet, help="print results and errors, no progress bars and no warnings")

    def parse_known_args(self, args=None, namespace=None):
        flags = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        words = list(sys.argv[1:] if args is None else args)
        for number, word in enumerate(words[: words.index("--") if "--" in words else None]):
            name, equals, value = word.partition("=")
            words[number] = flags.get(name.replace("_", "-"), name) + equals + value
        namespace, unknown = super().parse_known_args(words, namespace)
        loose = next((action for action in self._actions if action.nargs == "*" and not action.option_strings), None)
        if loose and unknown and not getattr(namespace, loose.dest) and not any(w.startswith("-") for w in unknown):
            # argparse before Python 3.13 takes such words for none if an option stands before them
            setattr(namespace, loose.dest, [self._get_value(loose, word) for word in unknown])
            unknown = []
        for word in unknown:
            if word.startswith("--"):
                name = word.partition("=")[0]
                self.error(f"there is no option {name}{_nearest(name, flags.values())}")
        return namespace, unknown

    def error(self, message):
        if choice := re.fullmatch(r"(.* invalid choice: '(.*)') \(choose from (.*)\)", message, re.DOTALL):
            before, word, choices = choice.groups()
            names = re.findall(r"[^\s,']+", choices)
            message = f"{before}{_nearest(word, names)} (choose from {', '.join(names)})"
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def _nearest(word: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1)
    return f", did you mean {near[0]}?" if near else ""


class _Quiet(argparse.Action):
    """`TQDM_DISABLE` and the like, before the libraries that read them are imported."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, *args):
        from huggingface_hub.utils import disable_progress_bars

        os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        disable_progress_bars()
        logging.disable(logging.WARNING)


def calm_libraries():
    """What the libraries say stays between the lines of a command: no bar for each file, no secret in a log."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for name in ("huggingface_hub", "transformers"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(redact_record)


def add_stage_options(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> dict:
    """One flag for every field of [`StageOptions`]. Flags that are not given leave no attribute behind.

    Returns:
        `dict` of the groups of flags in the help, by title.
    """
    from ..training.options import StageOptions

    groups, title = {}, None
    for entry in dataclasses.fields(StageOptions):
        title = entry.metadata.get("group") or title
        if entry.name in leave_out:
            continue
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = next(kind for kind in kinds_of(entry.type) if kind is not NoneType)
        flag = dict(default=argparse.SUPPRESS, help=entry.metadata["help"])
        if kind is bool:
            flag["action"] = argparse.BooleanOptionalAction
        elif kind is dict:
            flag.update(nargs="+", action="extend", metavar="FIELD=VALUE", type=assignment)
        else:
            if get_origin(kind) is Literal:
                flag.update(choices=get_args(kind), metavar="|".join(get_args(kind)))
            else:
                flag.update(type=kind, metavar=kind.__name__.upper())
            if entry.default not in (None, dataclasses.MISSING):
                flag["help"] += f" (default: {entry.default})"
        groups[title].add_argument(f"--{entry.name}", **flag)
    return groups


def add_config(parser, purpose: str, **options):
    from ..training.options import preset_names

    names = ", ".join(preset_names())
    parser.add_argument(
        "--config", metavar="PRESET", help=f"{names} or a YAML file, {purpose}", type=local_path, **options
    )


def check_resolution(options):
    """Refuse, before anything is decoded, images of a size that the network of a stage cannot take.

    Raises:
        ValueError: names the nearest sizes that it can take.
    """
    from huggingface_hub.errors import StrictDataclassError

    from ..modeling_vaeplus import VAEPlusAutoencoderConfig, VAEPlusVAEConfig

    if options.stage == "second_stage" or options.autoencoder:  # trains on codes
        return
    channels = options.source_channels

    def mistake(size: int) -> Exception | None:
        try:
            if options.stage == "autoencoder":
                VAEPlusAutoencoderConfig(**{"image_size": size, "num_channels": channels, **options.model})
            else:
                VAEPlusVAEConfig(**{"input_shape": (channels, size, size), "network": "conv", **options.model})
        except (ValueError, TypeError, StrictDataclassError) as error:
            return error
        return None

    if error := mistake(options.resolution):
        ways = range(options.resolution - 1, 0, -1), range(options.resolution + 1, 2 * options.resolution + 256)
        nearest = [next((str(size) for size in way if not mistake(size)), None) for way in ways]
        if any(nearest):  # otherwise the resolution is not what is wrong
            raise ValueError(
                f"the network cannot take images of resolution {options.resolution}, the nearest that it can take:"
                f" {' and '.join(filter(None, nearest))} ({error})"
            )


def local_path(text: str) -> str:
    """The type of an argument that names a file or folder: no shell expands the `~` of `--output=~/x`."""
    try:
        return from_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def weights_path(text: str) -> str:
    """The type of an argument that names a folder of weights: safetensors opens no path that is no UTF-8."""
    path = local_path(text)
    try:
        utf8(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, yaml.safe_load(value.encode(errors="surrogateescape"))  # UTF-8, whatever the locale
    except Exception as error:  # PyYAML lets through nearly anything that its constructors meet
        raise argparse.ArgumentTypeError(f"{text!r} has no readable value") from error


def given_options(args: argparse.Namespace) -> dict:
    """The stage options that the command line gives, as keyword arguments."""
    from ..training.options import StageOptions

    names = {entry.name for entry in dataclasses.fields(StageOptions)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if "model" in given:
        given["model"] = dict(given["model"])
    return given


def parse_stage_options(description: str, argv: list[str] | None = None):
    """The options of `examples/train_stage.py`: flags over a preset over defaults. `None` after `--dry_run`."""
    from ..training.options import load_preset, stage_options

    parser = CommandParser(description=description)
    add_config(parser, "that the flags override")
    parser.add_argument("--dry_run", action="store_true", help="print the options as a preset for --config, then stop")
    add_stage_options(parser)
    args = parser.parse_args(argv)
    given = given_options(args)
    if "stage" not in given:
        raise ValueError("--stage is missing: choose autoencoder, vae or second_stage.")
    options = stage_options(given.pop("stage"), load_preset(args.config) if args.config else None, **given)
    if args.dry_run:
        left_out = {"stage", "hub_token", "train_batch_size" if options.global_batch_size else "global_batch_size"}
        if options.output_dir == type(options).output_dir:  # `vaeplus train` has another default
            left_out.add("output_dir")
        section = {name: value for name, value in dataclasses.asdict(options).items() if name not in left_out}
        print(yaml.safe_dump({options.stage: section}, sort_keys=False), end="")
        return None
    calm_libraries()
    return options


def _data_options() -> set[str]:
    """Options that say where images come from; a pipeline says what they must look like."""
    from ..data.options import ImageOptions

    names = {entry.name for entry in dataclasses.fields(ImageOptions)} | {"cache_dir"}
    return names - {"split", "resolution", "num_channels", "max_train_samples", "random_flip"}


def add_data(parser, purpose: str):
    from ..training.options import StageOptions

    others = {entry.name for entry in dataclasses.fields(StageOptions)} - _data_options()
    data = add_stage_options(parser, leave_out=others)["data"]
    data.add_argument("--split", default="train", help=f"split to {purpose}, or a slice of it (default: train)")
    data.add_argument("--max_images", type=int, default=None, help="decode only the first images of a split")


def add_label_column(parser):
    parser.add_argument("--label_column", default=None, help="column of a table, or of a data set, with labels")


def data_options(args, pipe, **options):
    """What `add_data` parsed, as the options of a stage: images as the pipeline takes them."""
    from ..data.catalogue import EMBEDDED

    channels, size, _ = pipe.image_shape
    crop = None if getattr(args, "dataset_name", None) in EMBEDDED else pipe.image_processor.crop
    return image_options_of(args, size, channels, crop, **options)


def image_options_of(args, size: int, channels: int | None, crop: int | None = None, **options):
    """What `add_data` parsed, as the options of a stage: images of this size and number of channels."""
    from ..training.options import StageOptions

    source = {"resolution": size, "num_channels": channels, "max_train_samples": args.max_images, "crop": crop}
    names = _data_options()
    source |= {name: value for name, value in given_options(args).items() if name in names}
    return StageOptions(split=args.split, **source, **options)


def check_seed(seed: int):
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must lie in [0, 2**63), got {seed}.")


def add_deterministic(parser, default: bool):
    told = "the decoder's mean; with --no-deterministic, detail around it, of a pipeline that has a model of it"
    usual = "--deterministic" if default else "--no-deterministic"
    parser.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=default,
        help=f"{told} (default: {usual})",
    )
    told = "factor on the noise of the detail: below 1 it is calmer (default: that of the model)"
    parser.add_argument("--detail_temperature", type=float, help=told)


def add_sharpness(parser):
    told = "0 for the decoder's mean, 1 for the power spectrum of real images (default: 0)"
    parser.add_argument("--sharpness", type=float, default=0.0, help=told)


def add_pipeline(parser, output: str):
    parser.add_argument("pipeline", type=weights_path, help="folder of a saved pipeline, or its id on the Hub")
    parser.add_argument(
        "--output", type=local_path, help=f"what to write; missing folders are made (default: {output})"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    add_json(parser)


def add_json(parser):
    parser.add_argument("--json", action="store_true", help="for programs: one line of JSON on standard output")


def add_crop(parser):
    told = "side of the centre crop in source pixels (default: that of the training)"
    parser.add_argument("--crop", type=int, default=None, help=told)


def add_overwrite(parser):
    parser.add_argument("--overwrite", action="store_true", help="replace the file --output if it exists")


def output_picture(args) -> Path:
    """A picture that can be written at `--output`, found out before the work."""
    from ..data.folders import picture_suffixes

    path = Path(args.output)
    if path.suffix.lower() not in picture_suffixes() or path.is_dir():
        raise ValueError(f"--output must name a picture such as samples.png, got {path}.")
    return output_file(args)


def output_file(args) -> Path:
    """`--output` as a file that can be written, and that exists only if `--overwrite` is given."""
    path = Path(args.output)
    writable(path, path.parent)
    if path.exists() and not args.overwrite:
        raise FileExistsError(f"{path} exists: add --overwrite to replace it, or name another --output.")
    return path


def writable(path: Path, folder: Path, option: str = "--output") -> Path:
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


written: list[Path] = []  # by the command that is running


def write_output(path: Path, write: Callable[[Path], object]):
    """`write(path)`, whole or not at all: what was there stays until there is something in its place."""
    from ..files import write_whole

    try:
        write_whole(path, write)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error.strerror or error}): free some space or name another --output."
        ) from error
    written.append(path)


def written_record(args, files: list[Path], *options: str, **found) -> dict:
    """What the commands that write files tell under `--json`."""
    named = {name: getattr(args, name) for name in ("pipeline", *options)}
    return {"files": [str(file) for file in files], **named, **found}


def usable_device(args) -> str:
    """`--device`, or the best there is."""
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # AssertionError: built without CUDA
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def load_pipeline(args):
    device = usable_device(args)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", args.pipeline)
    if not Path(args.pipeline, "model_index.json").is_file() and (Path(args.pipeline).exists() or not is_hub_id):
        raise FileNotFoundError(
            f"{args.pipeline} is not a saved pipeline: expected a folder with model_index.json, such as the one named"
            " pipeline in the --output_dir of `vaeplus train`, or an id on the Hub."
        )

    import diffusers

    from ..hub.pipeline import VAEPlusPipeline

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    try:
        pipe = VAEPlusPipeline.from_pretrained(args.pipeline)
    except ImportError as error:  # of a package that only this second stage needs
        raise ValueError(str(error)) from error
    except OSError as error:
        if Path(args.pipeline).exists():
            raise
        raise FileNotFoundError(f"there is no folder {args.pipeline}, and {error}") from error
    return pipe.to(device)


def pictures_in(names: list[str]) -> list[Path]:
    """Pictures, and in the place of a folder those in it and below, in the order of their paths."""
    from ..data.folders import pictures_below

    paths = []
    for path in map(Path, names):
        if os.path.isdir(path):  # False for a name that no file can have
            found = pictures_below(path)
            if not found:
                raise ValueError(f"the folder {path} holds no pictures: name another.")
            paths += found.values()
        else:
            paths.append(path)
    return paths


def read_pictures(args, pipe, paths: list[Path] | None = None, skip: bool = False):
    """Pictures as the model wants them: `(count, C, H, W)` in [0, 1].

    Args:
        paths: the pictures; `args.images` if not given.
        skip: leave out those that cannot be used, with a warning for each.
    """
    import torch

    from ..data.pixels import to_unit_range

    arrays = dict(usable_pictures(args, pipe, map(Path, args.images) if paths is None else paths, skip))
    if not arrays:
        raise ValueError("none of the pictures can be used, expected at least one: name others.")
    return to_unit_range(torch.stack(list(arrays.values())))


def usable_pictures(args, pipe, paths: Iterable[Path], skip: bool):
    """Pictures that can be used, one by one: where they are listed, and uint8 of shape `(C, H, W)`.

    The crop is `args.crop`, or that of the training. Arguments and errors are those of `read_pictures`.
    """
    import torch

    from ..image_processing_vaeplus import VAEPlusImageProcessor

    processor = pipe.image_processor
    if args.crop is not None:
        if args.crop < 1:
            raise ValueError(f"--crop must be positive, got {args.crop}.")
        processor = VAEPlusImageProcessor(processor.image_size, processor.num_channels, args.crop)
    for place, path in enumerate(paths):
        try:
            pixels = processor.pixels(path, str(path))
        except ValueError as error:
            if not skip:
                raise
            logging.warning("left out: %s", error)
        else:
            yield place, torch.tensor(pixels).permute(2, 0, 1)
