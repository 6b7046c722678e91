"""Loading a converted model in fresh processes, with and without attnconv, with and without trust in its code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from attnconv.convert import convert_model
from attnconv.convert.bundle import write_self_contained
from attnconv.convert.jsonfiles import read_json
from attnconv.errors import PlanError

PROBE = """
import json
import sys

job = json.loads(sys.argv[1])


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in job["blocked"]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())
if job["first"]:
    import attnconv
import copy
import pickle
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

models = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=job["trust"]) for folder in job["folders"]]
model = models[-1]
ids = torch.tensor(job["ids"])
mask = (ids != 0).long()
arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
with torch.no_grad():
    results = {
        "logits": model(input_ids=ids, attention_mask=mask).logits,
        "copied": pickle.loads(pickle.dumps(copy.deepcopy(model)))(input_ids=ids, attention_mask=mask).logits,
        "cached": model.generate(**arguments),
        "uncached": model.generate(**arguments, use_cache=False),
    }
save_file({name: tensor.contiguous() for name, tensor in results.items()}, job["out"])
if job["again"]:
    model.save_pretrained(job["again"])
cores = [module.attnconv for module in model.modules() if hasattr(module, "attnconv")]
print(json.dumps([type(core).__module__ for core in cores]))
"""
IDS = [[0, 0, 0, 5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]


def build(folder: Path, method: str = "lolcats", **options: Any) -> Path:
    """Save a tiny random model whose attention is replaced."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    convert_model(model, method, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attnconv." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("converted"), window=3)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("flat"), window=3)
    write_self_contained(folder, read_json(folder / "config.json"))
    return folder


class Process:
    """Runs the probe; every process has caches of its own."""

    def __init__(self, repository: Path, place: Path) -> None:
        self.repository = repository
        self.place = place

    def __call__(
        self, *folders: Path, blocked: tuple[str, ...] = (), trust: bool = True, first: bool = False, again: str = ""
    ) -> subprocess.CompletedProcess[str]:
        job = {
            "folders": [str(folder) for folder in folders],
            "blocked": blocked,
            "trust": trust,
            "first": first,
            "again": again,
            "ids": IDS,
            "out": str(self.place / "out.safetensors"),
        }
        environment = os.environ | {
            "PYTHONPATH": str(self.repository / ".dev"),
            "HF_HOME": str(self.place / "hf_home"),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-c", PROBE, json.dumps(job)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)

    def results(self, *folders: Path, **options: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
        """What the probe computed with the last folder's model, and the modules its cores came from."""
        done = self(*folders, **options)
        assert done.returncode == 0, done.stderr
        return load_file(self.place / "out.safetensors"), json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def process(repository: Path, tmp_path: Path) -> Process:
    return Process(repository, tmp_path)


def check(folder: Path, results: dict[str, torch.Tensor]) -> None:
    """The results are those of this process's own model, bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(IDS)
    mask = (ids != 0).long()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(results["logits"], logits)
    assert torch.equal(results["copied"], logits)
    assert torch.equal(results["cached"], results["uncached"])
    assert results["cached"].shape == (2, 22)


def test_without_attnconv_and_without_trust_it_does_not_load(folder: Path, process: Process) -> None:
    done = process(folder, blocked=("attnconv",), trust=False)
    assert done.returncode == 1
    assert "ValueError" in done.stderr.splitlines()[-1] or "attnconv" in done.stderr.splitlines()[-1]


def test_without_attnconv_trust_leads_to_its_installation(folder: Path, process: Process) -> None:
    done = process(folder, blocked=("attnconv",))
    assert done.returncode == 1
    assert "pip install attnconv" in done.stderr


@pytest.mark.parametrize(("trust", "first"), [(False, True), (True, True), (True, False)])
def test_with_attnconv_it_loads_exactly(folder: Path, process: Process, trust: bool, first: bool) -> None:
    results, modules = process.results(folder, trust=trust, first=first)
    check(folder, results)
    assert set(modules) == {"attnconv.attention_modules.linear.lolcats"}


def test_self_contained_file_needs_neither_attnconv_nor_pydantic(flat: Path, process: Process, tmp_path: Path) -> None:
    results, modules = process.results(flat, blocked=("attnconv", "pydantic"), again=str(tmp_path / "again"))
    check(flat, results)
    assert all(module.endswith(".modeling_attnconv") for module in modules)
    assert len(modules) == 2
    # Saved again by that process, it is still self-contained.
    text = (flat / "modeling_attnconv.py").read_text()
    assert (tmp_path / "again" / "modeling_attnconv.py").read_text() == text
    saved = read_json(tmp_path / "again" / "config.json")
    assert {key: saved[key] for key in ("attnconv", "attn_implementation", "auto_map", "architectures")} == {
        key: read_json(flat / "config.json")[key]
        for key in ("attnconv", "attn_implementation", "auto_map", "architectures")
    }
    results, _ = process.results(tmp_path / "again", blocked=("attnconv", "pydantic"))
    check(flat, results)


@pytest.mark.parametrize(("trust", "first"), [(False, True), (True, True), (True, False)])
def test_self_contained_file_leaves_the_work_to_an_installed_attnconv(
    flat: Path, process: Process, trust: bool, first: bool
) -> None:
    results, modules = process.results(flat, trust=trust, first=first)
    check(flat, results)
    assert set(modules) == {"attnconv.attention_modules.linear.lolcats"}


def test_two_self_contained_models_share_one_process(flat: Path, process: Process, tmp_path: Path) -> None:
    other = build(tmp_path / "other", window=2)
    write_self_contained(other, read_json(other / "config.json"))
    results, _ = process.results(flat, other, blocked=("attnconv", "pydantic"))
    check(other, results)


def test_self_contained_models_of_different_methods_ask_for_attnconv(
    flat: Path, process: Process, tmp_path: Path
) -> None:
    other = build(tmp_path / "other", "hedgehog")
    write_self_contained(other, read_json(other / "config.json"))
    done = process(flat, other, blocked=("attnconv", "pydantic"))
    assert done.returncode == 1
    assert "pip install -U attnconv" in done.stderr.splitlines()[-1]
    results, _ = process.results(flat, other)
    check(other, results)


def test_model_with_code_of_its_own_cannot_be_self_contained(folder: Path, tmp_path: Path) -> None:
    config = read_json(folder / "config.json") | {"auto_map": {"AutoModel": "modeling_theirs.Theirs"}}
    with pytest.raises(PlanError, match="--self-contained"):
        write_self_contained(tmp_path, config)
    assert not list(tmp_path.iterdir())


def test_without_its_code_file_the_folder_still_never_loads_as_softmax(
    folder: Path, process: Process, tmp_path: Path
) -> None:
    """Somebody may copy the weights and the config only."""
    bare = tmp_path / "bare"
    bare.mkdir()
    config = read_json(folder / "config.json")
    del config["auto_map"]
    (bare / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors"), bare / "model.safetensors", metadata={"format": "pt"})
    for trust in (False, True):
        done = process(bare, blocked=("attnconv",), trust=trust)
        assert done.returncode == 1
        assert "attnconv" in done.stderr.splitlines()[-1]
