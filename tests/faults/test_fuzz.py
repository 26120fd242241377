"""What once crashed is refused, and the fuzzer works; see fuzz.py."""

import importlib.util
import sys

import pytest
from PIL import Image

from faults.fuzz import CORPUS, TARGETS, fuzz


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_crashed_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    TARGETS[path.parent.name].read(tmp_path)(path.read_bytes())


def test_inputs_to_begin_with_are_those_of_a_run_without_crashes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    for name, target in TARGETS.items():
        (tmp_path / name).mkdir()
        execute = target.read(tmp_path / name)
        for content in target.seeds():
            execute(content)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs .[fuzz]")
@pytest.mark.parametrize(
    "name, crashes", [("canary", ["KeyError-fuzz"]), pytest.param("checksums", [], marks=pytest.mark.slow)]
)
def test_a_short_run(name, crashes, tmp_path):
    row = fuzz(name, 3000, 1, tmp_path / name)
    assert row["executions"] >= 3000 and row["edges"] >= row["edges_that_the_seeds_reach"] > 0
    assert [crash.rpartition("-")[0] for crash in row["crashes"]] == crashes
