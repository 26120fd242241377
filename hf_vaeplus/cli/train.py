"""`vaeplus quickstart` and `vaeplus train`."""

import contextlib
import dataclasses
import logging
import time
from pathlib import Path

from ..evaluation.tables import summary_table
from .flags import (
    add_config,
    add_json,
    add_stage_options,
    assignment,
    check_resolution,
    given_options,
    local_path,
    writable,
)

_STARTED = time.perf_counter()  # before any library is imported: the wall time includes the imports
_INTERRUPTED = "the same command goes on from the newest checkpoint"


def add_quickstart(commands):
    parser = commands.add_parser(
        "quickstart",
        help="train all three stages on embedded drawings, in minutes",
        description="Train all three stages on drawings of faces made from r known factors, save the pipeline\n"
        "and draw what it does. Needs no network, no data and no GPU. Run it again to go on after an interruption.",
        epilog="examples:\n  vaeplus quickstart\n  vaeplus quickstart --num_factors 4 --output_dir runs/four",
    )
    parser.add_argument(
        "--output_dir",
        type=local_path,
        default="vaeplus-quickstart",
        help="where everything goes (default: %(default)s)",
    )
    parser.add_argument("--num_factors", type=int, default=8, help="r: factors the drawings vary in (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--cache_dir", default=None, help="where decoded images are kept (default: $VAEPLUS_CACHE)")
    add_json(parser)
    parser.set_defaults(run=_run_quickstart, interrupted=_INTERRUPTED)


def _run_quickstart(args):
    overrides = {"num_factors": args.num_factors, "seed": args.seed, "cache_dir": args.cache_dir}
    found = _train("quickstart", args.output_dir, overrides)
    if found is not None:  # of the main process
        faces = Path("model_cards/vaeplus-celeba128")
        place = "" if faces.is_dir() else ", in a clone of the project"
        print(f"next, trained faces at 128 x 128{place}: vaeplus sample {faces} --num_images 16 --output faces.png")
    return found


def add_train(commands):
    parser = commands.add_parser(
        "train",
        help="train all three stages from one preset and save the pipeline",
        description="Train autoencoder, first VAE and second stage one after the other, then save the pipeline.\n"
        "The same command again goes on where it stopped. Stages whose images or earlier stages have changed\n"
        "since are refused, or trained anew with --retrain.\n"
        "Options given here hold for every stage; --set changes one.",
        epilog="examples:\n"
        "  vaeplus train --config celeba64-cpu --train_data_dir celeba --output_dir runs/celeba64\n"
        "  vaeplus train --config quickstart --set vae.max_train_steps=200 vae.model.latent_dim=8\n"
        "  vaeplus train --config pictures64-cpu --train_data_dir pictures --output_dir runs/pictures"
        " --set autoencoder.max_train_steps=20000 --retrain\n"
        "  accelerate launch -m hf_vaeplus.cli train --config celeba128 --dataset_name celeba",
    )
    add_config(parser, "that the options below override", required=True)
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        type=assignment,
        metavar="STAGE.OPTION=VALUE",
        help="change an option of one stage; STAGE.model.FIELD=VALUE for the model's config",
    )
    told = "split to measure on (default: the pictures that --holdout holds out, else the training images)"
    parser.add_argument("--evaluation_split", default=None, help=told)
    add_stage_options(
        parser,
        leave_out=("stage", "autoencoder", "vae", "model", "resume_from_checkpoint", "output_dir", "hub_subfolder"),
    )
    told = "where everything goes (default: output_dir in `common` of the preset, or runs/vaeplus)"
    parser.add_argument("--output_dir", type=local_path, default=None, help=told)
    add_json(parser)
    parser.set_defaults(run=_run_train, interrupted=_INTERRUPTED)


def _run_train(args):
    overrides = {name: value for name, value in given_options(args).items() if name != "output_dir"}
    return _train(args.config, args.output_dir, overrides, args.set, args.evaluation_split)


