"""What the tests of the surgery share: a Hub on this machine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import OWNER, HubServer


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on 127.0.0.1 that this process's Hub client talks to, logged in as its user `tester`."""
    from huggingface_hub import constants

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", OWNER)
        yield server


@pytest.fixture
def hub_environment(hub: HubServer, repository: Path, tmp_path: Path) -> dict[str, str]:
    """Environment of a fresh process that talks to `hub`, with caches of its own and the package importable."""
    return os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": OWNER,
        "PYTHONPATH": str(repository / ".dev"),
    }
