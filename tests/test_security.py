"""What a stranger may plant in a folder or a repository, and what never happens: code runs, a path leads out, a token
gets written down.

Rows of tables that name files, and presets with code in them, are in test_bad_input.py; the demo is in test_demo.py.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import captured, fit
from loopback_hub import TOKEN, Fault, Repository
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

from hf_vaeplus import (
    PenalizedAutoencoderConfig,
    PenalizedAutoencoderModel,
    VAEPlusAutoencoderModel,
    VAEPlusEncoderModel,
    VAEPlusImageProcessor,
    VAEPlusPipeline,
    VAEPlusVAEConfig,
    VAEPlusVAEModel,
)
from hf_vaeplus.cli.main import main, run_command
from hf_vaeplus.data.cache import load_images
from hf_vaeplus.data.stream import stream_images
from hf_vaeplus.evaluation.features import open_extractor
from hf_vaeplus.files import sha256
from hf_vaeplus.hub.repository import push
from hf_vaeplus.modeling_baselines import WAEMMDModel
from hf_vaeplus.training.checkpoints import DamagedCheckpoint, check
from hf_vaeplus.training.options import StageOptions, TrainingOptions
from hf_vaeplus.training.stages import run_stage

REFUSALS = (ValueError, OSError, TypeError)  # what the command line turns into one sentence


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working folder, and an empty cache of downloads."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "downloads"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def witness(tmp_path) -> Path:
    """The file that a planted piece of code makes when it runs."""
    return tmp_path / "witness"


def told(*words) -> tuple[int, str]:
    """Exit code and standard error of `vaeplus WORDS`."""
    code, _, errors = captured(lambda: main([str(word) for word in words]))
    return code, errors


def refused(code: int, errors: str):
    assert code == 2 and errors.count("vaeplus: error: ") == 1 and "Traceback" not in errors, errors


# ----------------------------------------------------------------------------------------------------- pickles


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return type(self.witness).touch, (self.witness,)


NAMES = [
    *(f"{stem}.{suffix}" for stem in ("pytorch_model", "model", "diffusion_pytorch_model", "optimizer", "scheduler",
                                      "adapter_model", "pytorch_lora_weights", "training_args", "checkpoint", "last")
      for suffix in ("bin", "pt", "pth", "ckpt", "pkl", "pickle")),
    "random_states_0.pkl", "custom_checkpoint_0.pkl", "scaler.pt", "rng_state.pth", "sampler.bin", "dl_state_dict.bin",
    "data.pkl", "state.json.pkl", "images.npy", "images.npz", "features.npy", "codes.npy", "bins.npy", "rows.pt",
    "dataset.pkl", "info.pkl", "cache.pkl", "model.joblib", "flax_model.msgpack", "tf_model.h5",
    "pytorch_model-00001-of-00001.bin", "diffusion_pytorch_model-00001-of-00001.bin", "0.png.pkl", "train.pkl",
]  # fmt: skip
INDICES = ("pytorch_model", "diffusion_pytorch_model")


def forms(witness: Path) -> dict[str, bytes]:
    """One attack in the three containers that readers of pickles know."""
    plain = pickle.dumps(Attack(witness), protocol=2)
    tensors, array = io.BytesIO(), io.BytesIO()
    torch.save({"weight": torch.zeros(2), "attack": Attack(witness)}, tensors)
    np.save(array, np.array([Attack(witness)], dtype=object), allow_pickle=True)
    return {"pickle": plain, "torch": tensors.getvalue(), "numpy": array.getvalue()}


def test_the_attack_works(witness, tmp_path):
    for form, read in {
        "pickle": lambda file: pickle.load(file),
        "torch": lambda file: torch.load(file, weights_only=False),
        "numpy": lambda file: np.load(file, allow_pickle=True),
    }.items():
        read(io.BytesIO(forms(witness)[form]))
        assert witness.exists(), form
        witness.unlink()


def plant(folder: Path, witness: Path):
    """Attacks under every name that a loader might try, in the folder and in each one below it, over no other file."""
    found = forms(witness)
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        for name in NAMES:
            form = {"npy": "numpy", "npz": "numpy", "bin": "torch", "pt": "torch", "pth": "torch", "ckpt": "torch"}
            if not (place / name).exists():
                (place / name).write_bytes(found[form.get(name.rsplit(".")[-1], "pickle")])
        for stem in INDICES:
            index = {"metadata": {}, "weight_map": {"weight": f"{stem}-00001-of-00001.bin"}}
            (place / f"{stem}.bin.index.json").write_text(json.dumps(index))


def without_safetensors(folder: Path, witness: Path):
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    plant(folder, witness)


def pickles_as_safetensors(folder: Path, witness: Path):
    """A checkpoint's checksums are made to fit, as a stranger would."""
    for number, path in enumerate(sorted(folder.rglob("*.safetensors"))):
        path.write_bytes(forms(witness)[("pickle", "torch")[number % 2]])
    for path in folder.rglob("checksums.json"):
        path.write_text(json.dumps({name: sha256(path.parent / name) for name in json.loads(path.read_text())}))
    plant(folder, witness)


