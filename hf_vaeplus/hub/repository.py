"""Repositories that load with this package or, by explicit trust in the code they carry, without it."""

import inspect
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from .. import image_processing_vaeplus, modeling_detail, modeling_priors, modeling_vaeplus, pipeline_vaeplus
from ..directions import FILE as DIRECTIONS
from ..files import follow_umask
from .cards import check_weights_of_card, short_card
from .client import full_repo_id, upload_folder

if TYPE_CHECKING:
    from ..pipeline_vaeplus import VAEPlusPipeline

# Where the classes of other components than autoencoders and VAEs are defined.
_MODULES = {
    modeling_priors.VAEPlusPriorModel: "modeling_priors",
    modeling_detail.VAEPlusDetailModel: "modeling_detail",
}
_WHOSE_CARD = re.compile(r'from_pretrained\("([^"]+)"')


def export(pipe: "VAEPlusPipeline", folder: str | Path, variant: str | None = None, weights: str = "float32") -> None:
    """Save a pipeline as a repository that loads with this package, and by trust in the code it carries without it.

    Without the package: `DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)`, or
    `AutoModel.from_pretrained(repository, subfolder="vae", trust_remote_code=True)` for a stage, or
    `pipeline("image-feature-extraction", repository, trust_remote_code=True)` of transformers for features.

    Args:
        pipe (`VAEPlusPipeline`): what to save.
        folder: where to; created if it does not exist.
        variant (`str`, *optional*): infix of the names of the weight files, as in `model.bf16.safetensors`.
        weights (`"float32" | "bf16"`): how matrices and kernels are stored. The models load and compute in float32
            either way; `"bf16"` halves the files and rounds each of these weights by at most 0.4%.
    """
    folder = Path(folder)
    pipe.save_pretrained(folder, variant=variant)
    if weights == "bf16":
        for name, component in pipe.components.items():
            if component is not None:
                _store_in_bf16(component, folder / name / "model.safetensors")
    modules = (modeling_vaeplus, modeling_priors, modeling_detail)
    code = {module.__name__.split(".")[-1]: inspect.getsource(module) for module in modules}
    (folder / "pipeline.py").write_text(inspect.getsource(pipeline_vaeplus), encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["_class_name"] = ["pipeline", "VAEPlusPipeline"]
    index.pop("_name_or_path", None)  # a folder of this machine
    for name, component in pipe.components.items():
        if component is None:
            continue
        model, config = type(component).__name__, type(component.config).__name__
        module = next((name for kind, name in _MODULES.items() if isinstance(component, kind)), "modeling_vaeplus")
        index[name] = [module, model]
        for each in {"modeling_vaeplus", module}:
            (folder / f"{each}.py").write_text(code[each], encoding="utf-8")  # where transformers looks
        # Where diffusers looks. It brings no other file of the folder, so one file holds what the other imports.
        whole = code[module] if module == "modeling_vaeplus" else _joined(code["modeling_vaeplus"], code[module])
        (folder / name / f"{module}.py").write_text(whole, encoding="utf-8")
        _name_classes(folder / name / "config.json", module, AutoConfig=config, AutoModel=model)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "image_processing_vaeplus.py").write_text(inspect.getsource(image_processing_vaeplus), encoding="utf-8")
    _name_classes(folder / "config.json", AutoConfig="VAEPlusEncoderConfig", AutoModel="VAEPlusEncoderModel")
    _name_classes(
        folder / "preprocessor_config.json", "image_processing_vaeplus", AutoImageProcessor="VAEPlusImageProcessor"
    )


def _joined(code: str, later: str) -> str:
    """Two modules as one: the later one without its import of the other."""
    without, count = re.subn(r"^from \.modeling_vaeplus import \(.*?\)\n", "", later, flags=re.DOTALL | re.MULTILINE)
    assert count == 1, "a module of models must have one import of modeling_vaeplus.py, in parentheses"
    return f"{code}\n\n{without}"


