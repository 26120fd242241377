"""The Hub's client: repository ids, uploads beside training, and what its errors mean."""

import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from safetensors import SafetensorError

from ..provenance import redacted

logger = logging.getLogger(__name__)

_WEIGHTS = re.compile(r"model((?:\.[^.]+?)?)(?:-\d{5}-of-\d{5})?\.safetensors")


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


def full_repo_id(repo_id: str, api: HfApi | None = None) -> str:
    """`organisation/name`; a bare name is one of the user whose token is in use. Raises ValueError for an ill id."""
    validate_repo_id(repo_id)
    return repo_id if "/" in repo_id else f"{(api or HfApi()).whoami()['name']}/{repo_id}"


def upload_folder(api: HfApi, folder_path: Path, **options) -> CommitInfo:
    """`HfApi.upload_folder`. Weights replace those in their place on the Hub, be they in one file or in shards."""
    replaced = set()
    for path in folder_path.rglob("*.safetensors"):
        if match := _WEIGHTS.fullmatch(path.name):
            names = [f"model{match[1]}{part}.safetensors" for part in ("", "-?????-of-?????")]
            place = path.parent.relative_to(folder_path)
            replaced |= {(place / name).as_posix() for name in (*names, f"model.safetensors.index{match[1]}.json")}
    try:
        return api.upload_folder(folder_path=folder_path, delete_patterns=sorted(replaced), **options)
    except RuntimeError as error:  # the client's wrapping of what happened to one file
        raise error.__cause__ or error from None


class BackgroundPush:
    """Uploads snapshots of a run from a thread, one at a time. What fails is a warning: the run goes on.

    Args:
        repo_id (`str`): repository, created at the first upload.
        subfolder (`str`): folder in the repository; its root if empty.
        private (`bool`): of a repository that is created.
        token (`str`, *optional*): write token.
        is_new (`bool`): whether what is uploaded differs from what may be there. The pipeline of a repository, of
            which it is a stage in `subfolder`, is then withdrawn until it is pushed again: other stages do not fit.
    """

    def __init__(
        self,
        repo_id: str,
        subfolder: str = "",
        private: bool = False,
        token: str | None = None,
        is_new: bool = True,
    ):
        self.repo_id, self.subfolder, self.private, self._token = repo_id, subfolder, private, token
        self._withdraws = bool(subfolder) and is_new
        self._api = HfApi(token=token)
        self._thread: threading.Thread | None = None
        self._show_bars = not are_progress_bars_disabled()
        disable_progress_bars()  # they would be drawn into that of the training

    def __call__(self, save: Callable[[Path], None], message: str) -> None:
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
            if self._withdraws and self._api.file_exists(repo_id, "model_index.json"):
                indexes = ["model_index.json", "config.json"]  # the second is that of the encoder
                self._api.delete_files(repo_id, indexes, commit_message=f"{message}: the pipeline follows")
            self._withdraws = False
            place = self.subfolder or None
            wanted = dict(repo_id=repo_id, folder_path=folder, path_in_repo=place, commit_message=message)
            upload_folder(self._api, **wanted)
        except Exception as error:  # whatever the network did, training does not depend on it
            self._warn(consequence, error)
            return False
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return True

    def _warn(self, consequence: str, error: Exception):
        logger.warning("push to %s failed, %s: %s", self.repo_id, consequence, redacted(explain(error), self._token))
