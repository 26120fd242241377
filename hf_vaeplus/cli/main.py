"""The command line `vaeplus`: finds the command, runs it, and turns a user's mistake into one sentence.

The files of the command line import the libraries in the functions that need them, so that help, version, completion
and the refusal of a mistake come at once. This file imports nothing before `run_command` waits for Ctrl-C, which can
come during an import as well.
"""

import sys

_EPILOG = """\
Begin with `vaeplus quickstart`; `vaeplus COMMAND --help` explains a command. Hyphens and underscores are the same in
the names of options.

exit codes:
  0    done
  2    the command or its input was wrong: one sentence on standard error says what to do
  3    training diverged; the last good state is saved
  129  the terminal was closed, 130 interrupted, 143 terminated (training saves its state first)
  141  the work is done, but the reader of standard output went away before it had everything

with --json standard output is one line with one JSON object: what was done, with the files written, or
{"error": "the sentence"}. Everything for people goes to standard error. Every command has it but completion, which
prints a script.

examples:
  vaeplus quickstart
  vaeplus sample vaeplus-quickstart/pipeline --seed 1 --output samples.png --json
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `vaeplus`."""
    return run_command(lambda: _dispatch(argv), argv)


def run_command(command, argv: list[str] | None = None, interrupted: str = "nothing was written") -> int:
    """Run `command()`; a user's mistake becomes one sentence and an exit code instead of a traceback.

    Args:
        argv: the words of the command line; those of this process if not given.
        interrupted: what the sentence says after Ctrl-C, unless the exception has an attribute of this name.
    """
    words = sys.argv if argv is None else argv
    try:
        from .streams import escape_unknown_characters, lost_output, make_streams_last

        if argv is None:
            make_streams_last()
        escape_unknown_characters()
        code = _run(command, words, is_process=argv is None)
        if code or not (lost := lost_output()):
            return code
        if isinstance(lost, BrokenPipeError):  # whoever read it, such as `head`, has seen enough
            return 141  # as of a process that SIGPIPE has ended
        return _complain(f"the work is done, but standard output cannot be written: {lost.strerror}", words, 141)
    except KeyboardInterrupt as error:  # imports nothing: an import may be what was interrupted
        sentence = f"{str(error) or 'interrupted'}; {getattr(error, 'interrupted', interrupted)}"
        return _complain(sentence, words, 128 + getattr(error, "signal", 2))


def _run(command, words: list[str], is_process: bool) -> int:
    import logging
    import os
    import traceback

    from ..provenance import redact_record, redacted
    from .flags import UsageError, calm_libraries

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(redact_record)
    if is_process:
        sys.excepthook = lambda *error: print(redacted("".join(traceback.format_exception(*error))), file=sys.stderr)
    if "transformers" in sys.modules:  # a script that imported it before it came here
        calm_libraries()

    def one_sentence(error) -> str:
        return redacted(" ".join(str(error).split()))

    try:
        command()
    except SystemExit as stop:  # of argparse, after it has printed a help
        return stop.code or 0
    except UsageError as error:
        return _complain(one_sentence(error), words, 2)
    except Exception as error:
        from huggingface_hub.errors import (
            HTTPError,  # of httpx, whichever it uses
            LocalTokenNotFoundError,
            StrictDataclassError,
        )
        from safetensors import SafetensorError

        from ..hub.client import explain

        loop = sys.modules.get("hf_vaeplus.training.loop")  # without it nothing has been trained
        if loop is not None and isinstance(error, loop.TrainingDiverged):
            return _complain(one_sentence(error), words, 3)
        if isinstance(error, RuntimeError) and os.path.expanduser("~") == "~" and "home" in str(error):  # of pathlib
            error = OSError(
                "a library needs a home folder, and this user has none: set HOME, or HF_HOME for the Hub's"
            )
        mistakes = ValueError, TypeError, OSError, HTTPError, SafetensorError, StrictDataclassError
        if "--debug" in words or not isinstance(error, mistakes):
            raise
        if isinstance(error, HTTPError | LocalTokenNotFoundError):
            error = explain(error)
        return _complain(one_sentence(error), words, 2)
    finally:
        logging.disable(logging.NOTSET)  # --quiet is for one command, not for all that this process runs later
    return 0


def _complain(sentence: str, words: list[str], code: int) -> int:
    print(f"vaeplus: error: {sentence}", file=sys.stderr)
    if "--json" in words:
        import json

        print(json.dumps({"error": sentence}))
    return code


def _dispatch(argv):
    import contextlib
    import json

    from ..provenance import redacted
    from . import flags

    args = build_parser().parse_args(argv)
    if args.run is not _completion:
        flags.calm_libraries()
    standard_output, as_json = sys.stdout, getattr(args, "json", False)

    def print_json(found: dict):
        if as_json:
            print(redacted(json.dumps(found)), file=standard_output, flush=True)

    args.print_json = print_json
    flags.written.clear()
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            found = args.run(args)
    except KeyboardInterrupt as error:
        if hasattr(args, "interrupted"):
            error.interrupted = args.interrupted
        elif flags.written:
            error.interrupted = f"files written before that: {len(flags.written)}, the last is {flags.written[-1]}"
        raise
    if found is not None:  # of the main process, where there are several
        print_json(found)


def build_parser():
    """The parser of `vaeplus`; what it parses has a `run` that takes the result and returns what `--json` prints."""
    from ..version import __version__
    from .demo import add_demo
    from .diagnose import add_diagnose
    from .evaluate import add_evaluate
    from .flags import CommandParser
    from .inference import add_interpolate, add_reconstruct, add_sample
    from .publish import add_card, add_encode, add_export, add_push
    from .score import add_score
    from .train import add_quickstart, add_train

    parser = CommandParser(
        prog="vaeplus",
        description="VAE+: train a generative autoencoder in three stages, then sample from it in one pass.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"vaeplus {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_quickstart,
        add_train,
        add_evaluate,
        add_diagnose,
        add_sample,
        add_reconstruct,
        add_interpolate,
        add_score,
        add_encode,
        add_card,
        add_export,
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

    kinds = dict.fromkeys(("output", "images", "config", "evaluation", "train_data_files", "labels"), shtab.FILE)
    folders = ("pipeline", "source", "run_dir", "output_dir", "folder", "train_data_dir", "cache_dir")
    kinds |= dict.fromkeys(folders, shtab.DIRECTORY)
    parser = build_parser()
    (commands,) = (action for action in parser._actions if action.dest == "command")
    for command in commands.choices.values():
        for action in command._actions:
            if action.dest in kinds:
                action.complete = kinds[action.dest]
    print(shtab.complete(parser, args.shell))