@pytest.fixture(scope="module")
def home(finished_run, tmp_path_factory) -> Path:
    """A finished run with its cache, a pipeline, baselines, pictures."""
    home = tmp_path_factory.mktemp("security")
    shutil.copytree(finished_run.parent, home / "all")
    home = home / "all"
    torch.manual_seed(0)
    WAEMMDModel(VAEPlusVAEConfig(input_shape=(6,), latent_dim=4, hidden_dim=8)).save_pretrained(home / "wae")
    small = PenalizedAutoencoderConfig(input_shape=(6,), latent_dim=4, hidden_dim=8)
    PenalizedAutoencoderModel(small).save_pretrained(home / "penalized")
    (home / "pictures").mkdir()
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 256, (40, 40), dtype=np.uint8)
        Image.fromarray(noise).save(home / "pictures" / f"{seed}.png")
    return home


@pytest.fixture
def planted(home, tmp_path, monkeypatch) -> Path:
    """A copy of `home`, whose cache is the one in use."""
    copy = shutil.copytree(home, tmp_path / "planted")
    for path in copy.glob("run/*/training_options.json"):  # the run was made elsewhere
        stage_folder = json.loads(path.read_text())["output_dir"]
        made_in = stage_folder[: stage_folder.rindex("/run/")]
        path.write_text(path.read_text().replace(made_in, str(copy)))
    monkeypatch.setenv("VAEPLUS_CACHE", str(copy / "cache"))
    return copy


# What reads a folder with weights; the value of each is called with the folder of `home`.
LOADERS = {
    "the autoencoder": lambda at: VAEPlusAutoencoderModel.from_pretrained(at / "run" / "autoencoder"),
    "the VAE": lambda at: VAEPlusVAEModel.from_pretrained(at / "run" / "vae"),
    "the VAE of a pipeline": lambda at: VAEPlusVAEModel.from_pretrained(at / "run" / "pipeline", subfolder="vae"),
    "the encoder": lambda at: VAEPlusEncoderModel.from_pretrained(at / "run" / "pipeline"),
    "the WAE": lambda at: WAEMMDModel.from_pretrained(at / "wae"),
    "the penalised autoencoder": lambda at: PenalizedAutoencoderModel.from_pretrained(at / "penalized"),
    "AutoModel": lambda at: AutoModel.from_pretrained(at / "run" / "vae"),
    "AutoModel of a pipeline": lambda at: AutoModel.from_pretrained(at / "run" / "pipeline"),
    "the pipeline": lambda at: VAEPlusPipeline.from_pretrained(at / "run" / "pipeline"),
    "DiffusionPipeline": lambda at: DiffusionPipeline.from_pretrained(at / "run" / "pipeline"),
    "feature extraction": lambda at: pipeline("image-feature-extraction", str(at / "run" / "pipeline")),
}
DATA = "--dataset_name digits --max_images 40"
COMMANDS = {
    "sample": "sample {run}/pipeline --num_images 2",
    "reconstruct": "reconstruct {run}/pipeline {home}/pictures/0.png",
    "interpolate": "interpolate {run}/pipeline {home}/pictures/0.png {home}/pictures/1.png",
    "evaluate": f"evaluate {{run}}/pipeline {DATA} --num_images 10 --ndb 4 --ndb_images 20",
    "encode": f"encode {{run}}/pipeline {DATA}",
    "push": "push {run}/pipeline org/pushed",
    "card": "card {run} org/pushed",
    "train": "train --config {home}/tiny.yaml --output_dir {run} --max_train_steps 4 --retrain",
}
NO_WEIGHTS = {
    "AutoConfig": lambda at: AutoConfig.from_pretrained(at / "run" / "vae"),
    "the processor": lambda at: VAEPlusImageProcessor.from_pretrained(at / "run" / "pipeline"),
    "AutoImageProcessor": lambda at: AutoImageProcessor.from_pretrained(at / "run" / "pipeline"),
    "pictures": lambda at: load_images(train_data_dir=at / "pictures", resolution=8, progress=False)[0],
    "a stream": lambda at: next(stream_images(train_data_dir=at / "pictures", resolution=8).in_order(3)),
}


