"""Starts processes in which the simulated accelerator is the device."""

import json
from pathlib import Path

from helpers import Launched
from mistakes import MISTAKES, TWO

SCENARIOS = [
    "stages", "image_error", "second_stage", "streaming", "wasserstein", "resume", "divergence", "evaluate", "encode",
    "pipeline", "demo",
]  # fmt: skip
OF_ONE = [name for name, mistake in MISTAKES.items() if TWO not in mistake.scenarios]
OF_TWO = [name for name, mistake in MISTAKES.items() if TWO in mistake.scenarios]


def alone(folder: Path, scenarios: list[str], mistakes: list[str] = OF_ONE) -> dict:
    """What one process found, see `scenarios.run`. The first scenario must be `stages`."""
    return _launched(1, folder, None, scenarios, mistakes)


def together(folder: Path, home: Path, mistakes: list[str] = OF_TWO) -> dict:
    """What two processes found; `home` is the folder of a process alone."""
    return _launched(2, folder, home, [TWO], mistakes)


def _launched(number: int, folder: Path, *arguments) -> dict:
    environment = {
        "ACCELERATE_USE_CPU": "false",
        "ACCELERATE_TORCH_DEVICE": "simgpu",
        "VAEPLUS_CACHE": str(folder.parent / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    folder.mkdir()
    result = folder / "result.json"
    run = Launched(number, folder / "log", environment, _process, number, folder, *arguments, result)
    try:
        if not run.ended_within(300):
            raise RuntimeError(f"the processes did not end: {run.log.read_text()[-3000:]}")
    finally:
        run.kill()
    return json.loads(result.read_text())


def _process(number: int, *arguments):
    if number == 2:
        import simccl  # noqa: F401
    import scenarios

    scenarios.run(*arguments)
