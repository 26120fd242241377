"""What a result says of its making, without secrets."""

import logging
import os
import platform
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from huggingface_hub import get_token

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
    import diffusers
    import torch
    import transformers

    words = [os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv]
    if words[0] == "__main__.py":  # of `python -m hf_vaeplus.cli`
        words[0] = "vaeplus"
    return {
        "command": redacted(" ".join(words)),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.cuda.device_count()} GPUs",
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, diffusers)},
    }
