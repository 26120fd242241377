"""Model cards: filled from a run, valid for the Hub, with code that runs."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import code_blocks, run_code
from huggingface_hub import DatasetCard, ModelCard

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.cli.main import main
from hf_vaeplus.hub.cards import write_card
from hf_vaeplus.hub.latents import latents_card
from hf_vaeplus.training.options import STAGES

ROOT = Path(__file__).parents[1]


def test_a_card_is_valid_complete_and_its_code_runs(finished_run, tmp_path):
    evaluation = json.loads((finished_run.parent / "evaluation.json").read_text())
    path = write_card(finished_run, "somebody/digits", tmp_path, evaluation)
    text = path.read_text()
    assert not re.search(r"\{\{|\}\}|\{%|None|nan|TODO|More Information", text)
    card = ModelCard.load(path)
    assert card.data.pipeline_tag == "unconditional-image-generation" and card.data.model_name == "digits"
    metrics = {each.metric_name or each.metric_type: each.metric_value for each in card.data.eval_results}
    summary = json.loads((finished_run / "summary.json").read_text())
    assert metrics["squared-error"] == summary["squared_error"]
    frechet = evaluation["sets"]["second_stage"]["distances"]["pixels:16"]
    assert metrics[f"{frechet['distance']}, second_stage, 20 images"] == frechet["frechet"]
    assert metrics["coverage, pixels:16, second_stage, 20 images"] == frechet["prdc"]["coverage"]
    assert metrics["memorised share, pixels:16, second_stage, 20 images"] == frechet["memorised"]["share"]
    assert "nearer to one of 20 training images (train[20:])" in text
    for told in (f"{summary['squared_error']:.2f}", "CC BY 4.0", "The first 40 of them", summary["commit"], "3 x 8"):
        assert told in text
    assert sorted(each.name for each in tmp_path.iterdir()) == ["README.md", "curves.png", "samples.png"]
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", text)) == {"curves.png", "samples.png"}
    found = run_code(code_blocks(text)[0], finished_run / "pipeline")
    assert len(found["images"]) == 4 and found["nats"].isfinite().all()


def test_parameters_are_counted_without_loading(finished_run, tmp_path):
    pipe = VAEPlusPipeline.from_pretrained(finished_run / "pipeline")
    text = write_card(finished_run, "somebody/digits", tmp_path).read_text()
    for stage, title in (("autoencoder", "autoencoder"), ("vae", "first VAE"), ("second_stage", "second stage")):
        count = sum(each.numel() for each in getattr(pipe, stage).state_dict().values())
        assert f"| {title} | {count / 1e6:.2f} M | 3 x 8 |" in text


def test_text_from_outside_cannot_leave_its_place(finished_run, tmp_path):
    hostile = "free <script>alert(1)</script>\n\n| a | b |\n`code`"
    text = write_card(finished_run, "somebody/digits", tmp_path, data_license=hostile).read_text()
    assert "<script>" not in text and "\n| a | b" not in text
    assert r"Licence: free &lt;script&gt;alert(1)&lt;/script&gt; \| a \| b \| 'code'" in text


HOSTILE = "x</p><img src=//evil.invalid>`\n---\nlicense: evil\n```\n# [click](https://evil.invalid) | ![p](y)"


def outside_code(text: str) -> str:
    """A card without its header, blocks and spans of code, and its own pictures."""
    body = text.split("\n---\n", 1)[1]
    body = re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`|!\[[^\]]*\]\((samples|curves)\.png\)", "", body)


def test_hostile_text_in_every_field_is_text(finished_run, tmp_path):
    copy = shutil.copytree(finished_run, tmp_path / "run")

    def spoil(value):
        if isinstance(value, dict):  # fingerprints of weights are refused if they are not right
            return {name: each if name in ("weights", *STAGES) else spoil(each) for name, each in value.items()}
        return HOSTILE if isinstance(value, str) else value

    for path in (copy / "summary.json", *copy.glob("*/training_options.json"), *copy.glob("*/config.json")):
        path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    evaluation = spoil(json.loads((finished_run.parent / "evaluation.json").read_text()))
    for each in evaluation["protocol"]["extractors"]:
        each["extractor"] = "pixels:16"  # by which the table finds its numbers
    path = write_card(copy, "somebody/digits", tmp_path / "card", evaluation, HOSTILE, HOSTILE)
    text, card = path.read_text(), ModelCard.load(path)
    assert "evil.invalid" in text and card.data.license == HOSTILE and card.data.datasets == HOSTILE
    assert card.data.model_name == "digits" and card.data.eval_results[0].dataset_name == HOSTILE
    body = outside_code(text)
    assert "evil.invalid" in body and not re.search(r"<\w|(?<!\\)\]\(|(?<!\\)!\[|^---|^# \[", body, re.MULTILINE)
    assert body.count("\n#") == ModelCard.load(write_card(finished_run, "somebody/digits", tmp_path)).text.count("\n#")
    assert len(re.findall("^```", text, re.MULTILINE)) == 6


def test_hostile_text_in_the_card_of_latents_is_text(finished_run):
    pipe = VAEPlusPipeline.from_pretrained(finished_run / "pipeline")
    images = SimpleNamespace(name=HOSTILE)
    text = latents_card(pipe, HOSTILE, images, HOSTILE, None, 3, HOSTILE)
    assert DatasetCard(text).data.license is None
    body = outside_code(text)
    assert "evil.invalid" in body and not re.search(r"<\w|(?<!\\)\]\(|(?<!\\)!\[|^---|^# \[", body, re.MULTILINE)
    assert len(code_blocks(text)) == 1
    compile(code_blocks(text)[0], "card", "exec")


@pytest.mark.parametrize("name", ["summary.json", "vae/config.json", "second_stage/training_options.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3", "null", '{"images": 3}', "[" * 3000, "\xff"])
def test_damaged_files_of_a_run_give_one_sentence(finished_run, tmp_path, capsys, name, content):
    copy = shutil.copytree(finished_run, tmp_path / "run")
    (copy / name).write_text(content, encoding="latin-1")
    assert main(["card", str(copy), "somebody/digits", "--output", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert re.search("holds no run that a card can tell of .* give the --output_dir of a finished", errors), errors
    assert errors.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["vae", "commit", "versions", "squared_error", "images", "command", "seed"])
@pytest.mark.parametrize("value", ["text", 3, None, [], {}])
def test_a_foreign_summary_gives_a_card_or_one_sentence(finished_run, tmp_path, capsys, field, value):
    copy = shutil.copytree(finished_run, tmp_path / "run")
    summary = json.loads((finished_run / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {field: value}))
    code = main(["card", str(copy), "somebody/digits", "--output", str(tmp_path / "out")])
    errors = capsys.readouterr().err
    assert code == 0 and not errors or code == 2 and errors.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("{run} not/a/name", "Repo id must be in the form"),
        ("{home} somebody/digits", "lacks samples.png: give the --output_dir of a finished `vaeplus train`"),
        ("{run} somebody/digits --evaluation {home}/tiny.yaml", "is no JSON"),
        ("{run} somebody/digits --evaluation {run}/summary.json", "holds no protocol: give evaluate's output"),
        ("{run} somebody/digits --evaluation {home}/none.json", "none.json"),
    ],
)
def test_mistakes(finished_run, tmp_path, capsys, arguments, message):
    command = arguments.format(run=finished_run, home=finished_run.parent).split()
    assert main(["card", *command, "--output", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors) and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pictures_of_unknown_licence_need_one(finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_vaeplus.hub.cards.CARD_FACTS", {})
    with pytest.raises(
        ValueError, match="licence of the images in 'digits' is not known: state it with --data_license"
    ):
        write_card(finished_run, "somebody/digits", tmp_path)
    text = write_card(finished_run, "somebody/digits", tmp_path, data_license="CC0.").read_text()
    assert "Licence: CC0." in text and "do not use it to identify or judge anybody" in text


CARDS = sorted(path.relative_to(ROOT / "model_cards").as_posix() for path in (ROOT / "model_cards").rglob("*.md"))
CARDS.remove("README.md")  # their list


@pytest.mark.parametrize("name", CARDS)
def test_the_code_of_the_cards_so_far_runs(finished_run, name):
    found = run_code(code_blocks((ROOT / "model_cards" / name).read_text())[0], finished_run / "pipeline")
    assert found["images"]


def test_the_command_writes_into_the_pipeline_folder(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    assert main(["card", str(run), "somebody/digits"]) == 0
    assert capsys.readouterr().out == f"saved {run / 'pipeline' / 'README.md'} and its pictures\n"
    assert "somebody/digits" in (run / "pipeline" / "README.md").read_text()
    assert VAEPlusPipeline.from_pretrained(run / "pipeline").vae.config.latent_dim == 4
    assert "torchvision" not in sys.modules
    assert main(["card", str(run), "somebody/digits", "--json"]) == 0
    files = [str(run / "pipeline" / name) for name in ("README.md", "samples.png", "curves.png")]
    assert json.loads(capsys.readouterr().out) == {"files": files, "repository": "somebody/digits"}
