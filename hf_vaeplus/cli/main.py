"""The command line `vaeplus`: finds the command, runs it, and turns a user's mistake into one sentence."""

import contextlib
import json
import logging
import os
import sys
import traceback

from .demo import add_demo
from .evaluate import add_evaluate
from .flags import CommandParser, UsageError
from .inference import add_interpolate, add_reconstruct, add_sample
from .publish import add_card, add_encode, add_push
from .train import add_quickstart, add_train

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

    from ..hub.client import explain
    from ..provenance import redact_record, redacted
    from ..training.loop import TrainingDiverged

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
    from ..provenance import redacted

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
        add_quickstart,
        add_train,
        add_evaluate,
        add_sample,
        add_reconstruct,
        add_interpolate,
        add_encode,
        add_card,
        add_push,
        add_demo,
        _add_completion,
    ):
        add(commands)
    return parser


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