def words_of(command: str, at: Path) -> list[str]:
    return command.format(home=at, run=at / "run").split()


@pytest.mark.parametrize("load", [*LOADERS.values(), *NO_WEIGHTS.values()], ids=[*LOADERS, *NO_WEIGHTS])
def test_pickles_beside_good_files_are_not_read(load, home, planted, witness):
    NO_WEIGHTS["pictures"](planted)  # its cache gets attacks as well
    plant(planted, witness)
    found, good = load(planted), load(home)
    assert not witness.exists()
    if isinstance(found, torch.nn.Module):
        assert all(torch.equal(value, good.state_dict()[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_commands_do_not_read_pickles_beside_good_files(command, planted, witness, hub):
    plant(planted, witness)
    code, errors = told(*words_of(command, planted))
    assert code == 0, errors
    assert not witness.exists()


SPOILT = {"without safetensors": without_safetensors, "under their name": pickles_as_safetensors}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_pickles_in_place_of_weights_are_refused(spoil, load, planted, witness):
    spoil(planted, witness)
    with pytest.raises(REFUSALS):
        load(planted)
    assert not witness.exists()


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_commands_refuse_pickles_in_place_of_weights(spoil, command, planted, witness, hub):
    spoil(planted, witness)
    refused(*told(*words_of(command, planted)))
    assert not witness.exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.onnx"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_as_an_extractor_is_refused(name, form, witness, tmp_path):
    (tmp_path / name).write_bytes(forms(witness)[form])
    spec = str(tmp_path / name)
    with pytest.raises(ValueError, match=name):
        open_extractor(spec if name.endswith("onnx") else f"fid:{spec}")
    assert not witness.exists()


def test_caches_of_codes_and_bins_that_hold_pickles_are_made_again(planted, witness, caplog):
    measured = [*words_of(COMMANDS["evaluate"], planted), "--overwrite"]
    assert told(*measured)[0] == 0
    made = [
        *(planted / "cache" / "bins").glob("*.safetensors"),
        *(planted / "cache" / "encoded").glob("*.safetensors"),
    ]
    assert len(made) >= 2
    for path in made:
        path.write_bytes(forms(witness)["torch"])
    assert told(*measured)[0] == 0
    assert f"{made[0]} is damaged" in caplog.text and "will be made again" in caplog.text
    assert load_file(made[0]) and not witness.exists()


@pytest.mark.parametrize("option", ["use_safetensors", "weights_only"])
def test_an_index_of_safetensors_that_names_a_pickle(option, home, planted, witness, hub):
    """transformers reads what the index names with the reader that the suffix asks for."""
    folder = planted / "run" / "vae"
    (folder / "evil.bin").write_bytes(forms(witness)["torch"])
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "evil.bin")})
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="names 'evil.bin', expected safetensors files beside it"):
        VAEPlusVAEModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"{option}=False is refused"):
        VAEPlusVAEModel.from_pretrained(folder, **{option: False})
    repository(hub, "evil/index", {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    with pytest.raises(ValueError, match="evil.bin is named as weights but is no safetensors file"):
        VAEPlusVAEModel.from_pretrained("evil/index")
    assert not witness.exists()


# -------------------------------------------------------------------------------------------------- remote code


def repository(hub, name: str, files: dict[str, bytes], kind: str = "models"):
    hub.repositories[kind, name] = Repository(False)
    hub.repositories[kind, name].commit("main", files, "files")


def code(witness: Path) -> bytes:
    """A module that could hold a config, a model, a processor, a pipeline and a data set, and touches the witness."""
    return f"""
import pathlib
pathlib.Path({str(witness)!r}).touch()
import torch
from diffusers import DiffusionPipeline
from transformers import PretrainedConfig, PreTrainedModel
class EvilConfig(PretrainedConfig):
    model_type = "evil"
class EvilModel(PreTrainedModel):
    config_class = EvilConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(1, 1)
        self.post_init()
class EvilPipeline(DiffusionPipeline):
    def __init__(self, vae):
        super().__init__()
""".encode()


@pytest.fixture
def evil(hub, witness, home) -> None:
    """`evil/export`: a pipeline of this package whose code files are others; `evil/foreign`: nothing but theirs;
    `evil/data`: pictures, with a loading script."""
    VAEPlusPipeline.from_pretrained(home / "run" / "pipeline").push_to_hub("evil/export")
    files = hub["evil/export"].files()
    for name in files:
        if name.endswith(".py"):
            files[name] = code(witness)
    scripts = {name: code(witness) for name in ("modeling_evil.py", "pipeline.py", "configuration_evil.py",
                                               "processing_evil.py", "__init__.py", "vae/modeling_evil.py",
                                               "conftest.py", "setup.py", "sitecustomize.py")}  # fmt: skip
    evil = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModel": "modeling_evil.EvilModel"}
    config = {"model_type": "evil", "architectures": ["EvilModel"], "auto_map": evil}
    processor = {
        "image_processor_type": "EvilProcessor",
        "auto_map": {"AutoImageProcessor": "modeling_evil.EvilModel"},
    }
    index = {"_class_name": ["pipeline", "EvilPipeline"], "vae": ["modeling_evil", "EvilModel"]}
    jsons = {"config.json": config, "vae/config.json": config, "preprocessor_config.json": processor,
             "model_index.json": index}  # fmt: skip
    repository(hub, "evil/foreign", scripts | {name: json.dumps(each).encode() for name, each in jsons.items()})
    picture = io.BytesIO()
    Image.new("RGB", (40, 40)).save(picture, "png")
    data = {"data.py": code(witness), "evil.py": code(witness), "train/0.png": picture.getvalue()}
    repository(hub, "evil/data", data, "datasets")


REMOTE = {
    "the VAE": lambda name: VAEPlusVAEModel.from_pretrained(name, subfolder="vae"),
    "the encoder": lambda name: VAEPlusEncoderModel.from_pretrained(name),
    "the processor": lambda name: VAEPlusImageProcessor.from_pretrained(name),
    "the pipeline": lambda name: VAEPlusPipeline.from_pretrained(name),
    "AutoConfig": lambda name: AutoConfig.from_pretrained(name, subfolder="vae"),
    "AutoModel": lambda name: AutoModel.from_pretrained(name, subfolder="vae"),
    "DiffusionPipeline": lambda name: DiffusionPipeline.from_pretrained(name),
    "feature extraction": lambda name: pipeline("image-feature-extraction", name),
}


@pytest.mark.parametrize("load", REMOTE.values(), ids=REMOTE)
@pytest.mark.parametrize("name", ["evil/export", "evil/foreign"])
def test_code_of_a_repository_does_not_run_without_trust(name, load, evil, witness):
    with contextlib.suppress(*REFUSALS, KeyError):  # without trust: refused, or loaded with the code that is here
        load(name)
    assert not witness.exists()


def test_with_trust_it_runs(evil, witness):
    AutoConfig.from_pretrained("evil/foreign", trust_remote_code=True)
    assert witness.exists()


@pytest.mark.parametrize(
    "command",
    [
        "sample {} --num_images 2",
        "reconstruct {} {home}/pictures/0.png",
        "encode {} --dataset_name evil/data",
        "evaluate {} --dataset_name evil/data --num_images 2",
        "push {} org/copy",
        "train_vae {}",
        "demo {}",
    ],
)
@pytest.mark.parametrize("name", ["evil/export", "evil/foreign"])
def test_commands_do_not_run_code_of_a_repository(name, command, evil, home, witness, monkeypatch):
    command = command.format(name, home=home)
    if command.startswith("demo"):
        demo = pytest.importorskip("hf_vaeplus.demo", exc_type=ImportError, reason="needs Gradio")
        monkeypatch.setattr(demo, "serve", lambda page, **options: None)
    if command.startswith("train_vae"):
        options = dict(stage="vae", dataset_name="evil/data", resolution=32, autoencoder=name, output_dir="out")
        code, _, errors = captured(lambda: run_command(lambda: run_stage(StageOptions(**options)), []))
    else:
        code, errors = told(*command.split())
    assert not witness.exists()
    if name == "evil/foreign":
        refused(code, errors)
    elif command.split()[0] in ("sample", "reconstruct", "push", "demo"):
        assert code == 0, errors


# ------------------------------------------------------------------------------------------------ ways out of a folder


@pytest.mark.parametrize("variant", ["", ".bf16"])
@pytest.mark.parametrize(
    "where",
    [
        *(f"{place}/secret.safetensors" for place in ("..", "../..", "{root}", "below")),
        *("evil.bin", "model.safetensors.txt", 7, None, ["x"]),
    ],
)
def test_an_index_of_weights_names_files_beside_it(where, variant, planted):
    folder = planted / "run" / "pipeline" / "vae"
    names = list(load_file(folder / "model.safetensors"))
    for place in (folder.parent, folder.parents[1], planted):
        shutil.copy(folder / "model.safetensors", place / "secret.safetensors")
    (folder / "model.safetensors").unlink()
    where = where.format(root=planted) if isinstance(where, str) else where
    path = folder / f"model.safetensors.index{variant}.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, where)}))
    for load in (
        lambda: VAEPlusVAEModel.from_pretrained(folder, variant=variant[1:] or None),
        lambda: AutoModel.from_pretrained(folder, variant=variant[1:] or None),
        lambda: VAEPlusPipeline.from_pretrained(folder.parents[0], variant=variant[1:] or None),
    ):
        with pytest.raises(ValueError, match="expected safetensors files beside it|is damaged|no such modeling files"):
            load()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 5000])
