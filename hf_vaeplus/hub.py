"""The Hub: repositories that load with this package or, by explicit trust, without it; uploads beside training."""

import inspect
import json
import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from safetensors import SafetensorError

from . import image_processing_vaeplus, modeling_vaeplus
from .image_processing_vaeplus import VAEPlusImageProcessor
from .modeling_vaeplus import VAEPlusEncoderConfig

logger = logging.getLogger(__name__)

_PACKAGE_ONLY = re.compile(r"^ *# <package-only>\n.*?^ *# </package-only>\n", re.DOTALL | re.MULTILINE)
_SECRETS = re.compile(
    r"(?<=://)[^\s/@\"']+(?=@)"  # user:password of an address
    r"|\bhf_\w{20,}"  # what the Hub's tokens look like
    r"|(?<=--hub_token[ =])(?!expected)[^\s\"']+|(?<=hub_token[=:])(?! expected) ?[^\s\"']+"
)
_WHOSE_CARD = re.compile(r'from_pretrained\("([^"]+)"')


def export(pipe, folder: str | Path, variant: str | None = None, processor: VAEPlusImageProcessor | None = None):
    """Save a pipeline as a repository that loads with this package, and by trust in the code it carries without it.

    Without the package: `DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)`, or
    `AutoModel.from_pretrained(repository, subfolder="vae", trust_remote_code=True)` for a stage.

    Args:
        pipe (`VAEPlusPipeline`): what to save.
        folder: where to; created if it does not exist.
        variant (`str`, *optional*): infix of the names of the weight files, as in `model.bf16.safetensors`.
        processor ([`VAEPlusImageProcessor`], *optional*): what made pictures into training images; with it the
            repository is a feature extractor as well (see `save_feature_extractor`).
    """
    from . import pipeline_vaeplus

    folder = Path(folder)
    pipe.save_pretrained(folder, variant=variant)
    code = inspect.getsource(modeling_vaeplus)
    (folder / "modeling_vaeplus.py").write_text(code)  # where transformers looks
    (folder / "pipeline.py").write_text(_PACKAGE_ONLY.sub("", inspect.getsource(pipeline_vaeplus)))
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "VAEPlusPipeline"]
    for name, component in pipe.components.items():
        if component is None:
            continue
        model, config = type(component).__name__, type(component.config).__name__
        index[name] = ["modeling_vaeplus", model]
        (folder / name / "modeling_vaeplus.py").write_text(code)  # where diffusers looks
        path = folder / name / "config.json"
        auto_map = {"AutoConfig": f"modeling_vaeplus.{config}", "AutoModel": f"modeling_vaeplus.{model}"}
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}, indent=2) + "\n")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    if processor is not None:
        save_feature_extractor(pipe, folder, processor.crop, auto_map=True)
        (folder / "image_processing_vaeplus.py").write_text(inspect.getsource(image_processing_vaeplus))


