"""`vaeplus quickstart` and `vaeplus train`."""

import contextlib
import dataclasses
import logging
import time
from pathlib import Path

from ..evaluation.tables import summary_table
from .flags import add_config, add_json, add_stage_options, assignment, given_options, writable

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
        "--output_dir", default="vaeplus-quickstart", help="where everything goes (default: %(default)s)"
    )
    parser.add_argument("--num_factors", type=int, default=8, help="r: factors the drawings vary in (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--cache_dir", default=None, help="where decoded images are kept (default: $VAEPLUS_CACHE)")
    add_json(parser)
    parser.set_defaults(run=_run_quickstart, interrupted=_INTERRUPTED)


def _run_quickstart(args):
    overrides = {"num_factors": args.num_factors, "seed": args.seed, "cache_dir": args.cache_dir}
    return _train("quickstart", Path(args.output_dir), overrides)


def add_train(commands):
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
    parser.add_argument("--evaluation_split", default=None, help="split to measure on (default: the training images)")
    add_stage_options(
        parser,
        leave_out=("stage", "autoencoder", "vae", "model", "resume_from_checkpoint", "output_dir", "hub_subfolder"),
    )
    parser.add_argument("--output_dir", default="runs/vaeplus", help="where everything goes (default: %(default)s)")
    add_json(parser)
    parser.set_defaults(run=_run_train, interrupted=_INTERRUPTED)


def _run_train(args):
    overrides = {name: value for name, value in given_options(args).items() if name != "output_dir"}
    return _train(args.config, Path(args.output_dir), overrides, args.set, args.evaluation_split)


def _train(preset_name: str, output_dir: Path, overrides: dict, settings=(), evaluation_split: str | None = None):
    from ..files import sole_run
    from ..training.codes import process_state
    from ..training.options import load_preset
    from ..training.stages import all_stage_options

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
    writable(output_dir, output_dir, "--output_dir")
    with sole_run(output_dir) if process_state().is_main_process else contextlib.nullcontext():
        _train_and_report(preset, options, output_dir, overrides, evaluation_split)


def _train_and_report(preset: dict, options: dict, output_dir: Path, overrides: dict, evaluation_split: str | None):
    from ..evaluation.summaries import report
    from ..training.codes import process_state
    from ..training.stages import open_images, train_all

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
    print(summary_table(summary, time.perf_counter() - started))
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
