"""Loading a converted model in fresh processes, with and without attnconv, with and without trust in its code."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import fresh_process
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig, PreTrainedModel

from attnconv.convert import convert_model
from attnconv.convert.writing.self_contained import write_self_contained
from attnconv.errors import INSTALL, PlanError
from attnconv.files.json_files import read_json

# Each set of models in a process that has not met attnconv before.
PROGRAM = """
import copy
import json
import pickle
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama import modeling_llama


class Blocker:
    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def run(job):
    for name in [name for name in sys.modules if name.partition(".")[0] in job["blocked"]]:
        del sys.modules[name]
    sys.meta_path.insert(0, Blocker(job["blocked"]))
    if job["first"]:
        import attnconv
        if job["lacking"]:
            from attnconv.attention_modules import registry
            del registry._METHODS[job["lacking"]]
    models = []
    for folder in job["folders"]:
        if folder == "attnconv":
            # It is installed only now.
            sys.meta_path.pop(0)
            import attnconv
            continue
        models.append(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=job["trust"]))
    for number, model in enumerate(models):
        look_at(model, job, number)


def look_at(model, job, number):
    ids = torch.tensor(job["ids"])
    arguments = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    length = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        results = {
            "logits": model(**arguments).logits,
            "copied": pickle.loads(pickle.dumps(copy.deepcopy(model)))(**arguments).logits,
            "cached": model.generate(**arguments, **length),
            "uncached": model.generate(**arguments, **length, use_cache=False),
        }
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, f"{job['out']}{number}")
    if job["again"]:
        model.save_pretrained(job["again"])
    parts = [module.attnconv for module in model.modules() if hasattr(module, "attnconv")]
    layers = DynamicCache(config=model.config).layers
    parts += layers
    assert not any(layer.inner for layer in layers)
    with open(f"{job['parts']}{number}", "w") as file:
        json.dump([type(part).__module__ for part in parts], file)