def test_a_damaged_index_is_named(text, planted):
    folder = planted / "run" / "vae"
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="model.safetensors.index.json is damaged .*: save or download"):
        VAEPlusVAEModel.from_pretrained(folder)


def test_an_index_on_the_hub_names_files_of_its_repository(planted, hub):
    weights = (planted / "run" / "vae" / "model.safetensors").read_bytes()
    config = (planted / "run" / "vae" / "config.json").read_bytes()
    (planted / "secret.safetensors").write_bytes(weights)
    names = list(load_file(planted / "secret.safetensors"))
    for where in ("../secret.safetensors", "../../../../secret.safetensors", str(planted / "secret.safetensors")):
        index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, where)}).encode()
        repository(hub, "evil/index", {"config.json": config, "model.safetensors.index.json": index, where: weights})
        with pytest.raises(REFUSALS):
            VAEPlusVAEModel.from_pretrained("evil/index")


@pytest.mark.parametrize("stage", ["../vae", "/etc", "vae/../vae"])
def test_a_config_names_no_other_folders(stage, planted):
    path = planted / "run" / "pipeline" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stages": [stage]}))
    with pytest.raises(ValueError, match="stages must be of autoencoder and vae"):
        VAEPlusEncoderModel.from_pretrained(path.parent)


def test_a_config_does_not_name_its_weights(planted):
    folder = planted / "run" / "vae"
    shutil.move(folder / "model.safetensors", planted / "secret.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_weights": "../../secret.safetensors"}))
    with pytest.raises(ValueError, match="has no field 'transformers_weights'|inside the model directory"):
        VAEPlusVAEModel.from_pretrained(folder)


