"""Push and pull with the real client: the Hub is `loopback_hub.LoopbackHub`, see conftest.py."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import code_blocks, make_pipeline, with_prior
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from loopback_hub import READ_ONLY_TOKEN, TOKEN, Fault
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, pipeline

from hf_vaeplus import VAEPlusDetailConfig, VAEPlusDetailModel, VAEPlusImageProcessor, VAEPlusPipeline
from hf_vaeplus.cli.main import main
from hf_vaeplus.hub.client import explain
from hf_vaeplus.hub.repository import export, export_with_card

REPO = "org/drawings"
COMPONENTS = {"autoencoder": "VAEPlusAutoencoderModel", "vae": "VAEPlusVAEModel", "second_stage": "VAEPlusVAEModel"}


@pytest.fixture
def pipe() -> VAEPlusPipeline:
    return make_pipeline()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of downloads."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def samples(pipe, dtype=torch.float32) -> torch.Tensor:
    return pipe(3, torch.Generator().manual_seed(3), output_type="pt").images


def weights(hub, revision="main", variant="") -> bytes:
    return hub[REPO].files(revision)[f"vae/model{variant}.safetensors"]


def put_bodies(hub) -> list[str]:
    return [label for label in hub.requests if label.startswith("PUT")]


# ------------------------------------------------------------------------------------------------- there and back


def test_samples_are_the_same_after_push_and_pull(hub, pipe):
    address = pipe.push_to_hub(REPO)
    repository = hub[REPO]
    assert address.endswith(repository.branches["main"]) and repository.titles == ["initial commit", "Upload pipeline"]
    before = set(sys.modules)
    pulled = VAEPlusPipeline.from_pretrained(REPO)
    assert torch.equal(samples(pulled), samples(pipe))
    foreign = ("transformers_modules", "diffusers_modules")
    assert not [name for name in sys.modules.keys() - before if name.startswith(foreign)]


def test_what_the_repository_holds(hub, pipe):
    pipe.push_to_hub(REPO)
    own = ("config.json", "model.safetensors", "modeling_vaeplus.py")
    common = {"README.md", "model_index.json", "modeling_vaeplus.py", "pipeline.py"}
    common |= {"config.json", "preprocessor_config.json", "image_processing_vaeplus.py"}
    assert hub[REPO].files().keys() == {f"{name}/{file}" for name in COMPONENTS for file in own} | common
    index = json.loads(hub[REPO].files()["model_index.json"])
    assert index["_class_name"] == ["pipeline", "VAEPlusPipeline"]
    assert {name: index[name] for name in COMPONENTS} == {n: ["modeling_vaeplus", c] for n, c in COMPONENTS.items()}
    assert len(put_bodies(hub)) == 3, "the weights alone go by LFS"
    assert b"hf_vaeplus" not in hub[REPO].files()["pipeline.py"], "it must not ask for the package"


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_stage_alone_without_trust(hub, pipe, name):
    pipe.push_to_hub(REPO)
    model = AutoModel.from_pretrained(REPO, subfolder=name)
    assert type(model) is type(getattr(pipe, name))
    for key, value in getattr(pipe, name).state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_features_of_what_was_pushed(hub, pipe, saved):
    VAEPlusImageProcessor(32, crop=40).save_pretrained(saved)
    VAEPlusPipeline.from_pretrained(saved).push_to_hub(REPO)
    extractor = pipeline("image-feature-extraction", model=REPO)
    assert extractor.image_processor.crop == 40
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    shrunk = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BOX)
    found = extractor(Image.fromarray(pixels), return_tensors=True)
    torch.testing.assert_close(found, pipe.encode(shrunk).mean, rtol=1e-5, atol=1e-5)
    assert "image_processing_vaeplus.py" in hub[REPO].files()
    VAEPlusPipeline.from_pretrained(REPO).push_to_hub("org/copy")
    assert json.loads(hub["org/copy"].files()["preprocessor_config.json"])["crop"] == 40


@pytest.mark.parametrize(
    "kind, vae", [("flow_matching", True), ("flow_matching", False), ("coupling_flow", True), ("mixture", True)]
)  # fmt: skip
def test_a_second_stage_with_a_density(hub, kind, vae):
    pipe = with_prior(kind, vae=vae)
    pipe.push_to_hub(REPO)
    files = hub[REPO].files()
    assert {"modeling_priors.py", "modeling_vaeplus.py", "second_stage/modeling_priors.py"} <= files.keys()
    assert ("vae/model.safetensors" in files) is vae
    pulled = VAEPlusPipeline.from_pretrained(REPO)
    model = AutoModel.from_pretrained(REPO, subfolder="second_stage")
    assert type(model) is type(pulled.second_stage) is type(pipe.second_stage)
    assert torch.equal(samples(pulled), samples(pipe))
    z = torch.randn(3, pipe.second_stage.config.latent_dim)
    assert torch.equal(model.log_prob(z), pipe.second_stage.log_prob(z))


def test_a_pipeline_without_its_optional_stages(hub):
    pipe = make_pipeline(autoencoder=False, second_stage=False)
    pipe.push_to_hub(REPO)
    pulled = VAEPlusPipeline.from_pretrained(REPO)
    assert pulled.autoencoder is None and torch.equal(samples(pulled), samples(pipe))


def test_branches_tags_and_commits(hub, pipe):
    pipe.push_to_hub(REPO, tag="v1")
    first = hub[REPO].branches["main"]
    other = make_pipeline(gamma_init=0.5)
    other.push_to_hub(REPO, revision="step-10", commit_message="Ten steps")
    assert hub[REPO].titles[-1] == "Ten steps" and hub[REPO].branches["main"] == first
    other.push_to_hub(REPO, tag="v2")
    for revision, expected in {"v1": pipe, first: pipe, "step-10": other, "v2": other, None: other}.items():
        pulled = VAEPlusPipeline.from_pretrained(REPO, revision=revision)
        assert torch.equal(pulled.vae.log_gamma, expected.vae.log_gamma), revision
    with pytest.raises(OSError, match="org/drawings cannot be loaded: the Hub has no such .*rev id: v3"):
        VAEPlusPipeline.from_pretrained(REPO, revision="v3")
    with pytest.raises(ValueError, match="has a tag 'v1' already: choose another"):
        pipe.push_to_hub(REPO, tag="v1")
    assert len(hub[REPO].titles) == 4


def test_a_variant_adds_weights_and_nothing_else(hub, pipe):
    with pytest.raises(ValueError, match="has no autoencoder/config.json: push the pipeline itself first"):
        pipe.push_to_hub(REPO, variant="bf16")
    assert not hub.repositories
    expected = samples(pipe)
    pipe.push_to_hub(REPO)
    before = hub[REPO].files()
    pipe.to(torch.bfloat16).push_to_hub(REPO, variant="bf16")
    after = hub[REPO].files()
    assert after.keys() - before.keys() == {f"{name}/model.bf16.safetensors" for name in COMPONENTS}
    assert all(after[name] == content for name, content in before.items())
    assert len(weights(hub, variant=".bf16")) < 0.8 * len(weights(hub))
    half = VAEPlusPipeline.from_pretrained(REPO, variant="bf16", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and 0 < (samples(half) - expected).abs().max() < 0.05
    assert torch.equal(samples(VAEPlusPipeline.from_pretrained(REPO)), expected)
    with pytest.raises(ValueError, match="vae/config.json of org/drawings is not that of this pipeline"):
        make_pipeline(hidden_dim=9).push_to_hub(REPO, variant="bf16")


def test_a_variant_needs_no_card_and_takes_none(hub, pipe, saved, monkeypatch):
    pipe.push_to_hub(REPO)
    before = hub[REPO].files().keys()
    (saved / "README.md").write_text('VAEPlusPipeline.from_pretrained("org/else")')  # it stays where it is
    (saved / "samples.png").write_bytes(b"a picture")
    monkeypatch.setattr("hf_vaeplus.hub.repository.shutil.copy", None)
    VAEPlusPipeline.from_pretrained(saved).push_to_hub(REPO, variant="bf16")
    assert hub[REPO].files().keys() - before == {f"{name}/model.bf16.safetensors" for name in COMPONENTS}


def test_dtype_and_cache_dir(hub, pipe, tmp_path, cache):
    pipe.push_to_hub(REPO)
    pulled = VAEPlusPipeline.from_pretrained(REPO, dtype=torch.bfloat16, cache_dir=tmp_path / "elsewhere")
    assert pulled.dtype == torch.bfloat16
    assert (tmp_path / "elsewhere" / "models--org--drawings").is_dir() and not cache.exists()


def test_private_repositories(hub, pipe, tmp_path):
    pipe.push_to_hub(REPO, private=True)
    assert hub[REPO].private
    assert torch.equal(samples(VAEPlusPipeline.from_pretrained(REPO, token=TOKEN)), samples(pipe))
    with pytest.raises(OSError):
        VAEPlusPipeline.from_pretrained(REPO, token=False, cache_dir=tmp_path)


def test_a_bare_name_is_of_the_user(hub, pipe):
    pipe.push_to_hub("drawings")
    assert hub["reader/drawings"].titles[-1] == "Upload pipeline"


# -------------------------------------------------------------------------------------------- without this package

WITHOUT_PACKAGE = """
import importlib.util, os, sys, torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from diffusers import DiffusionPipeline
from transformers import AutoModel, pipeline
assert importlib.util.find_spec("hf_vaeplus") is None
repo, output = sys.argv[1:]
folder = snapshot_download(repo)
if os.environ["HF_HUB_OFFLINE"] == "1":  # diffusers asks the Hub for the commit of code: name the folder instead
    repo = folder
