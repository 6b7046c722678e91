"""Push and load back in fresh processes, with the real client on both sides and a Hub on this machine between them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file

REPO = "tester/tiny"
PUSH = """
import sys
from attnconv.convert.hub import push_folder
print(push_folder(sys.argv[1], sys.argv[2], private=True))
"""
LOAD = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
save_file({"logits": model(torch.arange(1, 41)[None]).logits}, sys.argv[2])
"""


def run(code: str, *arguments: object, environment: dict[str, str]) -> str:
    """What a fresh Python process prints; its failure is the test's."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random model in several shards, marked as converted with nothing converted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attnconv={"version": 1, "modules": {}},
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model"


def test_model_comes_back_from_the_hub_as_it_was_pushed(
    hub: HubServer, hub_environment: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert run(PUSH, folder, REPO, environment=hub_environment) == f"{hub.url}/{REPO}"
    assert hub.repository(REPO).private
    for source, name in ((folder, "local"), (REPO, "loaded")):
        run(LOAD, source, tmp_path / name, environment=hub_environment)
    local, loaded = (load_file(tmp_path / name)["logits"] for name in ("local", "loaded"))
    assert torch.equal(loaded, local)
    assert hub.calls["stored"] > 0


def test_killed_push_shows_nothing_and_the_next_one_continues(
    hub: HubServer, hub_environment: dict[str, str], folder: Path
) -> None:
    cut = hub.fail("upload", skip=1)
    with subprocess.Popen([sys.executable, "-c", PUSH, str(folder), REPO], env=hub_environment) as push:
        # The client now waits before it tries again.
        assert cut.reached.wait(120)
        push.send_signal(signal.SIGKILL)
    assert push.returncode == -signal.SIGKILL
    assert hub.files(REPO) == {}
    hub.repair()
    sent = len(hub.store.objects)
    hub.calls.clear()
    run(PUSH, folder, REPO, environment=hub_environment)
    assert hub.files(REPO) == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.calls["upload"] == len(list(folder.glob("*.safetensors"))) - sent
