"""The command line for programs and shells: `--json`, exit codes, examples in every help, completion."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run

from hf_vaeplus.cli.main import build_parser

PIPE = "home/pipeline"
pytestmark = pytest.mark.usefixtures("working_folder")

# ------------------------------------------------------------------------------------------------------------ JSON

JSON = {
    "sample": (
        f"sample {PIPE} --num_images 3 --seed 7 --temperature 0.5",
        {"files": ["samples.png"], "num_images": 3, "seed": 7, "temperature": 0.5, "sharpness": 0.0},
    ),
    "separate samples": (
        f"sample {PIPE} --num_images 2 --separate",
        {"files": ["samples/000000.png", "samples/000001.png"], "num_images": 2, "seed": 0},
    ),
    "reconstruct": (
        f"reconstruct {PIPE} home/0.png home/1.png --output new/pairs.png",
        {"files": ["new/pairs.png"], "num_images": 2, "sharpness": 0.0},
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
    assert re.findall(r"^  (\d+) +\w", output, re.MULTILINE) == ["0", "2", "3", "130"]
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


def test_a_reader_that_has_seen_enough():
    command = f"set -o pipefail; {sys.executable} -m hf_vaeplus.cli completion bash | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and done.stdout.startswith("# AUTOMATICALLY")
