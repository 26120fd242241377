"""The command line for programs and shells: `--json`, exit codes, examples in every help, completion.

And the machine that it runs on: readers and terminals that go away, locales, homes, and permissions of files.
"""

import contextlib
import errno
import io
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yaml
from helpers import TINY, captured, encoded, fit, forkserver, make_pipeline, noise, run

from hf_vaeplus.cli.main import build_parser, main, run_command
from hf_vaeplus.data.sources import cache_folder
from hf_vaeplus.evaluation.features import open_extractor
from hf_vaeplus.training.checkpoints import list_checkpoints
from hf_vaeplus.training.options import StageOptions, load_preset

PIPE = "home/pipeline"
pytestmark = pytest.mark.usefixtures("working_folder")

# ------------------------------------------------------------------------------------------------------------ JSON

JSON = {
    "sample": (
        f"sample {PIPE} --num_images 3 --seed 7 --temperature 0.5",
        {
            "files": ["samples.png"],
            "num_images": 3,
            "seed": 7,
            "temperature": 0.5,
            "sharpness": 0.0,
            "deterministic": False,
            "num_inference_steps": None,
        },
    ),
    "separate samples": (
        f"sample {PIPE} --num_images 2 --separate",
        {"files": ["samples/000000.png", "samples/000001.png"], "num_images": 2, "seed": 0},
    ),
    "reconstruct": (
        f"reconstruct {PIPE} home/0.png home/1.png --output new/pairs.png",
        {"files": ["new/pairs.png"], "num_images": 2, "sharpness": 0.0, "deterministic": True},
    ),
    "interpolate": (
        f"interpolate {PIPE} home/0.png home/1.png --steps 4",
        {"files": ["interpolation.png"], "steps": 4},
    ),
    "encode": (
        f"encode {PIPE} --dataset_name digits --max_images 40",
        {"files": ["latents.parquet"], "num_images": 40, "latent_dim": 4, "split": "train"},
    ),
}


@pytest.mark.parametrize("command, expected", JSON.values(), ids=JSON)
def test_json_is_all_that_goes_to_standard_output(command, expected):
    code, output, _ = run(*command.split(), "--json")
    assert code == 0 and output.count("\n") == 1
    found = json.loads(output)
    assert found.items() >= {**expected, "pipeline": PIPE}.items()
    assert all(Path(file).is_file() for file in found["files"])


def test_evaluate_gives_its_file_as_one_line():
    command = f"evaluate {PIPE} --dataset_name digits --max_images 40 --num_images 8 --json"
    code, output, errors = run(*command.split())
    assert code == 0 and output.count("\n") == 1
    assert json.loads(output) == json.loads(Path("results.json").read_text())
    assert "saved in results.json" in errors  # the table is for people


@pytest.mark.parametrize(
    "command",
    [
        "sample /nowhere --json",  # of the input
        "--json",  # of argparse, at the top
        f"sample {PIPE} --json --num_images many",  # of argparse, in a command
        f"sample {PIPE} --json --debug --num_images many",  # whose traceback would not help
        "card home somebody/something --json",
        "quickstart --json --seed -1",
        "demo /nowhere --json --port 99999",
    ],
)
def test_a_mistake_is_json_as_well(command):
    code, output, errors = run(*command.split())
    assert code == 2 and output.count("\n") == errors.count("\n") == 1
    assert errors == f"vaeplus: error: {json.loads(output)['error']}\n"
    assert list(json.loads(output)) == ["error"]


