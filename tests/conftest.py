"""Every client of the Hub in the tests and in the processes they start talks to a Hub on loopback alone."""

import atexit
import os
import sys
import tempfile

import pytest
from loopback_hub import TOKEN, LoopbackHub

assert "huggingface_hub" not in sys.modules, "it reads HF_ENDPOINT when it is imported"
_hub = LoopbackHub()
_home = tempfile.TemporaryDirectory(prefix="vaeplus-hub-")
atexit.register(_home.cleanup)
os.environ.pop("HF_HUB_OFFLINE", None)
os.environ |= {
    "HF_ENDPOINT": _hub.url,
    "HF_HOME": _home.name,
    "HF_TOKEN": TOKEN,
    "HF_HUB_DISABLE_XET": "1",  # the Hub's other protocol of transfer
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

import datasets  # noqa: E402, F401  # remembers whether it was imported offline, as some tests are


@pytest.fixture
def hub():
    """The Hub that the client talks to, empty."""
    _hub.reset()
    return _hub
