"""Push and load back in fresh processes, with the real client on both sides and a Hub on this machine between them."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fresh_process
import pytest
import torch
from hub_server import HubServer
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from attnconv.convert import convert_model
from attnconv.convert.writing.hub import push_folder
from attnconv.convert.writing.self_contained import write_self_contained
from attnconv.files.json_files import read_json

REPO = "tester/tiny"
PUSH = """
import os, sys
from pathlib import Path
from attnconv.convert.writing.hub import push_folder
Path(sys.argv[3]).write_text(str(os.getpid()))
push_folder(sys.argv[1], sys.argv[2])
"""
LOAD = """
import sys
import torch
from safetensors.torch import save_file
if sys.argv[3] == "attnconv":
    import attnconv
else:
    sys.modules["attnconv"] = None
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[3] == "trust")
save_file({"logits": model(torch.arange(1, 41)[None]).logits}, sys.argv[2])
print(sum(hasattr(module, "attnconv") for module in model.modules()))
"""

pytestmark = pytest.mark.compat


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = convert_model(LlamaForCausalLM(config), "lolcats", window=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attnconv." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    """A tiny converted model in several shards, self-contained."""
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="40KB")
    write_self_contained(folder, read_json(folder / "config.json"))
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# Tiny\n")
    return folder


def test_model_comes_back_from_the_hub_as_it_was_pushed(
    hub: HubServer, hub_environment: dict[str, str], model: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert push_folder(folder, REPO, private=True) == f"{hub.url}/{REPO}"
    assert hub.repository(REPO).private
    with torch.no_grad():
        expected = model(torch.arange(1, 41)[None]).logits
    for way in ("attnconv", "trust"):
        done = fresh_process.run("-c", LOAD, REPO, tmp_path / way, way, env=hub_environment)
        assert done.stdout.strip() == "2", done.stderr
        assert torch.equal(load_file(tmp_path / way)["logits"], expected)
    assert hub.calls["stored"] > 0


def test_killed_push_shows_nothing_and_the_next_one_continues(
    hub: HubServer, hub_environment: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    cut = hub.fail("upload", skip=1)
    with ThreadPoolExecutor() as pool:
        push = pool.submit(fresh_process.run, "-c", PUSH, folder, REPO, tmp_path / "pid", env=hub_environment)
        # The client now waits before it tries again.
        assert cut.reached.wait(120)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert push.result().returncode == -signal.SIGKILL
    assert hub.files(REPO) == {}
    hub.repair()
    sent = len(hub.store.objects)
    hub.calls.clear()
    push_folder(folder, REPO)
    assert hub.files(REPO) == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.calls["upload"] == len(list(folder.glob("*.safetensors"))) - sent