def test_an_interruption_is_json_as_well(monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_vaeplus.cli.inference.load_pipeline", interrupted)
    code, output, _ = run("sample", PIPE, "--json")
    assert code == 130 and "interrupted" in json.loads(output)["error"]


# ------------------------------------------------------------------------------------------------------------ help


def commands() -> dict:
    """Name -> parser of every command."""
    return next(action.choices for action in build_parser()._actions if action.dest == "command")


@pytest.mark.parametrize("name", commands())
def test_the_help_of_every_command_has_examples_that_parse(name):
    code, output, _ = run(name, "--help")
    assert code == 0 and re.search("^examples?:$", output, re.MULTILINE)
    lines = re.split("^examples?:\n", output, flags=re.MULTILINE)[1].splitlines()
    examples = [shlex.split(re.sub(" > .*", "", line)) for line in lines if "vaeplus" in line]
    assert examples
    for example in examples:
        words = example[example.index("hf_vaeplus.cli" if "hf_vaeplus.cli" in example else "vaeplus") + 1 :]
        assert words[0] == name
        build_parser().parse_args(words)


def test_the_help_of_training_groups_its_options():
    code, output, _ = run("train", "--help")
    titles = re.findall(r"^(\w[\w ]*):$", output, re.MULTILINE)
    wanted = ["run", "optimisation", "checkpoints", "logging", "speed", "Hub", "data", "stages and models", "examples"]
    assert [title for title in titles if title != "options"] == wanted
    data = output.split("\ndata:\n")[1].split("\n\n")[0]
    assert re.findall(r"^  --(\w+)", data, re.MULTILINE)[0] == "dataset_name" and "--cache_dir" in data
    assert not re.search("learning_rate|hub_model_id|kl_warmup_steps", data)


def test_the_help_documents_the_exit_codes_and_json():
    _, output, _ = run("--help")
    assert re.findall(r"^  (\d+) +\w", output, re.MULTILINE) == ["0", "2", "3", "129", "141"]
    assert re.search('--json.*one JSON object.*{"error"', output, re.DOTALL)


# ------------------------------------------------------------------------------------------------------ completion

COMPLETE = """
source {script}
complete -p vaeplus || exit 1
COMP_WORDS=({words} "$1")
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
COMP_LINE="${{COMP_WORDS[*]}}" COMP_POINT=${{#COMP_LINE}}
COMPREPLY=()
_shtab_vaeplus
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    "words, begun, expected",
    [
        ("vaeplus", "sam", {"sample"}),
        ("vaeplus", "", set(commands())),
        ("vaeplus encode", "--push", {"--push_to_hub"}),
        ("vaeplus completion", "", {"bash", "zsh"}),
        ("vaeplus sample", "ho", {"home"}),  # a folder
        ("vaeplus reconstruct home/pipeline", "home/0", {"home/0.png"}),  # a file
    ],
)
def test_bash_completes(words, begun, expected, tmp_path):
    code, script, _ = run("completion", "bash")
    assert code == 0
    (tmp_path / "script").write_text(script)
    shell = COMPLETE.format(script=tmp_path / "script", words=words)
    found = subprocess.run(["bash", "-c", shell, "bash", begun], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    first, *replies = found.stdout.splitlines()
    assert first.endswith(" vaeplus")
    assert {reply.rstrip("/") for reply in replies} == expected


def test_zsh_gets_a_script_of_its_own():
    code, script, _ = run("completion", "zsh")
    assert code == 0 and script.startswith("#compdef vaeplus")
    assert all(f"{name}:" in script for name in commands())


# ----------------------------------------------------------------------------------------- readers that go away


@pytest.mark.parametrize(
    "command, told",
    [
        ("completion bash | true", ""),
        ("--help | true", ""),
        ("train --help >&-", "Bad file descriptor"),
        ("completion zsh > /dev/full", "No space left on device"),
    ],
)
def test_a_result_that_nobody_reads_is_no_success(command, told):
    words = f"set -o pipefail; {sys.executable} -m hf_vaeplus.cli {command}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    expected = f"vaeplus: error: the work is done, but standard output cannot be written: {told}\n" if told else ""
    assert (done.returncode, done.stderr) == (141, expected)


def _command(folder, argv, streams, terminal=None, ignored=None):
    """`vaeplus ARGV` as a process of its own, with a pipe or a terminal for some of its streams."""
    os.chdir(folder)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup
    if ignored:
        signal.signal(ignored, signal.SIG_IGN)
    if terminal:
        os.setsid()
        descriptor = os.open(terminal, os.O_RDWR)  # the terminal of this session from now on
    else:
        descriptor = streams[0].fileno()
    for number in (1, 2):
        os.dup2(descriptor if number in streams[1] else os.open(os.devnull, os.O_WRONLY), number)
    streams[0].close()
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # as at the start of a process
    sys.argv = ["vaeplus", *argv]
    sys.exit(main())


def _left_alone(folder, argv, numbers, at_once=False) -> int:
    """The exit code of a command whose reader of streams `numbers` goes away: at once, or after the first byte."""
    reader, writer = forkserver().Pipe(duplex=False)
    process = forkserver().Process(target=_command, args=(folder, argv, (writer, numbers)))
    process.start()
    writer.close()
    if not at_once:
        os.read(reader.fileno(), 1)
    reader.close()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("numbers, code", [((2,), 0), ((1, 2), 141)])
def test_training_goes_on_without_its_reader(numbers, code, home, working_folder):
    (working_folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    assert _left_alone(working_folder, "train --config tiny.yaml --output_dir run".split(), numbers) == code
    assert (working_folder / "run" / "pipeline" / "model_index.json").is_file()
    assert (working_folder / "run" / "summary.json").is_file()


@pytest.mark.parametrize("command, file", [("sample home/pipeline --num_images 2 --json", "samples.png")])
def test_a_command_that_prints_what_it_did(command, file, working_folder):
    """Its warnings and its result go to one pipe, which nobody reads."""
    assert _left_alone(working_folder, command.split(), (1, 2), at_once=True) == 141
    assert (working_folder / file).is_file()


@pytest.mark.parametrize("ignored, code", [(None, 128 + signal.SIGHUP), (signal.SIGHUP, 141)], ids=["plain", "nohup"])
def test_a_terminal_that_is_closed(ignored, code, working_folder):
    """Training saves; under nohup it goes on to its end."""
    steps = 3 if ignored else 100_000
    preset = TINY | {"common": TINY["common"] | {"max_train_steps": steps, "checkpointing_steps": 100_000}}
    (working_folder / "tiny.yaml").write_text(yaml.safe_dump(preset))
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    reader, writer = forkserver().Pipe(duplex=False)
    argv = "train --config tiny.yaml --output_dir run".split()
    arguments = working_folder, argv, (writer, (1, 2)), os.ttyname(theirs), ignored
    process = forkserver().Process(target=_command, args=arguments)
    process.start()
    seen = b""
    while b"it/s" not in seen:  # it trains
        seen += os.read(ours, 1000)
    os.close(theirs)
    os.close(ours)
    process.join()
    assert process.exitcode == code
    if ignored:
        assert (working_folder / "run" / "pipeline" / "model_index.json").is_file()
    else:
        (checkpoint,) = list_checkpoints(working_folder / "run" / "autoencoder")
        assert 0 < int(checkpoint.name.removeprefix("checkpoint-")) < steps


class Unwritable(io.StringIO):
    """A stream that takes so many pieces of text and fails then."""

    def __init__(self, number, pieces):
        super().__init__()
        self.number, self.pieces = number, pieces

    def write(self, text):
        self.pieces -= 1
        if self.pieces < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("pieces", [0, 5])
def test_the_loop_goes_on_without_its_bar(number, pieces, tmp_path, reference):
    with contextlib.redirect_stderr(Unwritable(number, pieces)):
        fit(tmp_path / "run")
    for name in ("model.safetensors", "stats.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (reference / name).read_bytes()


def test_a_broken_connection_is_no_reader_that_has_seen_enough():
    def command():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    code, _, errors = captured(lambda: run_command(command, []))
    assert code == 2 and "Broken pipe" in errors


# -------------------------------------------------------------------------------------- characters and locales


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("name", ["\u00fcber.png", "\u753b.png", os.fsdecode(b"\xff.png")])
def test_a_terminal_takes_every_name(encoding, name, working_folder, monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), encoding))
    codes = [main(["sample", PIPE, "--num_images", "2", "--output", name, *words]) for words in ([], ["--json"])]
    assert codes == [0, 2]  # the second refuses to replace the file
    found = {}
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        found[stream] = stream.buffer.getvalue().decode(encoding)
    assert found[sys.stdout].startswith("saved ") and name in json.loads(found[sys.stdout].splitlines()[1])["error"]
    assert found[sys.stderr].startswith("vaeplus: error: ")


NO_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    "command",
    [
        "sample {}",
        "evaluate {} --dataset_name digits",
        "interpolate {} home/0.png home/1.png",
        "encode {} --dataset_name digits",
        "encode home/pipeline --dataset_name digits --output {}",
        "encode home/pipeline --dataset_name digits --output {}.parquet",
        "export {} new",
        "export home/pipeline {}",
        "push {} somebody/faces",
        "card {} somebody/faces",
        "demo {}",
        "train --config home/tiny.yaml --output_dir {}",
    ],
)
def test_paths_of_weights_and_tables_that_are_no_utf8_are_refused(command, working_folder):
    if "--output" not in command:
        (working_folder / NO_UTF8).symlink_to("home/pipeline")
    before = sorted(os.listdir())
    code, _, errors = run(*(word.format(NO_UTF8) for word in command.split()))
    assert code == 2 and errors.count("\n") == 1 and "must be spelt in UTF-8" in errors
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("folder", ["pictures", NO_UTF8])
def test_pictures_of_names_that_are_no_utf8(folder, working_folder):
    (working_folder / folder).mkdir()
    names = [f"{folder}/{number}{NO_UTF8}.png" for number in range(4)]
    for number, name in enumerate(names):
        (working_folder / name).write_bytes(encoded(noise(number, 40)))
    for command in (
        ["reconstruct", PIPE, names[0], "--output", f"new/{NO_UTF8}.png"],
        ["reconstruct", PIPE, folder],
        ["interpolate", PIPE, *names[1:3], "--output", f"{NO_UTF8}/new/1.png"],
        ["sample", PIPE, "--num_images", "2", "--separate", "--output", f"{NO_UTF8}/separate"],
        ["encode", PIPE, "--train_data_dir", folder],
        ["evaluate", PIPE, "--train_data_dir", folder, "--num_images", "4", "--output", f"new/{NO_UTF8}.json"],
    ):
        code, output, errors = run(*command, "--json")
        assert code == 0, errors
        assert all(Path(file).exists() for file in json.loads(output).get("files", []))
    assert (working_folder / "new" / f"{NO_UTF8}.json").is_file()


# Neither a home nor a locale, and a mask that gives the group all rights: as in a container that is started wrongly.
BARE = """
import os, pwd, sys
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
os.umask(0o002)
from hf_vaeplus.cli.main import main
sys.exit(main())
"""


def test_a_process_without_home_and_locale(working_folder):
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "HF_HOME")}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HF_HUB_OFFLINE": "1"}
    preset = TINY | {"common": TINY["common"] | {"train_data_dir": "Bilder \u00fc", "num_channels": 3}}
    del preset["common"]["dataset_name"]
    (working_folder / "preset.yaml").write_text(yaml.safe_dump(preset, allow_unicode=True), encoding="utf-8")
    (working_folder / "Bilder \u00fc").mkdir()
    for number in range(6):
        (working_folder / "Bilder \u00fc" / f"{number}.png").write_bytes(encoded(noise(number, 40)))
    command = [sys.executable, "-c", BARE, "train", "--config", "preset.yaml", "--output_dir", "L\u00e4ufe", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="ascii")
    assert done.returncode == 0, done.stderr
    assert all(Path(os.fsdecode(os.fsencode(file))).exists() for file in json.loads(done.stdout)["files"])
    assert not list(working_folder.rglob("~"))
    assert not _other_modes(working_folder / "L\u00e4ufe", 0o002)


def test_cards_of_names_that_a_locale_cannot_read(finished_run, tmp_path):
    told = {"\u00a9 M\u00fcller": "\u00a9 M\u00fcller", os.fsdecode(b"by \xff"): "by \\\\xff"}
    for licence, expected in told.items():
        ascii_locale = licence.encode(errors="surrogateescape").decode("ascii", "surrogateescape")
        for words in (licence, ascii_locale):
            command = ["card", str(finished_run), "me/x", "--data_license", words, "--output", str(tmp_path)]
            assert run(*command)[0] == 0
            assert expected.replace("\\\\", "\\") in (tmp_path / "README.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- home folders


@pytest.fixture
def at_home(working_folder, monkeypatch) -> Path:
    """A home of its own that shows what `home` holds, and the user `vaeplus-user` who has it as well."""
    own = working_folder / "own"
    own.mkdir()
    for path in (working_folder / "home").iterdir():
        (own / path.name).symlink_to(path)
    monkeypatch.setenv("HOME", str(own))
    entry = pwd.struct_passwd(("vaeplus-user", "x", 1, 1, "", str(own), "/bin/sh"))
    monkeypatch.setattr("pwd.getpwnam", {"vaeplus-user": entry}.__getitem__)
    return own


HOMES = ("~", "~vaeplus-user")
PATHS = {"pipeline", "folder", "run_dir", "output", "output_dir", "images", "config", "evaluation"}


@pytest.mark.parametrize("tilde", HOMES)
def test_every_path_of_the_command_line_may_begin_at_home(tilde, at_home):
    """Those that become fields of StageOptions are expanded there."""
    stage_paths = {name for name, entry in StageOptions.__dataclass_fields__.items() if entry.metadata.get("is_path")}
    assert stage_paths >= {"train_data_dir", "train_data_files", "cache_dir", "autoencoder", "vae", "output_dir"}
    found = set()
    for name, parser in commands().items():
        for action in parser._actions:
            if action.dest in PATHS and not (name == "train" and action.dest == "images"):
                assert action.type(f"{tilde}/x") == str(at_home / "x"), (name, action.dest)
                found.add(action.dest)
    assert found == PATHS


@pytest.mark.parametrize("tilde", HOMES)
def test_options_and_presets_may_begin_at_home(tilde, at_home, monkeypatch):
    folders = {
        name: f"{tilde}/{name}" for name in ("output_dir", "cache_dir", "train_data_dir", "resume_from_checkpoint")
    }
    options = StageOptions(stage="autoencoder", **folders)
    assert {name: getattr(options, name) for name in folders} == {name: str(at_home / name) for name in folders}
    options = StageOptions(stage="second_stage", vae=f"{tilde}/vae", autoencoder="org/name")
    assert (options.vae, options.autoencoder) == (str(at_home / "vae"), "org/name")
    options.train_data_files = [f"{tilde}/*.parquet", Path(tilde, "b")]
    assert options.train_data_files == [str(at_home / "*.parquet"), str(at_home / "b")]
    assert load_preset(f"{tilde}/tiny.yaml") == TINY
    monkeypatch.setenv("VAEPLUS_CACHE", f"{tilde}/cache")
    assert cache_folder(None) == cache_folder(f"{tilde}/cache") == at_home / "cache"
    with pytest.raises(FileNotFoundError, match=str(at_home / "net.onnx")):
        open_extractor(f"{tilde}/net.onnx", "cpu")


def test_commands_find_what_is_at_home(at_home, working_folder):
    assert run("sample", "~/pipeline", "--num_images=2", "--output=~/new/a.png")[0] == 0
    assert run("reconstruct", "~/pipeline", "~/0.png", "~vaeplus-user/1.png", "--output=~/new/b.png")[0] == 0
    small = ["--set", "common.max_train_steps=1", "common.cache_dir=~/cache"]
    code, _, errors = run("train", "--config", "~/tiny.yaml", "--output_dir=~/new/run", *small)
    assert code == 0, errors
    assert {path.name for path in (at_home / "new").iterdir()} == {"a.png", "b.png", "run"}
    assert not list(working_folder.glob("~*"))


def test_the_home_of_nobody(at_home, working_folder):
    for command in (
        "sample ~nobody/pipeline",
        f"sample {PIPE} --output=~nobody/a.png",
        "train --config ~nobody/a.yaml",
    ):
        code, _, errors = run(*command.split())
        assert code == 2 and "needs the home of a user nobody, and there is none" in errors
    with pytest.raises(ValueError, match="^~nobody/cache needs the home of a user nobody"):
        StageOptions(cache_dir="~nobody/cache")
    (working_folder / "~mine").mkdir()
    assert run("sample", PIPE, "--num_images=2", "--output=~mine/a.png")[0] == 0
    assert (working_folder / "~mine" / "a.png").is_file()


@pytest.mark.parametrize(
    "command",
    [f"evaluate {PIPE} --dataset_name digits", "sample ~/pipeline", "train --config tiny.yaml --output_dir ~/run"],
)
def test_no_home_is_one_sentence(command, working_folder, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("VAEPLUS_CACHE")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    code, _, errors = run(*command.split())
    assert code == 2 and errors.count("\n") == 1 and "this user has none: set HOME" in errors
    assert not list(working_folder.glob("~*"))


# --------------------------------------------------------------------------------------------------- permissions


def _other_modes(folder: Path, umask: int) -> dict:
    """Files and folders whose permissions are not those of what a plain program makes."""
    modes = {path: path.stat().st_mode & 0o777 for path in folder.rglob("*")}
    return {path: oct(mode) for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask}


@pytest.fixture(params=[0o022, 0o002, 0o027], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_models_that_python_saves_follow_the_umask(umask, tmp_path):
    pipe, folder = make_pipeline(), tmp_path / "saved"
    pipe.vae.save_pretrained(folder / "whole")
    pipe.autoencoder.save_pretrained(folder / "shards", max_shard_size="2KB")
    pipe.save_pretrained(folder / "pipeline", variant="ema")
    assert len(list(folder.rglob("*.safetensors"))) > 5
    assert not _other_modes(folder, umask)


def test_runs_caches_and_results_follow_the_umask(umask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAEPLUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    data = "--dataset_name digits --max_images 40"
    for command in (
        "train --config tiny.yaml --output_dir run --use_ema",
        "card run me/x",
        "export run/pipeline exported --weights bf16",
        f"evaluate run/pipeline {data} --num_images 20 --ndb 4 --ndb_images 40",
        f"encode run/pipeline {data} --output file.parquet",
        f"encode run/pipeline {data} --output folder",
        "sample run/pipeline --num_images 2",
    ):
        code, _, errors = run(*command.split())
        assert code == 0, errors
    for path in ("cache", "run", "exported", "folder"):
        assert not _other_modes(tmp_path / path, umask)
