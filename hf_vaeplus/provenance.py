"""What a result says of its making, without secrets; and what weights are, by their content."""

import hashlib
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import get_token
from safetensors import SafetensorError

if TYPE_CHECKING:  # help and refusals do without it
    import torch

_SECRETS = re.compile(
    r"(?<=://)[^\s/@\"']+(?=@)"  # user:password of an address
    r"|\bhf_\w{20,}"  # what the Hub's tokens look like
    r"|(?<=--hub_token[ =])(?!expected)[^\s\"']+|(?<=hub_token[=:])(?! expected) ?[^\s\"']+"
)


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


@cache
def _commit() -> str | None:
    """Of the code, at the first call: a long process must not name what was committed while it ran."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    except OSError:  # there is no git here
        return None
    return git.stdout.strip() or None


def provenance() -> dict:
    """What a number needs to be believed: the command, the commit, the date, the machine and the versions.

    Absolute paths in the command are cut to their last part: where a folder lay on a machine concerns nobody. Tokens
    are left out.
    """
    import torch

    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv]
    if words[0] == "__main__.py":  # of `python -m hf_vaeplus.cli`
        words[0] = "vaeplus"
    return {
        "command": redacted(" ".join(words)),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.cuda.device_count()} GPUs",
        "versions": {package: version(package) for package in ("torch", "transformers", "diffusers")},
    }


def hash_weights(digest, tensors: Mapping[str, "torch.Tensor"]):
    """Feed the names and the values of a model's `state_dict` to a hash of `hashlib`."""
    import torch

    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + values.numpy().tobytes())


def weights_fingerprint(tensors: Mapping[str, "torch.Tensor"]) -> str:
    """What identifies a model's `state_dict`, wherever and in whichever files it is stored: 32 hexadecimal digits."""
    digest = hashlib.sha256()
    hash_weights(digest, tensors)
    return digest.hexdigest()[:32]


def stage_fingerprints(stages: "Mapping[str, torch.nn.Module | None]") -> dict[str, str]:
    """[`weights_fingerprint`] of each stage of a pipeline that is not `None`."""
    return {name: weights_fingerprint(stage.state_dict()) for name, stage in stages.items() if stage is not None}


def folder_fingerprint(folder: str | Path) -> str | None:
    """[`weights_fingerprint`] of the model that is saved in `folder`; `None` if there is none, or a damaged one."""
    from safetensors.torch import load_file

    whole = Path(folder, "model.safetensors")
    files = [whole] if whole.is_file() else sorted(Path(folder).glob("model-*-of-*.safetensors"))
    try:
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError):
        return None
    return weights_fingerprint(tensors) if tensors else None
