"""The package on the simulated accelerator of simgpu.cpp: what it does there, and that mistakes would be noticed.

All runs in two starts, of one and of two processes: the device changes PyTorch for a whole process.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from helpers import Launched
from mistakes import MISTAKES, TWO

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the simulated accelerator needs the compiler g++")
SCENARIOS = [
    "stages", "image_error", "second_stage", "streaming", "wasserstein", "resume", "divergence", "evaluate", "encode",
    "pipeline", "demo",
]  # fmt: skip
HAS_DEMO = importlib.util.find_spec("gradio") is not None


def of_two(name: str) -> bool:
    return TWO in MISTAKES[name].scenarios


def _single(*arguments):
    import scenarios

    scenarios.single(*arguments)


def _pair(*arguments):
    import scenarios
    import simccl  # noqa: F401

    scenarios.single(*arguments)


def _launched(number: int, target, folder: Path, *arguments) -> dict:
    environment = {
        "ACCELERATE_USE_CPU": "false",
        "ACCELERATE_TORCH_DEVICE": "simgpu",
        "VAEPLUS_CACHE": str(folder.parent / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    folder.mkdir()
    run = Launched(number, folder / "log", environment, target, folder, *arguments, folder / "result.json")
    try:
        assert run.ended_within(300), run.log.read_text()[-3000:]
    finally:
        run.kill()
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="session")
def alone(home) -> dict:
    names = [name for name in SCENARIOS if name != "demo" or HAS_DEMO]
    return _launched(1, _single, home / "alone", None, names, [name for name in MISTAKES if not of_two(name)])


@pytest.fixture(scope="session")
def together(home, alone) -> dict:
    return _launched(2, _pair, home / "pair", home / "alone", [TWO], [name for name in MISTAKES if of_two(name)])


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_package_works_on_a_device(alone, name):
    if name == "demo" and not HAS_DEMO:
        pytest.skip("gradio is not installed (extra demo)")
    assert alone["scenarios"][name] is None


def test_two_processes_send_what_nccl_takes_and_agree(together):
    assert together["scenarios"][TWO] is None


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(request, name):
    found = request.getfixturevalue("together" if of_two(name) else "alone")
    assert found["mistakes"][name], f"nobody notices that {MISTAKES[name].what}"


def test_no_step_waits_for_the_device(alone):
    assert {stage: counts["waits"] for stage, counts in alone["steps"].items()} == dict.fromkeys(alone["steps"], 0)