@pytest.mark.parametrize("where", ["../secret", "{root}/secret"])
def test_checksums_name_files_of_their_checkpoint(where, planted):
    (checkpoint,) = (planted / "run" / "vae").glob("checkpoint-*")
    (checkpoint.parent / "secret").write_text("secret")
    (planted / "secret").write_text("secret")
    path = checkpoint / "checksums.json"
    where = where.format(root=planted)
    path.write_text(json.dumps({**json.loads(path.read_text()), where: sha256(planted / "secret")}))
    with pytest.raises(DamagedCheckpoint, match=f"lacks {where}"):
        check(checkpoint)


@pytest.mark.parametrize("place", ["../other", "/etc", "a/../../b"])
def test_a_subfolder_of_the_repository_is_inside_it(place):
    with pytest.raises(ValueError, match="hub_subfolder must be a folder in the repository"):
        TrainingOptions(hub_subfolder=place)
    TrainingOptions(hub_subfolder="vae/late")


@pytest.mark.parametrize("name", ["README.md", "samples.png"])
def test_a_push_does_not_publish_what_a_link_in_a_card_points_to(name, planted, hub, tmp_path):
    folder = planted / "run" / "pipeline"
    assert told("card", planted / "run", "org/pushed")[0] == 0
    shutil.move(folder / name, folder / f"own-{name}")
    (folder / name).symlink_to(f"own-{name}")  # a link within the folder is as good as the file
    assert told("push", folder, "org/pushed")[0] == 0
    content = hub["org/pushed"].files()[name]
    shutil.move(folder / f"own-{name}", tmp_path / "secret")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "secret")
    code, errors = told("push", folder, "org/other")
    refused(code, errors)
    assert "is a link to" in errors and ("models", "org/other") not in hub.repositories
    # what the Hub's client downloads is links to its blobs
    snapshot = Path(huggingface_hub.snapshot_download("org/pushed"))
    assert (snapshot / name).is_symlink()
    push(VAEPlusPipeline.from_pretrained(snapshot), "org/pushed", card_folder=snapshot)
    assert hub["org/pushed"].files()[name] == content


