"""A model that its config calls converted runs its methods, or is refused; what it did is counted on the way."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from attnconv.attention_modules import AttentionModule, Geometry, create
from attnconv.attention_modules.counts import AttentionCounts
from attnconv.attention_modules.registry import available
from attnconv.convert import convert_model
from attnconv.convert.surgery.swap import converted_modules
from attnconv.convert.writing.executed import check_executed, computes_dense
from attnconv.errors import PlanError

CONFIG = LlamaConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=64,
    pad_token_id=0,
)
IDS = torch.arange(3, 43)[None]
SMALL: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 8},
    "lolcats": {"window": 8},
    "lola": {"window": 8, "cache_size": 4},
    "recycled": {"interval": 4, "budget": 8},
    "token_select": {"budget": 8, "sink_blocks": 1, "local_blocks": 2},
    "snap": {"interval": 4, "window": 2, "budget": 8},
    "native": {"block": 8, "density": 0.3, "window": 8},
    "vertical_slash": {"block": 8, "refresh": 40, "columns": 2, "diagonals": 1},
}


def converted(method: str = "sliding_window", **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIG)).eval()
    return convert_model(model, method, **(options or SMALL.get(method, {})))


def check(model: PreTrainedModel) -> AttentionCounts:
    return check_executed(model, lambda: model(IDS, use_cache=True))


def middle(model: PreTrainedModel) -> Any:
    return model.model.layers[1].self_attn


def dense(query: Tensor, key: Tensor, value: Tensor, scaling: float, groups: int = 2) -> Tensor:
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)


def serves(method: str, causal: bool) -> bool:
    try:
        create(method, Geometry(4, 2, 8, 8, causal, hidden_size=12))
    except ValueError:
        return False
    return True


def layer(method: str, causal: bool = True, **options: Any) -> AttentionModule:
    return create(method, Geometry(4, 2, 8, 12, causal, hidden_size=16), **(options or SMALL.get(method, {})))


@pytest.mark.parametrize("method", [name for name in available() if name != "softmax" and serves(name, True)])
def test_every_method_runs_what_it_says(method: str) -> None:
    counts = check(converted(method))
    assert list(counts.layers) == [f"model.layers.{number}.self_attn" for number in range(3)]
    assert counts.tokens == 40
    assert all(found.calls == 1 and found.queries == 40 and found.state_bytes > 0 for found in counts.layers.values())
    assert AttentionCounts.from_dict(counts.to_dict()) == counts


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_method_is_taken_for_dense_attention(causal: bool, dtype: torch.dtype) -> None:
    for method in available():
        if serves(method, causal):
            assert not computes_dense(layer(method, causal), dtype=dtype), method


@pytest.mark.parametrize(("block", "mass"), [(8, 0.9), (16, 0.8), (64, 0.5)])
def test_untrained_gates_by_mass_are_not_taken_for_it(block: int, mass: float) -> None:
    """They find all blocks alike, so that they need as many as there can be, and the first one besides."""
    for method, options in {"seer": {"gate_dim": 8}, "dsa": {"index_dim": 4, "budget": None}}.items():
        torch.manual_seed(0)
        core = create(method, Geometry(4, 2, 8, 8), block=block, mass=mass, **options)
        assert not computes_dense(core), method


def test_images_are_tried_at_a_length_that_is_one() -> None:
    core = layer("agent", causal=False, num_agents=16, layout="image", prefix_tokens=5)
    assert not computes_dense(core)


def test_figures_are_those_of_the_pass() -> None:
    counts = check(converted("sliding_window", window=8, num_sinks=0))
    # Of 40 tokens each sees itself and seven before it, the first seven what is there.
    assert counts.total.exact_pairs == 3 * (28 + 33 * 8)
    assert counts.total.density == pytest.approx(292 / 820)
    assert counts.sentence.startswith(
        "at 40 tokens 35.6% of each query's tokens one by one (7.3), 0.356 x the multiply-adds of dense attention, "
    )


# Each takes a converted model and exchanges the attention of its middle layer.
def the_module_forward(model: PreTrainedModel) -> None:
    module = middle(model)
    module.forward = lambda hidden_states, **kwargs: (hidden_states, None)


def the_class(model: PreTrainedModel) -> None:
    module = middle(model)
    (config,) = module.__dict__["_attnconv_config"]
    module.__class__, module.config = type(module)._attnconv_original, config


def the_attention_function(model: PreTrainedModel) -> None:
    middle(model).config._attn_implementation = "sdpa"


def the_core_forward(model: PreTrainedModel) -> None:
    core = middle(model).attnconv
    core.forward = lambda query, key, value, *, scaling, **rest: dense(query, key, value, scaling)


def the_maths(model: PreTrainedModel) -> None:
    core = middle(model).attnconv
    core.attend_torch = lambda call, memory: dense(call.query, call.tokens.keys, call.tokens.values, call.scaling)


def the_decoding_alone(model: PreTrainedModel) -> None:
    core, texts = middle(model).attnconv, []
    forward = core.forward

    def remember(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        texts.append((key, value))
        out: Tensor = forward(query, key, value, **rest)
        return out

    def decode(call: Any, state: Any) -> Tensor:
        key, value = (torch.cat(parts, 2) for parts in zip(*texts[-2:], strict=True))
        return dense(call.query, key, value, call.scaling)

    core.forward, core.decode_torch = remember, decode


@pytest.mark.parametrize(
    ("exchange", "problem"),
    [
        (the_module_forward, "1 of 3 layers .* ran something else, .*: model.layers.1.self_attn;"),
        (the_class, "1 of 3 layers .* are not converted in this model: model.layers.1.self_attn;"),
        (the_attention_function, "model.layers.1.self_attn computed its attention without the converted core"),
        (the_core_forward, "1 of 3 layers .* compute dense softmax attention, .*: model.layers.1.self_attn;"),
        (the_maths, "1 of 3 layers .* compute dense softmax attention, .*: model.layers.1.self_attn;"),
        (the_decoding_alone, "1 of 3 layers .* compute dense softmax attention, .*: model.layers.1.self_attn;"),
    ],
)
def test_another_attention_is_refused(exchange: Callable[[PreTrainedModel], None], problem: str) -> None:
    model = converted()
    exchange(model)
    with pytest.raises(PlanError, match=problem):
        check(model)


def test_layers_may_run_in_one_forward_or_another() -> None:
    model = converted()
    ran: list[int] = []

    def forward(layers: int) -> Callable[[], object]:
        def run() -> object:
            ran.append(layers)
            return model(IDS[:, :20]) if layers else None

        return run

    assert check_executed(model, forward(0), forward(3), forward(0)).tokens == 20
    assert ran == [0, 3]
    with pytest.raises(PlanError, match="3 of 3 layers .* were not called"):
        check_executed(model, forward(0))


def test_long_lists_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("hedgehog")
    for number in range(3):
        model.model.layers[number].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    monkeypatch.setattr("attnconv.convert.writing.executed.NAMED", 2)
    with pytest.raises(PlanError, match=r"3 of 3 layers .*self_attn, model.layers.1.self_attn and 1 more;"):
        check(model)


def test_a_model_without_a_section_is_refused() -> None:
    with pytest.raises(PlanError, match="LlamaForCausalLM is not converted"):
        check(AutoModelForCausalLM.from_config(deepcopy(CONFIG)))


def test_the_model_stays_as_it_was() -> None:
    model = converted().train()
    middle(model).eval()
    check(model)
    assert model.training
    assert not middle(model).training
    assert len(converted_modules(model)) == 3