def _train(preset_name: str, folder: str | None, overrides: dict, settings=(), evaluation_split: str | None = None):
    from ..files import sole_run
    from ..training.launch import process_state
    from ..training.options import TrainingOptions, load_preset
    from ..training.stages import all_stage_options, open_stage_images, train_stages, with_holdout

    preset = _with_settings(load_preset(preset_name), settings)
    common = TrainingOptions(output_dir=preset.get("common", {}).get("output_dir", "runs/vaeplus"))
    output_dir = Path(folder or common.output_dir)
    preset = with_holdout(preset, output_dir, 0 if evaluation_split else None, **overrides)
    options = all_stage_options(preset, output_dir, **overrides)
    for each in options.values():
        check_resolution(each)
    is_main_process = process_state().is_main_process
    writable(output_dir, output_dir, "--output_dir")
    with sole_run(output_dir) if is_main_process else contextlib.nullcontext():
        if is_main_process:
            _announce_overwriting(output_dir)
        training_images = open_stage_images(options)
        last = options["second_stage"], training_images["second_stage"]
        images, images_are = _report_images(*last, evaluation_split)
        pipe = train_stages(options, training_images, output_dir)
        if not is_main_process:
            return None
        found = _report(pipe, images, images_are, options, output_dir)
        if options["second_stage"].push_to_hub:
            _push_result(pipe, output_dir, options["second_stage"])
        return found


def _with_settings(preset: dict, settings) -> dict:
    """A preset, changed in place by what `--set` gives."""
    from ..training.options import put_over

    for name, value in settings:
        stage, _, option = name.partition(".")
        if not option:
            raise ValueError(f"--set takes STAGE.OPTION=VALUE, got {name}={value}.")
        section = preset.setdefault(stage, {})
        if option.startswith("model."):
            section, option = section.setdefault("model", {}), option.removeprefix("model.")
        put_over(section, {option: value})
    return preset


def _announce_overwriting(output_dir: Path):
    from ..evaluation.summaries import REPORT_FILES

    existing = [name for name in REPORT_FILES if (output_dir / name).exists()]
    if existing:
        print(f"{' '.join(existing)} in {output_dir} will be written anew.")


def _report_images(options, training_images, evaluation_split: str | None):
    """The images that the report measures on, opened by all processes and before hours of training; and whether
    training has seen them.

    They are another split, those that are held out, or the training images without mirror images. A stream has no
    first images to go back to, so as many of its images as the report looks at are decoded into a cache.
    """
    from ..evaluation.summaries import MAX_IMAGES
    from ..training.stages import open_images, seen_in_training

    if evaluation_split is not None:
        images = open_images(options, evaluation_split)
        images_are = seen_in_training(images, training_images, options)
    elif options.streaming:
        count = min(options.max_train_samples or MAX_IMAGES, MAX_IMAGES)
        images = open_images(dataclasses.replace(options, streaming=False, random_flip=False, max_train_samples=count))
        images_are = "seen"
    else:
        unseen = training_images.unseen()
        images, images_are = (training_images.unmirrored(), "seen") if unseen is None else (unseen, "unseen")
    if len(images) < 2:
        raise ValueError(
            f"the statistics of a posterior need at least two images, and {images.name} has one to measure on: hold"
            " more out with --holdout, or name an --evaluation_split."
        )
    return images, images_are


def _report(pipe, images, images_are: str, options: dict, output_dir: Path) -> dict:
    """Write and print how the training went; what `--json` prints."""
    from ..evaluation.summaries import REPORT_FILES, report

    last = options["second_stage"]
    num_factors = last.num_factors if last.dataset_name == "rendered-faces" else None
    folders = {stage: Path(each.output_dir) for stage, each in options.items()}
    summary = report(pipe, images, folders, output_dir, last.seed, num_factors, images_are)
    print(summary_table(summary, time.perf_counter() - _STARTED))
    print(f"\nsaved in {output_dir}: pipeline/ {' '.join(REPORT_FILES)}")
    print(f"sample again: vaeplus sample {output_dir / 'pipeline'} --num_images 64 --seed 1")
    return {"files": [str(output_dir / name) for name in ("pipeline", *REPORT_FILES)], **summary}


def _push_result(pipe, run_dir: Path, options):
    """The whole pipeline, beside the stages that training has pushed. The run is done: a failure is a warning."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    from ..data.catalogue import CARD_FACTS
    from ..hub.cards import write_card
    from ..hub.client import explain, full_repo_id
    from ..hub.repository import push

    repo_id = options.hub_model_id
    by_hand = f"vaeplus push {run_dir / 'pipeline'} {repo_id}"
    try:
        repo_id = full_repo_id(repo_id, HfApi(token=options.hub_token))
        if options.dataset_name in CARD_FACTS:
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
