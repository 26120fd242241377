"""Every client of the Hub in the tests and in the processes they start talks to a Hub on loopback alone."""

import atexit
import os
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from loopback_hub import TOKEN, LoopbackHub

assert "huggingface_hub" not in sys.modules, "it reads HF_ENDPOINT when it is imported"
_hub = LoopbackHub()
_home = tempfile.TemporaryDirectory(prefix="vaeplus-hub-")
atexit.register(_home.cleanup)
os.environ.pop("HF_HUB_OFFLINE", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers of pytest-xdist share two cores
os.environ |= {
    "HF_ENDPOINT": _hub.url,
    "HF_HOME": _home.name,
    "HF_TOKEN": TOKEN,
    "HF_HUB_DISABLE_XET": "1",  # the Hub's other protocol of transfer
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

import datasets  # noqa: E402, F401  # remembers whether it was imported offline, as some tests are
from helpers import TINY, Killed, encoded, fit, killed_at, make_pipeline, noise, run  # noqa: E402

from hf_vaeplus.data.cache import load_images  # noqa: E402


@pytest.fixture
def hub():
    """The Hub that the client talks to, empty; its faults end with the test."""
    _hub.reset()
    yield _hub
    _hub.reset()


@pytest.fixture
def no_waiting(monkeypatch):
    """The client of the Hub waits between two tries; here it does not."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with a saved pipeline, two pictures, a preset, a text file and a cache of digits.

    All tests share it, so none may write anything but caches there.
    """
    home = tmp_path_factory.mktemp("home")
    make_pipeline().save_pretrained(home / "pipeline")
    (home / "0.png").write_bytes(encoded(noise(0, 50, 40)))
    (home / "1.png").write_bytes(encoded(noise(1, 20, 20)))
    (home / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    (home / "broken.yaml").write_text("vae: [1,")
    (home / "notes.txt").write_text("not a picture")
    for changes in ({}, {"resolution": 36}, {"max_samples": 1}, {"num_channels": 3}):
        # decoded already: no progress bar before a mistake
        digits = dict(resolution=32, num_channels=1, max_samples=40) | changes
        load_images("digits", **digits, cache_dir=home / "cache", progress=False)
    before = {path.name for path in home.iterdir()}
    yield home
    assert {path.name for path in home.iterdir()} <= before | {"datasets"}


@pytest.fixture
def working_folder(home, tmp_path, monkeypatch) -> Path:
    """Commands run in an empty folder, with `home` beside it, without a network and with the cache in `home`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAEPLUS_CACHE", str(home / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "home").symlink_to(home)
    return tmp_path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a finished `vaeplus train`, with its preset, its cache and an evaluation beside it."""
    home = tmp_path_factory.mktemp("finished")
    (home / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAEPLUS_CACHE", str(home / "cache"))
        code, _, errors = run("train", "--config", str(home / "tiny.yaml"), "--output_dir", str(home / "run"))
        assert code == 0, errors
        measured = ["--dataset_name", "digits", "--num_images", "20", "--output", str(home / "evaluation.json")]
        measured += ["--max_images", "40", "--split", "train[:20]", "--training_split", "train[20:]"]
        code, _, errors = run("evaluate", str(home / "run" / "pipeline"), *measured)
        assert code == 0, errors
    return home / "run"


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    """A run of `fit` that nothing interrupts."""
    output_dir = tmp_path_factory.mktemp("reference") / "run"
    fit(output_dir, checkpoints_total_limit=10)
    return output_dir


@pytest.fixture
def interrupted(tmp_path) -> Path:
    """The same run killed in step 8: checkpoints 3 and 6 of 8 steps are there."""
    with pytest.raises(Killed):
        fit(tmp_path / "run", prepare=killed_at(7), checkpoints_total_limit=10)
    return tmp_path / "run"
