"""A converted model whose config.json was damaged never loads with fewer converted layers than were saved."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from attnconv.convert import convert_model, converted_modules
from attnconv.convert.planning.plan import Plan
from attnconv.convert.planning.section import sealed
from attnconv.convert.reading.checkpoint import open_checkpoint
from attnconv.errors import AttnConvError, PlanError

FIRST = "model.layers.0.self_attn"


@pytest.fixture(scope="module", params=["lolcats", "sliding_window"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    convert_model(tiny_models.tiny_llama(), request.param, window=3).save_pretrained(folder)
    return folder


@pytest.fixture
def config(saved: Path) -> Any:
    """The config.json of the saved model, restored afterwards."""
    path = saved / "config.json"
    text = path.read_text()
    yield json.loads(text)
    path.write_text(text)


def write(saved: Path, config: dict[str, Any]) -> None:
    (saved / "config.json").write_text(json.dumps(config))


def section(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda config: change(config["attnconv"])


def entry(**values: Any) -> Callable[[dict[str, Any]], Any]:
    def change(config: dict[str, Any]) -> None:
        config["attnconv"]["modules"][FIRST].update(values)
        config["attnconv"] = sealed(config["attnconv"])

    return change


def geometry(**values: Any) -> Callable[[dict[str, Any]], Any]:
    def change(config: dict[str, Any]) -> None:
        config["attnconv"]["modules"][FIRST]["geometry"].update(values)
        config["attnconv"] = sealed(config["attnconv"])

    return change


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no section": (lambda config: config.pop("attnconv"), "section 'attnconv'.* is missing|is damaged.*convert again"),
    "a number": (lambda config: config.update(attnconv=5), "it is 5"),
    "a list": (lambda config: config.update(attnconv=[]), r"it is \[\]"),
    "null": (lambda config: config.update(attnconv=None), "missing"),
    "nothing in it": (section(lambda s: s.clear()), "has no version"),
    "no modules": (section(lambda s: s.pop("modules")), "modules are missing"),
    "empty modules": (section(lambda s: s.update(modules={})), r"modules are \{\}"),
    "a number of modules": (section(lambda s: s.update(modules=2)), "modules are 2"),
    "a lost module": (section(lambda s: s["modules"].pop(FIRST)), "its digest differs"),
    "another option": (section(lambda s: s["modules"][FIRST]["options"].update(window=4)), "its digest differs"),
    "a module that is text": (section(lambda s: s["modules"].update({FIRST: "x"})), f"{FIRST} is 'x'"),
    "no method": (section(lambda s: s["modules"][FIRST].pop("method")), "method"),
    "a method that is a number": (entry(method=3), "method"),
    "options that are a list": (entry(options=[1]), "options"),
    "an unknown option": (entry(options={"windows": 3}), "windows"),
    "an absurd option": (entry(options={"window": 10**30}), "out of range"),
    "a negative layer": (entry(layer_idx=-2), "layer_idx"),
    "a layer that is text": (entry(layer_idx="0"), "layer_idx"),
    "absurd heads": (geometry(num_heads=2**62), "num_heads"),
    "an absurd size": (geometry(head_dim=10**9), "head_dim"),
    "a large size": (geometry(num_heads=2**20, num_kv_heads=2**20, head_dim=2**20), "numbers wide"),
    "no heads": (geometry(num_heads=0), "num_heads"),
    "heads that do not divide": (geometry(num_kv_heads=3), "does not divide"),
    "an unknown size": (geometry(heads=3), "heads"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_section_is_an_error(saved: Path, config: Any, kind: str) -> None:
    change, words = DAMAGES[kind]
    change(config)
    write(saved, config)
    with pytest.raises(PlanError, match=words):
        LlamaForCausalLM.from_pretrained(saved)
    with pytest.raises(AttnConvError, match=words):
        open_checkpoint(saved, allow_converted=True)


def test_what_is_built_from_a_sentinel_alone_does_not_run(saved: Path, config: Any) -> None:
    del config["attnconv"]
    write(saved, config)
    model = LlamaForCausalLM(LlamaForCausalLM.config_class.from_pretrained(saved))
    with pytest.raises(PlanError, match="converted modules are not in it"):
        model(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(PlanError, match="is missing"):
        AutoModel.from_pretrained(saved)


def test_without_section_and_sentinel_the_new_weights_tell(saved: Path, config: Any) -> None:
    del config["attnconv"], config["attn_implementation"], config["auto_map"]
    write(saved, config)
    if "lolcats" not in str(saved):
        pytest.skip("a method without weights leaves no trace in weights saved by transformers alone")
    with pytest.raises(PlanError, match="config.json does not name"):
        LlamaForCausalLM.from_pretrained(saved)
    with pytest.raises(AttnConvError, match="does not say how"):
        open_checkpoint(saved)


def test_an_early_section_without_a_digest_loads_if_the_weights_prove_it_whole(saved: Path, config: Any) -> None:
    del config["attnconv"]["digest"]
    write(saved, config)
    if "lolcats" in str(saved):
        assert len(converted_modules(AutoModelForCausalLM.from_pretrained(saved))) == 2
        del config["attnconv"]["modules"][FIRST]
        write(saved, config)
        words = r"the weights hold model\.layers\.0\.self_attn\.attnconv"
    else:
        words = "nothing tells whether.*convert again"
    with pytest.raises(PlanError, match=words):
        AutoModelForCausalLM.from_pretrained(saved)


def test_the_digest_does_not_depend_on_the_order_of_keys(saved: Path, config: Any) -> None:
    def turned(value: Any) -> Any:
        return {k: turned(v) for k, v in reversed(value.items())} if isinstance(value, dict) else copy.copy(value)

    found = Plan.from_config(turned(config["attnconv"])).to_config()
    assert found["digest"] == config["attnconv"]["digest"]