def _store_in_bf16(model: PreTrainedModel, path: Path):
    """Vectors and buffers stay as they are: gamma, biases and statistics are few, and they want their digits."""
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    tensors = load_file(path)
    rounded = {name: tensor.to(torch.bfloat16) if name in matrices else tensor for name, tensor in tensors.items()}
    save_file(rounded, path, metadata={"format": "pt"})
    follow_umask(path)


def export_with_card(pipe: "VAEPlusPipeline", folder: str | Path, weights: str = "float32") -> list[Path]:
    """Write the repository that [`push`] would upload: [`export`], with the card and the pictures beside the pipeline.

    Args:
        pipe (`VAEPlusPipeline`): a pipeline that was loaded from a folder with a `README.md`.
        folder, weights: as in [`export`].

    Returns:
        The files of the repository, with their paths from `folder`.

    Raises:
        ValueError: there is no card beside the pipeline, it is a link to elsewhere, or it tells of other weights.
        FileExistsError: `folder` holds files already.
    """
    folder, source = Path(folder), Path(pipe.name_or_path)
    if not (source / "README.md").is_file():
        raise ValueError(f"{source} has no README.md: write one with `vaeplus card RUN REPO_ID`.")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder.")
    if not is_repository(source):  # whose card and weights have gone together ever since
        check_weights_of_card(source)
    export(pipe, folder, weights=weights)
    for path in _card_and_more(source):
        shutil.copyfile(path, folder / path.name)  # with the permissions of a new file
    return _files_of(folder)


def is_repository(folder: str | Path) -> bool:
    """Whether a folder is one that [`export_with_card`] wrote: code and card lie beside the weights."""
    return all(Path(folder, name).is_file() for name in ("pipeline.py", "README.md"))


def _files_of(folder: Path) -> list[Path]:
    """The files of an exported repository and no others."""
    patterns = (
        "README.md",
        "*.png",
        "*.json",
        "*.py",
        DIRECTIONS,
        "*/*.json",
        "*/*.py",
        "*/*.safetensors",
    )
    return sorted(path.relative_to(folder) for pattern in patterns for path in folder.glob(pattern))


def _card_and_more(folder: Path) -> list[Path]:
    """What lies beside a pipeline and belongs to it, the card first, then pictures and named directions."""
    pictures = sorted(folder.glob("*.png"))
    return [_own(path) for path in (folder / "README.md", *pictures, *folder.glob(DIRECTIONS))]


def _name_classes(path: Path, module: str = "modeling_vaeplus", **classes: str):
    """Write into a JSON file which class of the repository's code reads it by `trust_remote_code=True`."""
    auto_map = {name: f"{module}.{class_name}" for name, class_name in classes.items()}
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), "auto_map": auto_map}, indent=2) + "\n",
        encoding="utf-8",
    )


