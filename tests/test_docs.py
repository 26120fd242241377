"""The pages: every link leads somewhere, every command parses, and the walk-throughs run as they are written."""

import functools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from helpers import code_blocks, make_pipeline, run_code
from PIL import Image

from hf_vaeplus import VAEPlusPipeline
from hf_vaeplus.cli.flags import parse_stage_options
from hf_vaeplus.cli.main import build_parser, main
from hf_vaeplus.directions import load_directions

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SMALL = "--max_train_steps 2 --train_batch_size 4 --no-use_ema --sample_steps 0"
TINY = "autoencoder.model.hidden_channels=[4,8] vae.model.hidden_dim=8 second_stage.model.hidden_dim=8"


def commands(page: str) -> list[str]:
    """The shell commands of a page, one string each, without comments and redirections."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*|\s>\s+\S+", "", line)
            found += [part.strip() for part in line.split("&&") if part.strip()]
    return found


def headings(path: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target), link


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page, capsys):
    for command in commands(page):
        words = shlex.split(command)
        words = words[next((i for i, word in enumerate(words) if "=" not in word), 0) :]  # after VARIABLE=value
        scripts = [i for i, word in enumerate(words) if word.startswith(("examples/", "benchmarks/"))]
        if words[0].endswith("vaeplus"):
            build_parser().parse_args(words[1:])
        elif "hf_vaeplus.cli" in words:
            arguments = words[words.index("hf_vaeplus.cli") + 1 :]
            if "..." not in arguments:
                build_parser().parse_args(arguments)
        elif scripts:
            assert (ROOT / words[scripts[0]]).exists(), command
            if words[scripts[0]] == "examples/train_stage.py" and "..." not in words:
                parse_stage_options("", [*words[scripts[0] + 1 :], "--dry_run"])
        else:
            assert words[0] in {"python3", ".venv/bin/pip", ".", ".venv/bin/python", ".venv/bin/ruff", ".ci/run",
                                ".ci/lowest", "hf", "accelerate", "mkdir", "git", "cd"}, command  # fmt: skip
    capsys.readouterr()


def follow(page: str, folder: Path, monkeypatch, options: tuple[str, ...] = ("--max_train_samples", "12")) -> Path:
    """Run the page's `vaeplus` commands in `folder`, with tiny networks and two steps; the pipeline they leave."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VAEPLUS_CACHE", str(folder / "cache"))
    pipeline = None
    for command in commands(page):
        words = shlex.split(command)
        if words[0] != "vaeplus":
            continue
        if words[1] == "quickstart":  # as `train` with its preset, which can be made small
            words[1:2] = ["train", "--config", "quickstart"]
        if words[1] == "train":
            words += [*shlex.split(SMALL), "--set", *TINY.split(), *options]
            pipeline = folder / words[words.index("--output_dir") + 1] / "pipeline"
        assert main(words[1:]) == 0, command
    return pipeline


def test_get_started(tmp_path, monkeypatch):
    pipeline = follow("docs/get-started.md", tmp_path, monkeypatch)
    (block,) = code_blocks((ROOT / "docs/get-started.md").read_text())
    found = run_code(block, pipeline)
    assert len(found["images"]) == 8 and len(found["path"]) == 8 and found["nats"].shape == (8,)
    text = (ROOT / "docs/get-started.md").read_text()
    for name in re.findall(r"`([a-z_]+\.(?:png|json))`", text):
        assert (tmp_path / "vaeplus-quickstart" / name).exists() or (tmp_path / name).exists(), name


def test_your_own_pictures(hub, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for number in range(500):  # of which 100 are held out
        noise = np.random.default_rng(number).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{number}.jpg")
    follow("docs/your-own-pictures.md", tmp_path, monkeypatch, options=())
    assert b"CC BY 4.0" in hub["your-name/vaeplus-pictures"].files()["README.md"]
    (block,) = code_blocks((ROOT / "docs/your-own-pictures.md").read_text())
    found = {}
    exec(compile(block, "page", "exec"), found)
    assert len(found["images"]) == 16


def test_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAEPLUS_CACHE", str(tmp_path / "cache"))
    make_pipeline().save_pretrained("vaeplus-quickstart/pipeline")
    Path("pictures").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(f"pictures/{number}.jpg")
    Image.fromarray(noise).save("picture.png")
    Path("labels.csv").write_text("file_name,label\n0.jpg,a\n1.jpg,b\n")
    for command in commands("docs/scores.md")[:2]:
        assert main([*shlex.split(command)[1:], "--overwrite"]) == 0, command
    (block,) = code_blocks((ROOT / "docs/scores.md").read_text())
    assert run_code(block, tmp_path / "vaeplus-quickstart/pipeline")["scores"].log_likelihood.shape == (1,)


def test_posteriors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("model_cards").symlink_to(ROOT / "model_cards")
    short = functools.partialmethod(VAEPlusPipeline.restore, num_steps=2)
    monkeypatch.setattr(VAEPlusPipeline, "restore", short)
    found = {}
    for block in code_blocks((ROOT / "docs/posteriors.md").read_text()):
        exec(compile(block, "page", "exec"), found)
    assert len(found["smiling"]) == len(found["filled"]) == len(found["clean"]) == 4
    assert load_directions(found["pipe"], found["path"]).keys() == {"turn", "smile"}


def test_encode(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAEPLUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    tiny = [*SMALL.split(), "--set", *TINY.split(), "--max_train_samples", "12"]
    assert main(["train", "--config", "quickstart", "--output_dir", "vaeplus-quickstart", *tiny]) == 0
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save("picture.png")
    for command in commands("docs/encode.md"):
        words = shlex.split(command)[1:]
        if "--max_images" in words:
            words[words.index("--max_images") + 1] = "20"
        assert main(words) == 0, command
    pushed = hub.repositories["datasets", "your-name/face-latents"]
    assert pushed.private and pushed.files().keys() == {"README.md", "data/train-00000-of-00001.parquet"}
    assert len(load_dataset("your-name/face-latents", split="train")) == 20
    found = {}
    for block in code_blocks((ROOT / "docs/encode.md").read_text()):
        exec(compile(block, "docs/encode.md", "exec"), found)
    assert found["latents"].num_rows == len(found["codes"]) == 20
    assert found["features"].shape == (1, 24) and len(found["longer"][0]) == 32
