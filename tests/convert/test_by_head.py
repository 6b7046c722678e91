"""Rules that name KV heads: layers of several attentions, each with its own cache, in everything a model does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedModel

from attnconv.attention_modules.counting import counting
from attnconv.attention_modules.heads.by_head import ByHeadAttention
from attnconv.compat import cache_argument, cache_of
from attnconv.convert import convert_model, converted_modules
from attnconv.convert.planning.importance import read_importance, write_importance
from attnconv.convert.planning.plan import Plan, make_plan
from attnconv.convert.planning.probe import probe
from attnconv.errors import AttnConvError, DataError, PlanError, RecipeError
from attnconv.evaluate.bench.cache_size import held_bytes
from attnconv.recipes import Recipe, parse_recipe

CACHE = cache_argument(LlamaForCausalLM.forward)
WINDOW = {"method": "sliding_window", "options": {"window": 4, "num_sinks": 1}}
PROMPT = torch.randint(3, 64, (2, 15), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(PROMPT)
PADDED[0, :6] = 0


def recipe(*rules: dict[str, Any]) -> Recipe:
    return parse_recipe(json.dumps({"name": "a", "attention": [{"layers": "all", **rule} for rule in rules]}))


def streaming(*, heads: Any = 0, **sizes: Any) -> PreTrainedModel:
    """Some KV heads keep everything, the others a window."""
    return convert_model(tiny_llama(**sizes), recipe({"heads": heads, "method": "softmax"}, WINDOW))


def greedy(model: PreTrainedModel, tokens: Tensor = PROMPT, **options: Any) -> Tensor:
    options = {"max_new_tokens": 10, "pad_token_id": 0, **options}
    found: Tensor = model.generate(tokens, do_sample=False, **options)
    return found


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return streaming(vocab_size=64)


def plan_of(*rules: dict[str, Any], **sizes: Any) -> Plan:
    base = tiny_llama(**sizes)
    return make_plan(recipe(*rules).attention, probe(base.config, type(base)))


def test_rules_share_the_heads_of_a_layer() -> None:
    hedgehog = {"heads": "1", "method": "hedgehog"}
    plan = plan_of({"layers": 0, **hedgehog}, {"layers": 0, **WINDOW}, {"layers": 1, "heads": "0-1", **WINDOW})
    first, second = plan.entries
    assert first.method == "by_head"
    assert [(part["groups"], part["method"]) for part in first.options["parts"]] == [
        ([0], "sliding_window"),
        ([1], "hedgehog"),
    ]
    # Where all heads come to the same, the layer is an ordinary one.
    assert (second.method, second.options) == ("sliding_window", WINDOW["options"])
    assert plan_of({"heads": 0, "method": "softmax"}, {"layers": 0, **WINDOW}).entries[1].method == "softmax"


def test_each_head_does_what_its_method_does(model: PreTrainedModel) -> None:
    core = converted_modules(model)["model.layers.0.self_attn"].attnconv
    assert isinstance(core, ByHeadAttention)
    query, key = (torch.randn(1, heads, 20, 8) for heads in (4, 2))
    weights = core.attention_weights(query, key, scaling=0.3)
    assert (weights[0, :2, -1] > 0).all()
    assert (weights[0, 2:, -1] > 0).nonzero()[:, 1].tolist() == [0, 16, 17, 18, 19] * 2


@pytest.mark.parametrize("options", [{}, {"attention_mask": PADDED}, {"num_beams": 2}], ids=["full", "padded", "beams"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache_is_that_without(model: PreTrainedModel, cache: str | None, options: Any) -> None:
    assert torch.equal(greedy(model, cache_implementation=cache, **options), greedy(model, use_cache=False, **options))


def test_drafted_tokens_are_taken_back_and_prompts_come_in_parts(model: PreTrainedModel) -> None:
    wanted = greedy(model, PROMPT[:1])
    assert torch.equal(greedy(model, PROMPT[:1], assistant_model=model), wanted)
    assert torch.equal(greedy(model, PROMPT[:1], prefill_chunk_size=4), wanted)


def test_packed_rows_are_documents_apart(model: PreTrainedModel) -> None:
    first, second = PROMPT[:1], PROMPT[1:, :9]
    positions = torch.cat([torch.arange(15), torch.arange(9)])[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(part).logits for part in (first, second)], 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-5)


def test_it_reloads_equal_to_the_bit(model: PreTrainedModel, tmp_path: Path) -> None:
    again = AutoModelForCausalLM.from_pretrained(save(model, tmp_path))
    assert {type(module.attnconv) for module in converted_modules(again).values()} == {ByHeadAttention}
    with torch.no_grad():
        assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)


def test_the_cache_holds_what_the_parts_need_and_no_more(model: PreTrainedModel) -> None:
    dense, sizes = tiny_llama(max_position_embeddings=4096), []
    ids = torch.randint(3, 64, (1, 2000))
    for one in (dense, streaming(max_position_embeddings=4096)):
        with torch.no_grad():
            cache = cache_of(one(ids, **{CACHE: DynamicCache(config=one.config)}, logits_to_keep=1))
            cache = cache_of(one(ids[:, :1], **{CACHE: cache}))
        sizes.append(held_bytes(cache))
    # Room for more tokens and their places are counted too.
    assert sizes[1] < 0.9 * sizes[0]
    state = streaming().model.layers[0].self_attn.attnconv.new_state()
    tensors = [torch.randn(1, heads, 2000, 8) for heads in (4, 2, 2)]
    with torch.no_grad():
        model.model.layers[0].self_attn.attnconv(*tensors, scaling=0.3, state=state)
    kept = [tensor for part in state.parts for tensor in part._tail.values()]
    # No part keeps the keys of the others alive.
    assert all(tensor.untyped_storage().nbytes() <= 1.01 * tensor.nbytes for tensor in kept)
    assert state.nbytes < 0.6 * (tensors[1].nbytes + tensors[2].nbytes)


def test_counts_are_those_of_all_heads(model: PreTrainedModel) -> None:
    with torch.no_grad(), counting(model) as counter:
        model(PROMPT[:1])
    (counts, _) = counter.by_module.values()
    dense, near = 15 * 16 // 2, sum(min(n, 4) + (n > 4) for n in range(1, 16))
    assert (counts.calls, counts.queries, counts.head_queries, counts.dense_pairs) == (1, 15, 60, dense)
    assert counts.exact_pairs == round((dense + near) / 2)
    assert counts.multiply_adds == 2 * (dense + near) * 16


@pytest.fixture
def importance(tmp_path: Path) -> Path:
    base, path = tiny_llama(), tmp_path / "heads.json"
    measures = {"ablation": [[0.1, 0.4], [0.3, None]], "other": [[1, 2], [3, 4]]}
    write_importance(path, source="tiny", modules=probe(base.config, type(base)), measures=measures, measure="ablation")
    return path


def test_the_heads_that_matter_most_are_those_of_the_file(importance: Path) -> None:
    def kept(**heads: Any) -> list[list[int]]:
        rule = {"heads": {"importance": str(importance), **heads}, "method": "softmax"}
        parts = [entry.options["parts"] for entry in plan_of(rule, WINDOW).entries if entry.method == "by_head"]
        return [part["groups"] for own in parts for part in own if part["method"] == "softmax"]

    assert kept(top="50%") == [[1], [0]]
    assert kept(top=1) == [[1]]
    # Both heads of the second layer, which is then an ordinary softmax layer.
    assert kept(top="50%", measure="other") == []
    assert read_importance(importance).scores(None)[1] == [0.3, float("-inf")]


def test_options_name_heads_by_importance_in_each_layer(importance: Path) -> None:
    """The heads of `moh` that are always on, for which each layer has numbers of its own."""
    named = {"importance": str(importance), "top": 1}
    for unit, shared in (("group", [[1], [0]]), ("head", [[2, 3], [0, 1]])):
        model = convert_model(
            tiny_llama(), recipe({"method": "moh", "options": {"unit": unit, "shared_groups": named}})
        )
        cores = [module.attnconv for module in converted_modules(model).values()]
        assert [core.shared_units for core in cores] == shared
    with pytest.raises(PlanError, match="all 2 KV heads are shared"):
        plan_of({"method": "moh", "options": {"unit": "group", "shared_groups": {**named, "top": 2}}})
    with pytest.raises(PlanError, match="is about another model"):
        plan_of({"method": "moh", "options": {"shared_groups": named}}, num_hidden_layers=3)
    with pytest.raises(RecipeError, match="did you mean 'top'"):
        recipe({"method": "moh", "options": {"shared_groups": {"importance": "a", "topp": 1}}})


def test_a_file_keeps_the_measures_it_has(importance: Path) -> None:
    base = tiny_llama()
    found = write_importance(
        importance,
        source="tiny",
        modules=probe(base.config, type(base)),
        measures={"more": [[1, 2], [3, 4]]},
        measure="more",
    )
    assert set(found.measures) == {"ablation", "other", "more"}
    assert read_importance(importance) == found


SOFTMAX = {"method": "softmax"}
WRONG = {
    "missing": ([{"heads": "0,2", **SOFTMAX}, WINDOW], "rule 1 names the KV head 2, but .*layers.0.* has 2"),
    "twice": ([{"heads": 0, **WINDOW}, {"heads": "0-1", **SOFTMAX}], "rules 1 and 2 both take the KV head 0 of"),
    "whole": ([{"heads": 0, "method": "moh", "options": {"active": 1}}], "'moh' is about a whole layer"),
    "projections": ([{"heads": 0, "method": "cca"}], "'cca' is about a whole layer"),
    "no file": ([{"heads": {"importance": "none.json", "top": 1}, **SOFTMAX}, WINDOW], "no file none.json"),
    "too many": ([{"heads": {"importance": "FILE", "top": 5}, **SOFTMAX}, WINDOW], "wants the 5 most .* have 4"),
    "measure": (
        [{"heads": {"importance": "FILE", "top": 1, "measure": "x"}, **SOFTMAX}, WINDOW],
        "no measure 'x'; it has ablation, other",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_in_a_sentence(case: str, importance: Path) -> None:
    rules, message = WRONG[case]
    rules = json.loads(json.dumps(rules).replace("FILE", str(importance)))
    with pytest.raises((PlanError, DataError), match=message):
        plan_of(*rules)


def test_another_file_says_how_to_come_by_the_right_one(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"kind": "head_importance"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"is no such file by attnconv: write it again by `attnconv diagnose"):
        read_importance(path)


def test_importance_of_another_model_is_refused(importance: Path) -> None:
    rule = {"heads": {"importance": str(importance), "top": 1}, **SOFTMAX}
    with pytest.raises(PlanError, match=r"is about another model: tiny has 2 layers of 2 KV heads .* has 3 layers"):
        plan_of(rule, WINDOW, num_hidden_layers=3)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ("a", "numbers of KV heads"),
        ("3-1", "runs backwards"),
        ("1,1", "names a KV head twice"),
        ({"importance": "a", "topp": 1}, "did you mean 'top'"),
        ({"importance": "a", "top": "120%"}, "a share such as 25%"),
        ({"top": 1}, "importance must name a file"),
    ],
)
def test_heads_that_cannot_be_read_are_named(heads: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe({"heads": heads, **SOFTMAX})


def test_heads_of_a_layer_with_a_window_of_its_own_cannot_stay_softmax() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**{**tiny_llama().config.to_dict(), "sliding_window": 6, "architectures": None})
    with pytest.raises(AttnConvError, match="heads that stay softmax would see everything"):
        convert_model(MistralForCausalLM(config), recipe({"heads": 0, **SOFTMAX}, WINDOW))
