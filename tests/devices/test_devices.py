"""The package on the simulated accelerator of simgpu.cpp: what it does there, and that mistakes would be noticed.

All runs in two starts, of one and of two processes: the device changes PyTorch for a whole process.
"""

import importlib.util
import shutil
from pathlib import Path

import launching
import pytest
import torch
from mistakes import MISTAKES, TWO
from packaging.version import Version

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the simulated accelerator needs the compiler g++"),
    pytest.mark.skipif(
        Version(torch.__version__) < Version("2.13"), reason="the simulated accelerator is written for PyTorch 2.13"
    ),
]
HAS_DEMO = importlib.util.find_spec("gradio") is not None


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="session")
def alone(folder) -> dict:
    return launching.alone(folder / "alone", [name for name in launching.SCENARIOS if name != "demo" or HAS_DEMO])


@pytest.fixture(scope="session")
def together(folder, alone) -> dict:
    return launching.together(folder / "together", folder / "alone")


@pytest.mark.parametrize("name", launching.SCENARIOS)
def test_the_package_works_on_a_device(alone, name):
    if name == "demo" and not HAS_DEMO:
        pytest.skip("gradio is not installed (extra demo)")
    assert alone["scenarios"][name] is None


def test_two_processes_send_what_nccl_takes_and_agree(together):
    assert together["scenarios"][TWO] is None


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(request, name):
    found = request.getfixturevalue("alone" if name in launching.OF_ONE else "together")
    assert found["mistakes"][name], f"nobody notices that {MISTAKES[name].what}"


def test_no_step_waits_for_the_device(alone):
    assert {stage: counts["waits"] for stage, counts in alone["steps"].items()} == dict.fromkeys(alone["steps"], 0)