run(json.loads(sys.argv[1]))
"""
# What transformers says of a model that names an attention it does not know.
NOT_SUPPORTED = 'Specified `attn_implementation="attnconv"` is not supported'
CACHE = "attnconv.convert.surgery.cache_layer"
FROM_PACKAGE = ["attnconv.attention_modules.linear.lolcats"] * 2 + [CACHE] * 2
BLOCKED = ("attnconv", "pydantic")
IDS = [[0, 0, 0, 5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]


def build(folder: Path, method: str = "lolcats", kind: type[PreTrainedConfig] = LlamaConfig, **options: Any) -> Path:
    """Save a tiny random model whose attention is replaced."""
    torch.manual_seed(0)
    config = kind(
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
    """Loads models in a process of their own and looks at them."""

    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        self.place = place
        self.environment = environment

    def error(self, *folders: Path, **options: Any) -> str:
        """What the process complains about in the end; None of its complaints is the test's failure."""
        code, log = self._run(*folders, **options)
        assert code == 1, log
        return log

    def results(self, *folders: Path, **options: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
        """What was computed with the last folder's model, and the modules that its cores and cache layers came from."""
        return self.all_results(*folders, **options)[-1]

    def all_results(self, *folders: Path | str, **options: Any) -> list[tuple[dict[str, torch.Tensor], list[str]]]:
        """The same of every model once all are loaded; `"attnconv"` among the folders unblocks and imports it there."""
        code, log = self._run(*folders, **options)
        assert code == 0, log
        numbers = range(len([folder for folder in folders if folder != "attnconv"]))
        return [
            (load_file(self.place / f"out{n}"), json.loads((self.place / f"parts{n}").read_text())) for n in numbers
        ]

    def _run(
        self,
        *folders: Path | str,
        blocked: tuple[str, ...] = (),
        trust: bool = True,
        first: bool = False,
        again: str = "",
        lacking: str = "",
    ) -> tuple[int, str]:
        job = {
            "lacking": lacking,
            "folders": [str(folder) for folder in folders],
            "blocked": blocked,
            "trust": trust,
            "first": first,
        }
        places = {name: str(self.place / name) for name in ("out", "parts")}
        text = json.dumps({**job, **places, "again": again, "ids": IDS})
        done = fresh_process.run("-c", PROGRAM, text, env=self.environment)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def process(repository: Path, tmp_path: Path) -> Process:
    places = {"PYTHONPATH": str(repository / ".dev"), "HF_HOME": str(tmp_path / "hf_home")}
    return Process(tmp_path, {**os.environ, **places})


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
    assert NOT_SUPPORTED in process.error(folder, blocked=("attnconv",), trust=False)


def test_without_attnconv_trust_leads_to_its_installation(folder: Path, process: Process) -> None:
    error = process.error(folder, blocked=("attnconv",))
    assert f"This model needs attnconv: {INSTALL}" in error
    # There is no such package on the index, and whoever puts one there must not be run.
    assert "pip install attnconv" not in error


@pytest.mark.parametrize(
    ("trust", "first"), [(False, True), (True, False), pytest.param(True, True, marks=pytest.mark.slow)]
)
def test_with_attnconv_it_loads_exactly(folder: Path, process: Process, trust: bool, first: bool) -> None:
    results, modules = process.results(folder, trust=trust, first=first)
    check(folder, results)
    assert modules == FROM_PACKAGE


def test_self_contained_file_needs_neither_attnconv_nor_pydantic(flat: Path, process: Process, tmp_path: Path) -> None:
    results, modules = process.results(flat, blocked=BLOCKED, again=str(tmp_path / "again"))
    check(flat, results)
    assert all(module.endswith(".modeling_attnconv") for module in modules)
    assert len(modules) == 4
    assert len(set(modules)) == 1
    # Saved again by that process, it is still self-contained.
    text = (flat / "modeling_attnconv.py").read_text()
    assert (tmp_path / "again" / "modeling_attnconv.py").read_text() == text
    saved = read_json(tmp_path / "again" / "config.json")
    assert {key: saved[key] for key in ("attnconv", "attn_implementation", "auto_map", "architectures")} == {
        key: read_json(flat / "config.json")[key]
        for key in ("attnconv", "attn_implementation", "auto_map", "architectures")
    }
    results, _ = process.results(tmp_path / "again", blocked=BLOCKED)
    check(flat, results)


@pytest.mark.parametrize(
    ("trust", "first"), [(False, True), (True, False), pytest.param(True, True, marks=pytest.mark.slow)]
)
def test_self_contained_file_leaves_the_work_to_an_installed_attnconv(
    flat: Path, process: Process, trust: bool, first: bool
) -> None:
    results, modules = process.results(flat, trust=trust, first=first)
    check(flat, results)
    assert modules == FROM_PACKAGE


def test_two_self_contained_models_share_one_process(flat: Path, process: Process, tmp_path: Path) -> None:
    other = build(tmp_path / "other", window=2)
    write_self_contained(other, read_json(other / "config.json"))
    results, modules = process.results(flat, other, blocked=BLOCKED)
    check(other, results)
    # The first of the two files serves both.
    assert len(set(modules)) == 1


def test_self_contained_models_of_different_methods_share_one_process(
    flat: Path, process: Process, tmp_path: Path
) -> None:
    other = build(tmp_path / "other", "hedgehog")
    write_self_contained(other, read_json(other / "config.json"))
    for order in ((flat, other, flat), (other, flat, other)):
        found = process.all_results(*order, blocked=BLOCKED)
        for place, (results, modules) in zip(order, found, strict=True):
            check(place, results)
            assert len(modules) == 4
            assert len(set(modules)) == 1
        # Each file has served its own models.
        assert found[0][1] == found[2][1] != found[1][1]


@pytest.mark.parametrize("name", ["lolcats", "hedgehog"])
def test_an_attnconv_that_comes_later_serves_what_is_loaded_from_then_on(
    flat: Path, folder: Path, process: Process, tmp_path: Path, name: str
) -> None:
    later = folder if name == "lolcats" else build(tmp_path / "later", name)
    found = process.all_results(flat, "attnconv", later, blocked=("attnconv",))
    for place, (results, _) in zip((flat, later), found, strict=True):
        check(place, results)
    assert all(module.endswith(".modeling_attnconv") for module in found[0][1])
    assert all(module.startswith("attnconv.") for module in found[1][1])


def test_a_file_serves_its_model_beside_an_attnconv_that_lacks_its_method(
    flat: Path, folder: Path, process: Process, tmp_path: Path
) -> None:
    other = build(tmp_path / "other", "hedgehog")
    write_self_contained(other, read_json(other / "config.json"))
    found = process.all_results(folder, other, flat, first=True, lacking="hedgehog")
    for place, (results, _) in zip((folder, other, flat), found, strict=True):
        check(place, results)
    assert [modules[0].startswith("attnconv.") for _, modules in found] == [True, False, True]


def test_self_contained_file_serves_a_family_whose_weights_are_stored_otherwise(
    process: Process, tmp_path: Path
) -> None:
    """Mixtral's experts lie in files one by one and in memory fused."""
    mixtral = build(tmp_path / "mixtral", kind=MixtralConfig, window=3)
    write_self_contained(mixtral, read_json(mixtral / "config.json"))
    results, modules = process.results(mixtral, blocked=BLOCKED)
    check(mixtral, results)
    assert len(modules) == 4


def test_one_copy_of_the_package_serves_this_process(repository: Path) -> None:
    """Two would each bring hooks and cache layers of their own."""
    source = repository / "convert" / "surgery" / "cache_layer.py"
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    assert [name for name, file in files.items() if file and Path(file).resolve() == source] == [CACHE]


def test_model_with_code_of_its_own_cannot_be_self_contained(folder: Path, tmp_path: Path) -> None:
    config = read_json(folder / "config.json") | {
        "architectures": ["Theirs"],
        "auto_map": {"AutoModel": "modeling_theirs.Theirs"},
    }
    with pytest.raises(PlanError, match="Theirs is no class of transformers.*--self-contained"):
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
        assert NOT_SUPPORTED in process.error(bare, blocked=("attnconv",), trust=trust)
