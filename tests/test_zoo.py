"""The models of model_cards/: each loads from a clone, draws its card's picture, and has the numbers of results/."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import run
from PIL import Image

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.evaluation.tables import results_table
from hf_vaeplus.hub.cards import figures
from hf_vaeplus.hub.repository import export
from hf_vaeplus.pictures import image_grid

ROOT = Path(__file__).parents[1]
# Folder of model_cards/ -> folder of results/ with its summary.json and, where it was evaluated, evaluation.json.
MODELS = {"vaeplus-celeba128": "celeba128", "vaeplus-drawings": "drawings"}


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Path:
    return ROOT / "model_cards" / request.param


def test_every_model_of_the_zoo_is_tested():
    assert {path.parent.name for path in (ROOT / "model_cards").glob("*/model_index.json")} == set(MODELS)


def test_it_draws_the_samples_of_its_card(model):
    """Of 64 in the picture, as they were drawn before the weights were rounded to bf16: within two grey levels."""
    pipe = VAEPlusPipeline.from_pretrained(model)
    summary = json.loads((ROOT / "results" / MODELS[model.name] / "summary.json").read_text())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(64, generator=torch.Generator().manual_seed(summary["seed"]), output_type="pt").images
    size = pipe.image_shape[1]
    drawn, shown = (np.asarray(each, np.float64) for each in (
        image_grid(images, scale=max(1, 64 // size)), Image.open(model / "samples.png")))  # fmt: skip
    assert drawn.shape == shown.shape and shown.std() > 20
    assert np.abs(drawn - shown).mean() < 2


def test_it_draws_the_same_without_the_package(model, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path))
    pipe, theirs = (loader.from_pretrained(model, **trust) for loader, trust in (
        (VAEPlusPipeline, {}), (DiffusionPipeline, {"trust_remote_code": True})))  # fmt: skip
    images = [each(2, generator=torch.Generator().manual_seed(5), output_type="pt").images for each in (pipe, theirs)]
    assert torch.equal(*images)


def test_its_card_has_the_numbers_of_results(model):
    results, card = ROOT / "results" / MODELS[model.name], (model / "README.md").read_text()
    for name, value in figures(json.loads((results / "summary.json").read_text())):
        assert f"| {name} | {value} |" in card
    if (results / "evaluation.json").exists():
        assert results_table(json.loads((results / "evaluation.json").read_text())).replace("`", "'") in card


def test_its_code_is_that_of_the_package_and_it_is_small(model, tmp_path):
    export(VAEPlusPipeline.from_pretrained(model), tmp_path)
    code = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.py")]
    assert sorted(code) == sorted(path.relative_to(model) for path in model.rglob("*.py"))
    for name in code:
        assert (model / name).read_bytes() == (tmp_path / name).read_bytes()
    for exported in model.glob("*.py"):
        source = {"pipeline.py": "pipeline_vaeplus.py"}.get(exported.name, exported.name)
        assert exported.read_bytes() == (ROOT / "hf_vaeplus" / source).read_bytes()
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) < 40e6


def test_push_publishes_it_byte_for_byte(model, hub):
    (repo_id,) = set(re.findall(r'VAEPlusPipeline.from_pretrained\("([^"]+)"', (model / "README.md").read_text()))
    assert run("push", str(model), repo_id)[0] == 0
    files = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert hub[repo_id].files() == {name: content for name, content in files.items() if "__pycache__" not in name}


def test_the_demo_opens_the_faces_without_being_told(monkeypatch, tmp_path):
    opened = []
    pytest.importorskip("gradio")
    from hf_vaeplus import demo

    monkeypatch.setattr(demo, "serve", lambda page, **options: None)
    monkeypatch.setattr("hf_vaeplus.cli.demo.load_pipeline", lambda args: opened.append(args.pipeline))
    monkeypatch.setattr(demo, "build_demo", lambda pipe, directions, known: None)
    monkeypatch.chdir(ROOT)
    assert run("demo")[0] == 0 and opened == ["model_cards/vaeplus-celeba128"]
    monkeypatch.chdir(tmp_path)
    code, _, errors = run("demo")
    assert code == 2 and "run this in a clone of the project" in errors
