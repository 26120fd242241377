"""Training pushes beside its work, and neither a slow nor a dead Hub changes the run."""

import json
import logging
import threading

import pytest
import torch
import yaml
from helpers import TINY, fit, stats_of
from huggingface_hub import ModelCard
from loopback_hub import TOKEN, Fault
from safetensors import SafetensorError
from safetensors.torch import load
from transformers import AutoModel

from hf_vaeplus import VAEPlusPipeline, VAEPlusVAEModel
from hf_vaeplus.cli.main import main
from hf_vaeplus.hub.client import BackgroundPush

REPO = "org/model"
PUSH = dict(push_to_hub=True, hub_model_id=REPO, hub_token=TOKEN)


def test_the_end_of_a_run_is_on_the_hub(hub, tmp_path):
    model = fit(tmp_path / "vae", **PUSH, hub_private_repo=True)
    files = hub[REPO].files()
    assert files.keys() == {"config.json", "model.safetensors", "training_options.json", "stats.jsonl"}
    for name, value in load(files["model.safetensors"]).items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert hub[REPO].private and hub[REPO].titles[-1] == "vae: 8 steps, the end"
    assert files["stats.jsonl"].decode() == (tmp_path / "vae" / "stats.jsonl").read_text()
    assert isinstance(AutoModel.from_pretrained(REPO, token=TOKEN), VAEPlusVAEModel)


def test_neither_token_nor_places_on_this_machine_are_pushed(hub, tmp_path):
    fit(tmp_path / "vae", **PUSH)
    everything = b"".join(hub[REPO].files().values())
    assert TOKEN.encode() not in everything and str(tmp_path).encode() not in everything
    told = json.loads(hub[REPO].files()["training_options.json"])
    assert told["max_train_steps"] == 8 and "output_dir" not in told
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 5 and not [content for content in written if TOKEN.encode() in content]


@pytest.mark.parametrize("options", [{}, {"mixed_precision": "bf16", "use_ema": False}])
def test_a_run_is_the_same_with_and_without_pushes(hub, tmp_path, options):
    pushed, plain = fit(tmp_path / "pushed", **PUSH, **options), fit(tmp_path / "plain", **options)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in pushed.state_dict().items())
    assert stats_of(tmp_path / "pushed") == stats_of(tmp_path / "plain")


@pytest.mark.parametrize("fault", [Fault(".", status=500, times=10**6), Fault(".", cut=True, times=10**6)])
def test_a_dead_hub_is_a_warning(hub, tmp_path, caplog, no_waiting, fault):
    hub.faults = [fault]
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, **PUSH)
    assert "push to org/model failed, the model is on disk; the same command, resumed, pushes it again" in caplog.text
    assert TOKEN not in caplog.text
    VAEPlusVAEModel.from_pretrained(tmp_path)
    hub.faults.clear()
    fit(tmp_path, **PUSH, resume_from_checkpoint="latest")
    assert hub[REPO].titles[-1].endswith("the end")


def snapshot(text: str):
    return lambda folder: (folder / "note.txt").write_text(text)


def test_what_fails_in_mid_run_is_tried_again_at_the_end(hub, caplog, no_waiting):
    hub.faults = [Fault("repos/create", status=500, times=6)]
    push = BackgroundPush(REPO, token=TOKEN)
    push(snapshot("early"), "step 1")
    push._thread.join()
    assert "the run goes on, and pushes again at its next checkpoint and at its end: the Hub failed" in caplog.text
    hub.faults.clear()
    assert push.finish(snapshot("late"), "end")
    assert hub[REPO].titles == ["initial commit", "end"] and hub[REPO].files()["note.txt"] == b"late"


@pytest.mark.parametrize("which", ["mkdtemp", "save_pretrained"])
def test_a_full_temporary_folder_is_a_warning(hub, tmp_path, caplog, monkeypatch, which):
    """The folder of the run is on another disk, which has room."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    real = VAEPlusVAEModel.save_pretrained

    def save(model, folder, **options):
        real(model, folder, **options)
        if tmp_path / "temporary" in folder.parents:
            raise SafetensorError("I/O error: No space left on device")

    def no_room(*args, **options):
        raise OSError(28, "No space left on device")

    if which == "mkdtemp":
        monkeypatch.setattr("hf_vaeplus.hub.client.tempfile.mkdtemp", no_room)
    else:
        monkeypatch.setattr(VAEPlusVAEModel, "save_pretrained", save)
    fit(tmp_path / "run", **PUSH)
    assert "the run goes on, and pushes again at its next checkpoint" in caplog.text
    assert "the model is on disk; the same command, resumed, pushes it again: " in caplog.text
    assert "No space left" in caplog.text and not list((tmp_path / "temporary").iterdir()) and not hub.repositories
    VAEPlusVAEModel.from_pretrained(tmp_path / "run")


def test_one_upload_at_a_time_and_the_run_does_not_wait(hub):
    held, push = threading.Event(), BackgroundPush(REPO, subfolder="vae", token=TOKEN)
    create = push._api.create_repo
    push._api.create_repo = lambda *args, **options: held.wait(30) and create(*args, **options)
    for step in (1, 2, 3):  # the first call hangs, and still all return
        push(snapshot(f"step {step}"), f"step {step}")
    held.set()
    assert push.finish(snapshot("end"), "end")
    assert hub[REPO].titles == ["initial commit", "step 1", "end"]
    assert hub[REPO].files() == {"vae/note.txt": b"end"}


def test_all_three_stages_and_the_pipeline_with_its_card(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VAEPLUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["vaeplus", "train", "--hub_token", TOKEN, f"--hub_token={TOKEN}"])
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    command = ["train", "--config", str(tmp_path / "tiny.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main([*command, "--push_to_hub", "--hub_model_id", REPO, "--hub_token", TOKEN]) == 0
    assert f"pushed to {REPO}" in capsys.readouterr().out
    files = hub[REPO].files()
    assert {f"{stage}/stats.jsonl" for stage in ("autoencoder", "vae", "second_stage")} < files.keys()
    assert {"samples.png", "curves.png", "pipeline.py", "model_index.json"} < files.keys()
    assert TOKEN.encode() not in b"".join(files.values())
    card = ModelCard(files["README.md"].decode())
    assert card.data.model_name == "model" and "UCI" in card.text
    pulled = VAEPlusPipeline.from_pretrained(REPO)
    here = VAEPlusPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    images = [each(2, torch.Generator().manual_seed(0), output_type="pt").images for each in (pulled, here)]
    assert torch.equal(*images)


def test_a_pipeline_that_cannot_be_pushed_is_saved(hub, tmp_path, monkeypatch, caplog, no_waiting):
    monkeypatch.setenv("VAEPLUS_CACHE", str(tmp_path / "cache"))
    hub.faults = [Fault(".", status=503, times=10**6)]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    command = ["train", "--config", str(tmp_path / "tiny.yaml"), "--output_dir", str(tmp_path / "run")]
    assert main([*command, "--push_to_hub", "--hub_model_id", REPO]) == 0
    folder = tmp_path / "run" / "pipeline"
    assert f"push failed, try again with `vaeplus push {folder} {REPO}`: the Hub failed" in caplog.text
    VAEPlusPipeline.from_pretrained(folder)