def push(
    pipe: "VAEPlusPipeline",
    repo_id: str,
    *,
    card_folder: str | Path | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    variant: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a pipeline in one commit; `VAEPlusPipeline.push_to_hub` with the folder of the card left open.

    Args:
        pipe (`VAEPlusPipeline`): what to upload.
        repo_id (`str`): `organisation/name`, or `name` for a repository of the user; created if it does not exist.
        card_folder: folder with the `README.md` and the PNGs to go with it. By default the one that the pipeline was
            loaded from; without a `README.md` there, a repository that has none gets a short card.
        private, revision, tag, variant, commit_message, token: see `VAEPlusPipeline.push_to_hub`.

    Returns:
        `str`: address of the commit.

    Raises:
        ValueError: an id that the Hub would refuse, a tag that exists, the card of another repository or of other
            weights, one that is a link to elsewhere, a variant for a repository that holds no such pipeline.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused or failed; what was uploaded is not uploaded again.
    """
    api = HfApi(token=token)
    repo_id = full_repo_id(repo_id, api)
    source = card_folder or pipe.name_or_path
    with_card = source and variant is None and Path(source, "README.md").is_file()  # a variant is weights alone
    if with_card:
        _check_card(Path(source), repo_id)
        if not is_repository(source):
            check_weights_of_card(Path(source))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        export(pipe, folder, variant)
        if variant is not None:
            _check_same_pipeline(api, repo_id, revision, folder)
        _open_repository(api, repo_id, private, revision, tag)
        if with_card:
            for path in _card_and_more(Path(source)):
                shutil.copyfile(path, folder / path.name)
        elif variant is None and not api.file_exists(repo_id, "README.md", revision=revision):
            short_card(repo_id, pipe.image_shape[1]).save(folder / "README.md")
        return _upload(
            api,
            repo_id,
            folder,
            revision,
            tag,
            commit_message or f"Upload {'weights' if variant else 'pipeline'}",
            "*" if variant is None else f"*/*.{variant}.safetensors",
        )


def push_repository(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a folder that [`export_with_card`] wrote, in one commit and byte for byte.

    Arguments, result and errors are those of [`push`].
    """
    api, folder = HfApi(token=token), Path(folder)
    repo_id, files = full_repo_id(repo_id, api), [path.as_posix() for path in _files_of(folder)]
    _check_card(folder, repo_id)
    for name in files:
        _own(folder / name)
    _open_repository(api, repo_id, private, revision, tag)
    return _upload(api, repo_id, folder, revision, tag, commit_message or "Upload pipeline", files)


def _check_card(folder: Path, repo_id: str):
    """Raises ValueError for the card of another repository, or one that is a link to elsewhere."""
    card, *_ = _card_and_more(folder)
    if others := set(_WHOSE_CARD.findall(card.read_text(encoding="utf-8"))) - {repo_id}:
        raise ValueError(
            f"{card} is the card of {min(others)}: write one for {repo_id} with `vaeplus card RUN {repo_id}`, or"
            " remove it."
        )


def _open_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None, tag: str | None):
    """Make the repository and its branch, if need be; raises ValueError for a tag that exists."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if tag is not None and tag in [each.name for each in api.list_repo_refs(repo_id).tags]:
        raise ValueError(f"{repo_id} has a tag {tag!r} already: choose another.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _upload(api: HfApi, repo_id: str, folder: Path, revision, tag, message: str, allow_patterns) -> str:
    """One commit, with its tag; returns the address of the commit."""
    commit = upload_folder(
        api,
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        allow_patterns=allow_patterns,
        commit_message=message,
    )
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit.commit_url


def _own(path: Path) -> Path:
    """`path`, unless it is a link to what is not in its folder: that could be anything, and would be published.

    What the Hub's client downloads is links into the repository's `blobs`, two folders above.
    """
    folder, target = path.parent.resolve(), path.resolve()
    if not target.is_relative_to(folder) and target.parent != folder.parent.parent / "blobs":
        raise ValueError(f"{path} is a link to {target}, outside its folder: put the file itself there, or remove it.")
    return path


def _check_same_pipeline(api: HfApi, repo_id: str, revision: str | None, folder: Path):
    """A variant is another set of weights of the same pipeline: configs and index are not uploaded again."""
    for path in sorted(folder.glob("*/config.json")):
        name = path.relative_to(folder).as_posix()
        try:
            there = api.file_exists(repo_id, name, revision=revision)
        except RepositoryNotFoundError:
            there = False
        if not there:
            raise ValueError(f"{repo_id} has no {name}: push the pipeline itself first, then its variants.")
        with open(api.hf_hub_download(repo_id, name, revision=revision), encoding="utf-8") as file:
            theirs, ours = json.load(file), json.loads(path.read_text(encoding="utf-8"))
        for config in (theirs, ours):
            for varies in ("dtype", "transformers_version", "_name_or_path"):
                config.pop(varies, None)
        if theirs != ours:
            raise ValueError(f"{name} of {repo_id} is not that of this pipeline: push its variants elsewhere.")