try:
    DiffusionPipeline.from_pretrained(repo)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("code of a repository ran without trust")
pipe = DiffusionPipeline.from_pretrained(repo, trust_remote_code=True)
images_of_vae = pipe(3, torch.Generator().manual_seed(3), output_type="pt").images
vae = AutoModel.from_pretrained(repo, subfolder="vae", trust_remote_code=True)
assert type(vae).__name__ == "VAEPlusVAEModel"
assert vae.config.later == pipe.vae.config.later == ["a", "newer", "version"]
pipe.save_pretrained("again")
for kind in ("flow_matching", "coupling_flow", "mixture") if repo != folder else ():
    other = DiffusionPipeline.from_pretrained(f"org/{kind}", trust_remote_code=True)
    prior = AutoModel.from_pretrained(f"org/{kind}", subfolder="second_stage", trust_remote_code=True)
    z = torch.linspace(-1, 1, 4)[None]
    assert torch.equal(prior.log_prob(z), other.second_stage.log_prob(z)), kind
    images = other(3, torch.Generator().manual_seed(3), output_type="pt").images
    save_file({"images": images, "log_prob": prior.log_prob(z).detach()}, f"{kind}.safetensors")
save_file({"images": images_of_vae, "log_gamma": vae.log_gamma.detach()}, output)
"""


def environment_without_the_package(folder: Path) -> Path:
    """The Python of a fresh virtual environment that holds what this one holds, but for this package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    target = Path(sysconfig.get_path("purelib", "venv" if os.name != "nt" else None, paths))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.search(r"hf_vaeplus|\.pth$", entry.name):
            (target / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def test_without_the_package_by_trust_online_then_offline(hub, pipe, tmp_path):
    pipe.vae.config.later = ["a", "newer", "version"]
    pipe.push_to_hub(REPO)
    others = {kind: with_prior(kind) for kind in ("flow_matching", "coupling_flow", "mixture")}
    config = pipe.autoencoder.config
    shape = {name: getattr(config, name) for name in ("image_size", "num_channels", "patch_size")}
    torch.manual_seed(0)
    detail = VAEPlusDetailModel(VAEPlusDetailConfig(**shape, feature_dim=config.hidden_channels[0], hidden_dim=8))
    others["mixture"].register_modules(detail=detail)
    for kind, other in others.items():
        other.push_to_hub(f"org/{kind}")
    python = environment_without_the_package(tmp_path / "venv")
    for offline in ("0", "1"):
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": offline}
        del environment["HF_TOKEN"]
        environment.pop("PYTHONPATH", None)  # it may name the package
        if offline == "1":
            hub.faults = [Fault(".", status=500, times=10**6)]
        output = tmp_path / f"{offline}.safetensors"
        command = [python, "-c", WITHOUT_PACKAGE, REPO, str(output)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found = load_file(output)
        assert torch.equal(found["images"], samples(pipe)) and torch.equal(found["log_gamma"], pipe.vae.log_gamma)
    for kind, other in others.items():
        found = load_file(tmp_path / f"{kind}.safetensors")
        assert torch.equal(found["images"], samples(other)), kind
        assert torch.equal(found["log_prob"], other.second_stage.log_prob(torch.linspace(-1, 1, 4)[None])), kind


def test_an_export_is_a_folder_that_loads(pipe, tmp_path):
    export(pipe, tmp_path / "exported")
    assert torch.equal(samples(VAEPlusPipeline.from_pretrained(tmp_path / "exported")), samples(pipe))
    again = tmp_path / "again"
    VAEPlusPipeline.from_pretrained(tmp_path / "exported").save_pretrained(again)
    assert torch.equal(samples(VAEPlusPipeline.from_pretrained(again)), samples(pipe))


# -------------------------------------------------------------------------------------------------------- trouble


def run_command(*words) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def saved(pipe, tmp_path) -> Path:
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize(
    "token, fault, message",
    [
        ("hf_wrong", None, "the Hub does not accept the token: log in with `hf auth login`"),
        (READ_ONLY_TOKEN, None, "the Hub refuses: the token may not do this here, use one with write access"),
        (TOKEN, Fault("commit/main", status=404), "the Hub has no such repository or file, or hides it"),
        (TOKEN, Fault("commit/main", status=500), "the Hub failed: try again later"),
        (TOKEN, Fault("lfs/", status=503, times=100), "the Hub failed: try again later"),
        (TOKEN, Fault("repos/create", cut=True, times=100), "the Hub did not answer: try again"),
    ],
)  # fmt: skip
def test_a_refused_push_is_one_sentence(hub, saved, monkeypatch, capsys, no_waiting, token, fault, message):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.faults = [fault] if fault else []
    assert run_command("push", saved, REPO) == 2
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors and len(errors.splitlines()) == 1
    assert TOKEN not in errors


def test_without_a_token(hub, saved, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert run_command("push", saved, REPO) == 2
    assert "log in with `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err


@pytest.mark.parametrize(
    "status, message",
    [
        (401, "the Hub does not accept the token"),
        (403, "the Hub refuses"),
        (404, "the Hub has no such repository"),
        (500, "the Hub failed: try again later"),
    ],
)
def test_a_failed_pull_is_one_sentence(hub, pipe, capsys, no_waiting, status, message):
    pipe.push_to_hub(REPO)
    hub.faults = [Fault("org/drawings", status=status, times=100)]
    assert run_command("sample", REPO, "--output", "never.png") == 2
    errors = capsys.readouterr().err
    assert f"there is no folder {REPO}, and {REPO} cannot be loaded: {message}" in errors
    assert len(errors.splitlines()) == 1
    assert not Path("never.png").exists()


def test_a_cut_connection_is_tried_again_by_itself(hub, pipe, no_waiting):
    hub.faults = [Fault("PUT /lfs/", cut=True, times=2)]
    pipe.push_to_hub(REPO)
    assert not hub.faults[0].times
    assert torch.equal(samples(VAEPlusPipeline.from_pretrained(REPO)), samples(pipe))


def test_an_upload_that_broke_off_goes_on_where_it_stopped(hub, pipe, saved, capsys, no_waiting, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pipe.push_to_hub("org/other")  # one set of weights is there
    hub.blobs.popitem()
    hub.faults = [Fault("PUT /lfs/", cut=True, times=10**6)]
    assert run_command("push", saved, REPO) == 2
    assert "the Hub did not answer: try again" in capsys.readouterr().err
    assert hub[REPO].files() == {}, "half a pipeline was published"
    hub.faults.clear()
    hub.requests.clear()
    assert run_command("push", saved, REPO) == 0
    assert len(put_bodies(hub)) == 1, "what had arrived was sent again"
    assert torch.equal(samples(VAEPlusPipeline.from_pretrained(REPO)), samples(pipe))


def test_a_download_that_broke_off_goes_on_where_it_stopped(hub, pipe, no_waiting, monkeypatch):
    pipe.push_to_hub(REPO)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.faults = [Fault("GET .*model.safetensors", cut=True, times=2)]
    pulled = VAEPlusPipeline.from_pretrained(REPO)
    assert not hub.faults[0].times and any(int(each[6:-1]) > 0 for each in hub.ranges)
    assert torch.equal(samples(pulled), samples(pipe))


def test_offline_from_the_cache(hub, pipe, no_waiting):
    pipe.push_to_hub(REPO)
    VAEPlusPipeline.from_pretrained(REPO)
    hub.requests.clear()
    pulled = VAEPlusPipeline.from_pretrained(REPO, local_files_only=True)
    assert not hub.requests and torch.equal(samples(pulled), samples(pipe))
    hub.faults = [Fault(".", status=500, times=10**6)]
    assert torch.equal(samples(VAEPlusPipeline.from_pretrained(REPO)), samples(pipe)), "the Hub was down"


def test_other_errors_are_explained_in_their_own_words():
    assert explain(ValueError("a\nb")) == "a b" and explain(RuntimeError()) == "RuntimeError"


# ---------------------------------------------------------------------------------------------------------- cards


def test_a_short_card_claims_nothing_and_its_code_runs(hub, pipe):
    pipe.push_to_hub(REPO)
    text = hub[REPO].files()["README.md"].decode()
    assert ModelCard(text).data.library_name == "diffusers" and "left no record" in text
    found = {}
    exec(code_blocks(text)[0], found)
    assert len(found["images"]) == 4


def test_the_card_and_its_pictures_go_along(hub, saved):
    (saved / "README.md").write_text(f'---\nlicense: mit\n---\nVAEPlusPipeline.from_pretrained("{REPO}")\n')
    (saved / "samples.png").write_bytes(b"a picture")
    pipe = VAEPlusPipeline.from_pretrained(saved)
    with pytest.raises(ValueError, match="is the card of org/drawings: write one for org/else with `vaeplus card RUN"):
        pipe.push_to_hub("org/else")
    assert not hub.repositories
    pipe.push_to_hub(REPO)
    files = hub[REPO].files()
    assert b"license: mit" in files["README.md"] and files["samples.png"] == b"a picture"
    make_pipeline().push_to_hub(REPO)
    assert hub[REPO].files()["README.md"] == files["README.md"], "a short card replaced a full one"


# --------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def with_card(pipe, tmp_path) -> Path:
    """A saved pipeline with the card and the picture of the repository `REPO`."""
    folder = tmp_path / "with-card"
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text(f'# Drawings\n\n`VAEPlusPipeline.from_pretrained("{REPO}")`\n')
    Image.new("L", (4, 4)).save(folder / "samples.png")
    return folder


def test_an_exported_folder_is_uploaded_byte_for_byte(hub, with_card, tmp_path, capsys):
    folder = tmp_path / "repository"
    assert main(["export", str(with_card), str(folder), "--weights", "bf16", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert written["files"] == [str(folder / name) for name in sorted(files)]
    assert written["bytes"] == sum(map(len, files.values()))
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    (folder / "notes.txt").write_text("not part of it")
    assert main(["push", str(folder), REPO]) == 0
    assert hub[REPO].files() == files
    assert torch.equal(
        samples(VAEPlusPipeline.from_pretrained(folder)), samples(VAEPlusPipeline.from_pretrained(REPO))
    )


def test_an_exported_folder_without_a_card_gets_a_short_one(hub, pipe, tmp_path):
    export(pipe, tmp_path / "bare")
    assert main(["push", str(tmp_path / "bare"), REPO]) == 0
    assert REPO in hub[REPO].files()["README.md"].decode()


def test_bf16_weights_are_the_rounded_ones_and_compute_in_float32(with_card, pipe, tmp_path):
    loaded = VAEPlusPipeline.from_pretrained(with_card)
    (with_card / "directions.safetensors").write_bytes(b"directions")
    export_with_card(loaded, tmp_path / "repository", weights="bf16")
    assert (tmp_path / "repository" / "directions.safetensors").read_bytes() == b"directions"
    rounded = VAEPlusPipeline.from_pretrained(tmp_path / "repository")
    for name in COMPONENTS:
        found = getattr(rounded, name).state_dict()
        matrices = {key for key, weight in getattr(pipe, name).named_parameters() if weight.ndim > 1}
        for key, weight in getattr(pipe, name).state_dict().items():
            expected = weight.to(torch.bfloat16).float() if key in matrices else weight
            assert found[key].dtype == weight.dtype and torch.equal(found[key], expected)
    size = [
        (folder / "autoencoder/model.safetensors").stat().st_size for folder in (tmp_path / "repository", with_card)
    ]
    assert size[0] < 0.7 * size[1]


@pytest.mark.parametrize("mistake", ["no card", "a folder that is not empty"])
def test_what_export_refuses(with_card, tmp_path, capsys, mistake):
    folder = tmp_path / "repository"
    if mistake == "no card":
        (with_card / "README.md").unlink()
    else:
        folder.mkdir()
        (folder / "old").touch()
    assert main(["export", str(with_card), str(folder)]) == 2
    message = "vaeplus card RUN REPO_ID" if mistake == "no card" else "is not empty: name a new folder"
    assert message in capsys.readouterr().err
    assert [path.name for path in folder.glob("*")] == ([] if mistake == "no card" else ["old"])


def test_the_command(hub, saved, capsys):
    assert run_command("push", saved, REPO, "--private", "--tag", "v1", "--message", "First", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["repository"] == REPO and told["tag"] == "v1" and told["url"].endswith(hub[REPO].tags["v1"])
    assert hub[REPO].private and hub[REPO].titles[-1] == "First"
    assert run_command("push", saved, REPO, "--variant", "bf16") == 0
    assert capsys.readouterr().out.startswith("pushed: http")
    assert len(weights(hub, variant=".bf16")) < 0.8 * len(weights(hub))
    assert run_command("push", saved, REPO, "--revision", "other") == 0
    assert hub[REPO].find("other") != hub[REPO].find("main")
    assert run_command("push", REPO, "org/copy") == 0, "from one repository to another"
    assert hub["org/copy"].files()["vae/model.safetensors"] == weights(hub)


@pytest.mark.parametrize(
    "words, message",
    [
        (("nowhere", REPO), "nowhere is not a saved pipeline"),
        (("{saved}", "not/a/name"), "Repo id must be in the form"),
        (("{saved}", REPO, "--variant", "int4"), "--variant: invalid choice"),
    ],
)
def test_mistakes(hub, saved, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere").mkdir()
    try:
        code = run_command("push", *(word.format(saved=saved) for word in words))
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err
    assert not [each for each in hub.requests if "create" in each]


def test_the_client_knows_no_other_hub(hub):
    assert HfApi().endpoint == huggingface_hub.constants.ENDPOINT == hub.url
    with pytest.raises(HfHubHTTPError):
        HfApi().model_info("org/none")
