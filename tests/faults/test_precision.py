"""A short comparison of precisions in every run of the tests, the full one in the slow ones; see precision.py."""

from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from faults import precision


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VAEPLUS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("steps", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_low_precision_is_float32_within_the_tolerances(tmp_path, steps):
    rows = precision.compare(tmp_path, steps)
    assert precision.beyond_tolerance(rows) == []
    assert len(rows) == 8 and all(row.get("curve", row.get("mean_grey_levels")) > 0 for row in rows)  # it was low
    saved = load_file(tmp_path / "vae-fp16" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_weights_that_are_kept_in_bf16_are_beyond_the_tolerances(tmp_path):
    """Small updates are lost in them, which is what mixed precision avoids."""
    build_stage = precision.build_stage

    def build_in_low_precision(options):
        stage = build_stage(options)
        stage.model.to(precision.DTYPES.get(options.mixed_precision, torch.float32))
        return stage

    with mock.patch.object(precision, "build_stage", build_in_low_precision):
        rows = precision.compare(tmp_path, 40, ("bf16",), stages=("autoencoder",))
    assert precision.beyond_tolerance(rows)[0].startswith("autoencoder in bf16: curve differs by")