def test_members_of_an_archive_stay_in_it(hub, tmp_path):
    picture, archive = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (40, 40)).save(picture, "png")
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("train/0.png", "../../escaped.png", str(tmp_path / "absolute.png")):
            file.writestr(name, picture.getvalue())
    repository(hub, "evil/archive", {"train.zip": archive.getvalue()}, "datasets")
    with contextlib.suppress(*REFUSALS):
        load_images("evil/archive", resolution=8, cache_dir=tmp_path / "cache", progress=False)
    assert not [path for path in tmp_path.rglob("*") if path.name in ("escaped.png", "absolute.png")]
    assert not (tmp_path.parent / "escaped.png").exists()


# ------------------------------------------------------------------------------------------------------ secrets

SECRET = "hf_" + "Recognisable" * 3


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leaks(content: dict) -> list[str]:
    return [
        name for name, each in content.items() if SECRET in (each if isinstance(each, str) else each.decode("latin-1"))
    ]


FLAG = ["--hub_token", SECRET]
ADDRESS = f"https://user:{SECRET}@hub.invalid/org/data"
WAYS = {
    "a flag": (["train", "{train}", *FLAG], {}),
    "a flag with its value": (["train", "{train}", f"--hub_token={SECRET}"], {}),
    "a setting": (["train", "{train}", "--set", f"common.hub_token={SECRET}"], {}),
    "the environment": (["train", "{train}", "--report_to", "tensorboard"], {"HF_TOKEN": SECRET}),
    "a flag, with a tracker": (["train", "{train}", *FLAG, "--report_to", "tensorboard"], {}),
    "a flag of a command without it": (["sample", "{run}/pipeline", *FLAG], {}),
    "a mistaken setting": (["train", "{train}", "--set", f"hub_token={SECRET}"], {}),
    "a push with a wrong token": (["push", "{run}/pipeline", "org/x"], {"HF_TOKEN": SECRET}),
    "a sample": (["sample", "{run}/pipeline"], {"HF_TOKEN": SECRET}),
    "an evaluation": (["evaluate", "{run}/pipeline", *DATA.split(), "--num_images", "10"], {"HF_TOKEN": SECRET}),
    "a data set by address": (["train", "{train}", "--dataset_name", ADDRESS], {}),
    "files by address": (["train", "{train}", "--train_data_files", ADDRESS], {}),
    "a folder by address": (["evaluate", "{run}/pipeline", "--train_data_dir", ADDRESS], {}),
    "a repository by address": (["push", "{run}/pipeline", ADDRESS], {}),
    "a model id by address": (["train", "{train}", "--hub_model_id", ADDRESS], {}),
    "a pipeline by address": (["sample", ADDRESS], {}),
    "a column by address": (["train", "{train}", "--image_column", ADDRESS], {}),
    "a revision by address": (
        ["encode", "{run}/pipeline", "--dataset_name", "a/b", "--dataset_revision", ADDRESS],
        {},
    ),
}