def save_feature_extractor(pipe, folder: str | Path, crop: int | None = None, auto_map: bool = False):
    """Let `transformers.pipeline("image-feature-extraction", folder)` read a saved pipeline.

    Writes `config.json` (of a [`VAEPlusEncoderModel`], which takes its weights from the pipeline's own folders) and
    `preprocessor_config.json` beside `model_index.json`.

    Args:
        pipe ([`VAEPlusPipeline`]): what is saved in `folder`.
        crop (`int`, *optional*): side of the centre crop of the training images in source pixels.
        auto_map (`bool`): name the classes for `trust_remote_code=True`, in a repository that holds
            `modeling_vaeplus.py` and `image_processing_vaeplus.py`.
    """
    channels, size, _ = pipe.image_shape
    stages = ["vae"] if pipe.autoencoder is None else ["autoencoder", "vae"]
    config, processor = VAEPlusEncoderConfig(stages=stages), VAEPlusImageProcessor(size, channels, crop)
    if auto_map:
        model = "modeling_vaeplus.VAEPlusEncoder"
        config.auto_map = {"AutoConfig": f"{model}Config", "AutoModel": f"{model}Model"}
        processor.auto_map = {"AutoImageProcessor": "image_processing_vaeplus.VAEPlusImageProcessor"}
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def push(
    pipe,
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
        ValueError: an id that the Hub would refuse, a tag that exists, the card of another repository, one that is a
            link to elsewhere, a variant for a repository that holds no such pipeline.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused or failed; what was uploaded is not uploaded again.
    """
    api = HfApi(token=token)
    repo_id = full_repo_id(repo_id, api)
    source = card_folder or pipe.name_or_path
    card, pictures = None, []
    if source and variant is None and Path(source, "README.md").is_file():  # a variant is weights alone
        card, *pictures = (_own(path) for path in (Path(source, "README.md"), *Path(source).glob("*.png")))
    if card and (others := set(_WHOSE_CARD.findall(card.read_text())) - {repo_id}):
        raise ValueError(
            f"{card} is the card of {min(others)}: write one for {repo_id} with `vaeplus card RUN {repo_id}`, or"
            " remove it."
        )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        export(pipe, folder, variant, _processor(source))
        if variant is not None:
            _check_same_pipeline(api, repo_id, revision, folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if tag is not None and tag in [each.name for each in api.list_repo_refs(repo_id).tags]:
            raise ValueError(f"{repo_id} has a tag {tag!r} already: choose another.")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if card is not None:
            for path in (card, *pictures):
                shutil.copy(path, folder)
        elif variant is None and not api.file_exists(repo_id, "README.md", revision=revision):
            from .cards import short_card

            short_card(repo_id, pipe.image_shape[1]).save(folder / "README.md")
        commit = _upload_folder(
            api,
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            allow_patterns=None if variant is None else f"*/*.{variant}.safetensors",
            commit_message=commit_message or f"Upload {'weights' if variant else 'pipeline'}",
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


def _processor(source) -> VAEPlusImageProcessor | None:
    """The image processor beside a saved pipeline, if there is one."""
    try:
        return VAEPlusImageProcessor.from_pretrained(source) if source else None
    except OSError:
        return None


def _upload_folder(api: HfApi, **options):
    try:
        return api.upload_folder(**options)
    except RuntimeError as error:  # the client's wrapping of what happened to one file
        raise error.__cause__ or error from None


def full_repo_id(repo_id: str, api: HfApi | None = None) -> str:
    """`organisation/name`; a bare name is one of the user whose token is in use. Raises ValueError for an ill id."""
    validate_repo_id(repo_id)
    return repo_id if "/" in repo_id else f"{(api or HfApi()).whoami()['name']}/{repo_id}"


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
        with open(api.hf_hub_download(repo_id, name, revision=revision)) as file:
            theirs, ours = json.load(file), json.loads(path.read_text())
        for config in (theirs, ours):
            for varies in ("dtype", "transformers_version", "_name_or_path"):
                config.pop(varies, None)
        if theirs != ours:
            raise ValueError(f"{name} of {repo_id} is not that of this pipeline: push its variants elsewhere.")


def redacted(text: str, *secrets: str | None) -> str:
    """`text` without `secrets`, the Hub's token in use, what looks like one, and what stands before a host's name."""
    for secret in (*secrets, get_token()):
        if secret and len(secret) >= 8:
            text = text.replace(secret, "...")
    return _SECRETS.sub("...", text)


def redact_record(record: logging.LogRecord) -> bool:
    """A filter for handlers of `logging`: takes secrets out of what is about to be written, tracebacks included."""
    record.msg, record.args = redacted(record.getMessage()), None
    if record.exc_info:
        record.exc_text = redacted(logging.Formatter().formatException(record.exc_info))
    return True


def explain(error: Exception) -> str:
    """What an error of the Hub's client means for its user; one sentence, without secrets."""
    if isinstance(error, LocalTokenNotFoundError):
        return "this needs a token of the Hub: log in with `hf auth login`, or set HF_TOKEN"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    reason = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
    reason = redacted(" ".join(reason.split()))
    if status == 401:
        return f"the Hub does not accept the token: log in with `hf auth login`, or set HF_TOKEN ({reason})"
    if status == 403:
        return f"the Hub refuses: the token may not do this here, use one with write access ({reason})"
    if status == 404:
        return f"the Hub has no such repository or file, or hides it from this token: check the name ({reason})"
    if status is not None:
        return f"the Hub failed: try again later, nothing that arrived is sent twice ({reason})"
    if isinstance(error, HTTPError | ConnectionError | TimeoutError):
        return f"the Hub did not answer: try again, or use what is on this machine ({reason})"
    return reason


class BackgroundPush:
    """Uploads snapshots of a run from a thread, one at a time. What fails is a warning: the run goes on.

    Args:
        repo_id (`str`): repository, created at the first upload.
        subfolder (`str`): folder in the repository; its root if empty.
        private (`bool`): of a repository that is created.
        token (`str`, *optional*): write token.
    """

    def __init__(self, repo_id: str, subfolder: str = "", private: bool = False, token: str | None = None):
        self.repo_id, self.subfolder, self.private, self._token = repo_id, subfolder, private, token
        self._api = HfApi(token=token)
        self._thread: threading.Thread | None = None
        self._show_bars = not are_progress_bars_disabled()
        disable_progress_bars()  # they would be drawn into that of the training

    def __call__(self, save: Callable[[Path], None], message: str):
        """Upload what `save(folder)` writes now, meanwhile; nothing is done while another upload is under way."""
        if self._thread is not None and self._thread.is_alive():
            return
        retry = "the run goes on, and pushes again at its next checkpoint and at its end"
        # A daemon: a run that dies does not wait for the network; the Hub takes whole commits or nothing.
        if (folder := self._written(save, retry)) is not None:
            self._thread = threading.Thread(target=self._upload, args=(folder, message, retry), daemon=True)
            self._thread.start()

    def finish(self, save: Callable[[Path], None], message: str) -> bool:
        """Wait for the upload that is under way, then upload the end of the run; whether that succeeded."""
        if self._thread is not None:
            self._thread.join()
        again = "the model is on disk; the same command, resumed, pushes it again"
        folder = self._written(save, again)
        done = folder is not None and self._upload(folder, message, again)
        if self._show_bars:
            enable_progress_bars()
        return done

    def _written(self, save: Callable[[Path], None], consequence: str) -> Path | None:
        """A new temporary folder, after `save(folder)`; `None` if there is no room for it."""
        folder = None
        try:
            folder = Path(tempfile.mkdtemp())
            save(folder)
        except (OSError, SafetensorError) as error:
            self._warn(consequence, error)
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            return None
        return folder

    def _upload(self, folder: Path, message: str, consequence: str) -> bool:
        try:
            repo_id = self._api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
            place = self.subfolder or None
            wanted = dict(repo_id=repo_id, folder_path=folder, path_in_repo=place, commit_message=message)
            _upload_folder(self._api, **wanted)
        except Exception as error:  # whatever the network did, training does not depend on it
            self._warn(consequence, error)
            return False
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return True

    def _warn(self, consequence: str, error: Exception):
        logger.warning("push to %s failed, %s: %s", self.repo_id, consequence, redacted(explain(error), self._token))