@pytest.mark.parametrize("words, environment", WAYS.values(), ids=WAYS)
def test_a_secret_is_written_nowhere(words, environment, finished_run, hub, tmp_path, monkeypatch, caplog, capfd):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VAEPLUS_CACHE", str(finished_run.parent / "cache"))
    train = ["--config", str(finished_run.parent / "tiny.yaml"), "--output_dir", str(tmp_path / "here" / "run")]
    argv = [each for word in words for each in (train if word == "{train}" else [word.format(run=finished_run)])]
    monkeypatch.setattr("sys.argv", ["vaeplus", *argv])
    for more in ([], ["--json"]) if words[0] != "train" else ([],):
        main([*argv, *more])
    written = everything_in(tmp_path / "here")
    shown = capfd.readouterr()
    assert not leaks(written | {"output": shown.out, "errors": shown.err})
    assert not leaks({str(key): b"".join(each.files().values()) for key, each in hub.repositories.items()})


def test_a_secret_of_a_pushed_run_is_written_nowhere(hub, tmp_path, caplog, capfd, monkeypatch, finished_run):
    """A Hub that answers with the token that it was sent, in every error."""
    monkeypatch.setattr("sys.argv", ["vaeplus", "train", *FLAG])
    hub.faults = [Fault(".", status=500, times=10**6)]
    monkeypatch.setattr("hf_vaeplus.hub.client.explain", lambda error: f"Bearer {SECRET} is not accepted")
    options = dict(push_to_hub=True, hub_model_id="org/x", hub_token=SECRET, report_to="tensorboard")
    fit(tmp_path / "here", **options, dataloader_num_workers=0)
    shown = capfd.readouterr()
    assert "Bearer ... is not accepted" in caplog.text
    assert not leaks(everything_in(tmp_path / "here") | {"log": caplog.text, "output": shown.out, "errors": shown.err})
    assert SECRET not in repr(TrainingOptions(hub_token=SECRET))


def test_a_traceback_shows_no_secret(tmp_path):
    """As a program: errors of the program itself, one of them with --debug, and logs with an exception."""
    script = f"""
import logging, sys
from hf_vaeplus.cli.main import run_command
def fail(kind):
    try:
        raise KeyError("{ADDRESS}")
    except KeyError:
        logging.getLogger("anything").exception("see %s", "{SECRET}")
    raise kind("{SECRET}")
try:
    run_command(lambda: fail(RuntimeError))
except RuntimeError:
    sys.excepthook(*sys.exc_info())
sys.argv.append("--debug")
run_command(lambda: fail(ValueError))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("Traceback") == 4, done.stderr
    # the source line of the script itself is not shown for -c
    assert SECRET not in done.stdout + done.stderr
    assert "RuntimeError: ..." in done.stderr and "ValueError: ..." in done.stderr


def test_a_hub_with_a_password_in_its_address(hub, finished_run, tmp_path):
    """HF_ENDPOINT=https://user:password@host, in a process of its own: the client reads it when it is imported."""
    hub.faults = [Fault("org/failed", status=500, times=10**6)]
    environment = {**os.environ, "HF_ENDPOINT": hub.url.replace("://", f"://user:{SECRET}@"), "HF_TOKEN": TOKEN}
    pipeline = str(finished_run / "pipeline")
    commands = [["push", pipeline, "org/address", "--json"], ["push", pipeline, "org/failed"]]
    script = f"from hf_vaeplus.cli.main import main\nfor command in {commands}:\n    main(command)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path / "here", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
    assert SECRET not in done.stdout + done.stderr, done.stdout + done.stderr
    assert not leaks(everything_in(tmp_path / "here"))
    assert not leaks({str(key): b"".join(each.files().values()) for key, each in hub.repositories.items()})


@pytest.mark.parametrize("value", [12345678, ["hf_x"], True])
def test_a_token_of_another_type_is_not_shown(value):
    with pytest.raises(ValueError, match="hub_token must be str or nothing, got (int|list|bool)"):
        TrainingOptions(hub_token=value)
