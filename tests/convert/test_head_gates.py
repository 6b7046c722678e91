"""Gates on heads leave attention, cache and kernels to the model: everything that serves it serves them too."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    ViTConfig,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from attnconv.attention_modules.counting import counting
from attnconv.attention_modules.heads.gate import HeadGate
from attnconv.compat import cache_of
from attnconv.convert import convert_model, converted_modules
from attnconv.convert.planning.plan import Plan
from attnconv.convert.surgery.attention_function import AttentionCall, attention_hook
from attnconv.convert.surgery.cache_layer import AttnConvCacheLayer
from attnconv.errors import PlanError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
PROMPT = torch.randint(3, 64, (2, 15), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(PROMPT)
PADDED[0, :6] = 0


def plain(kind: str = "llama", **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings})).eval()


def gated(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """With routers that make a difference."""
    convert_model(model, "moa", **{"num_experts": 2, "active": 1, **options})
    torch.manual_seed(3)
    for module in converted_modules(model).values():
        nn.init.normal_(module.attnconv.router)
    return model


def greedy(model: PreTrainedModel, tokens: Tensor = PROMPT, **options: Any) -> Tensor:
    found: Tensor = model.generate(tokens, max_new_tokens=10, do_sample=False, **options)
    return found


@pytest.fixture(scope="module")
def decoder() -> PreTrainedModel:
    return gated(plain())


def test_gates_change_what_the_model_says_and_nothing_else(decoder: PreTrainedModel) -> None:
    assert not torch.equal(greedy(decoder), greedy(plain()))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, PADDED], ids=["full", "left-padded"])
def test_one_expert_is_the_model_itself_bit_for_bit(implementation: str, mask: Tensor | None) -> None:
    base = plain()
    base.set_attn_implementation(implementation)
    converted = gated(copy.deepcopy(base), num_experts=1)
    with torch.no_grad():
        assert torch.equal(converted(PROMPT, attention_mask=mask).logits, base(PROMPT, attention_mask=mask).logits)


@pytest.mark.parametrize("options", [{}, {"attention_mask": PADDED}], ids=["full", "left-padded"])
@pytest.mark.parametrize("cache", [None, "static", "dynamic"])
def test_caches_of_the_model_serve_it(decoder: PreTrainedModel, cache: str | None, options: dict[str, Any]) -> None:
    assert torch.equal(
        greedy(decoder, cache_implementation=cache, **options), greedy(decoder, use_cache=False, **options)
    )


def test_its_cache_layers_are_those_of_the_model(decoder: PreTrainedModel) -> None:
    with torch.no_grad():
        cache = cache_of(decoder(PROMPT, use_cache=True))
    assert not any(isinstance(layer, AttnConvCacheLayer) for layer in cache.layers)
    assert cache.layers[0].keys.shape[2] == PROMPT.shape[1]
    static = StaticCache(decoder.config, max_cache_len=32)
    assert not any(isinstance(layer, AttnConvCacheLayer) for layer in static.layers)


@pytest.mark.parametrize("window", [None, 6])
def test_windows_of_the_model_stay(window: int | None) -> None:
    model = gated(plain("mistral", sliding_window=window))
    assert torch.equal(greedy(model), greedy(model, use_cache=False))


def test_other_layers_keep_a_state_beside_it() -> None:
    from attnconv.recipes import parse_recipe

    rules = ["{layers: 1, method: moa}", "{layers: all, method: sliding_window, options: {window: 4}}"]
    model = convert_model(plain(), parse_recipe(f"name: a\nattention: [{', '.join(rules)}]"))
    assert torch.equal(greedy(model, attention_mask=PADDED), greedy(model, use_cache=False, attention_mask=PADDED))
    with torch.no_grad():
        kinds = [isinstance(layer, AttnConvCacheLayer) for layer in cache_of(model(PROMPT, use_cache=True)).layers]
    assert kinds == [True, False, True]


def test_beams_sampling_and_assistants(decoder: PreTrainedModel) -> None:
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 2}, {"assistant_model": plain(num_hidden_layers=1)}):
        row = PROMPT[:1]
        assert torch.equal(
            greedy(decoder, row, **options), greedy(decoder, row, use_cache=False, **_without_drafts(options))
        )


def _without_drafts(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name == "num_beams"}


def test_continuous_batching_is_generate() -> None:
    model = gated(plain())
    rows = [PROMPT[0, 6:], PROMPT[1]]
    wanted = [greedy(model, row[None])[0, len(row) :].tolist() for row in rows]
    config = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    inputs = [row.tolist() for row in rows]
    found = model.generate_batch(inputs=inputs, generation_config=config, continuous_batching_config=small)
    assert [answer.generated_tokens for answer in found.values()] == wanted


def test_packed_rows_are_their_documents(decoder: PreTrainedModel) -> None:
    lengths = (4, 8, 3)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = decoder(PROMPT[:1], position_ids=positions, use_cache=False).logits
        apart = [decoder(part, use_cache=False).logits for part in PROMPT[:1].split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(apart, 1), atol=1e-5, rtol=0)


def test_saved_and_loaded_again(decoder: PreTrainedModel, tmp_path: Path) -> None:
    decoder.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(converted_modules(again)["model.layers.0.self_attn"].attnconv, HeadGate)
    with torch.no_grad():
        assert torch.equal(again(PROMPT).logits, decoder(PROMPT).logits)
    assert torch.equal(greedy(again), greedy(decoder))


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders(kind: str) -> None:
    sizes = {
        name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "initializer_range")
    }
    torch.manual_seed(0)
    if kind == "bert":
        config, inputs = (
            BertConfig(num_hidden_layers=2, vocab_size=64, **sizes),
            {"input_ids": PROMPT, "attention_mask": PADDED},
        )
    else:
        config = ViTConfig(num_hidden_layers=2, image_size=16, patch_size=4, **sizes)
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    base = AutoModel.from_config(config).eval()
    with torch.no_grad():
        before = base(**inputs).last_hidden_state
        same = gated(copy.deepcopy(base), num_experts=1)(**inputs).last_hidden_state
        other = gated(copy.deepcopy(base))(**inputs).last_hidden_state
    assert torch.equal(before, same)
    assert not torch.allclose(before, other)


def test_soft_caps_and_sinks_of_the_model_stay() -> None:
    model = plain("gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=6)
    with torch.no_grad():
        before = model(PROMPT).logits
        assert torch.equal(gated(model, num_experts=1)(PROMPT).logits, before)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_counters_say_which_heads_served(cache: str, implementation: str) -> None:
    model = plain()
    model.set_attn_implementation(implementation)
    with counting(gated(model)) as counter:
        greedy(model, attention_mask=PADDED, cache_implementation=cache)
    total, real = counter.total, [9, 15]
    steps = [length + 9 for length in real]
    assert total.queries == 3 * sum(steps)
    assert total.exact_pairs == total.dense_pairs == 3 * sum(n * (n + 1) // 2 for n in steps)
    assert total.heads == 2.0


def test_a_tap_sees_the_model_s_own_attention_and_the_gated_one() -> None:
    model = gated(plain("gemma2", head_dim=8, query_pre_attn_scalar=8))
    seen: list[AttentionCall] = []

    def hook(call: AttentionCall) -> Tensor:
        seen.append(call)
        return call.converted()

    with torch.no_grad():
        before = model(PROMPT, attention_mask=PADDED).logits
        with attention_hook(model, hook):
            after = model(PROMPT, attention_mask=PADDED).logits
    real = PADDED.bool()
    assert torch.equal(before[real], after[real])
    call = seen[0]
    gates = call.core.gates(call.query, call.hidden_states)[..., None]
    found, wanted = call.student(), call.teacher() * gates
    assert torch.equal(found.transpose(1, 2)[real], wanted.transpose(1, 2)[real])
    assert torch.equal(call.student_weights(), call.teacher_weights())
    assert set(call.statistics()) == {"heads used", "gate"}
    assert float(call.statistics()["heads used"].values.sum()) == pytest.approx(2.0)


class Computing(LlamaAttention):
    """Computes its attention without transformers' attention interface."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.o_proj(self.q_proj(hidden_states)), None


def test_a_layer_that_does_not_run_its_gate_is_an_error() -> None:
    model = plain()
    for layer in model.model.layers:
        layer.self_attn.__class__ = Computing
    from attnconv.convert.surgery.swap import apply_plan

    plan = Plan.from_config(gated(plain()).config.attnconv)
    apply_plan(model, plan)
    with pytest.raises(PlanError, match="without the converted core"):
        model(PROMPT, use_cache=False)


def test_a_layer_whose_input_is_not_known_is_refused() -> None:
    from attnconv.attention_modules import Geometry, create

    with pytest.raises(ValueError, match="'moa' reads the layer's input, whose size is not known"):
        create("moa", Geometry(4, 2, 8, 8))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of a few tokens count as long enough."""
    from attnconv.attention_modules.heads import gathering

    for name, value in {"LEAST_QUERIES": 8, "LEAST_KEYS": 4, "GATHERED_BLOCK": 4}.items():
        monkeypatch.setattr(gathering, name, value)


def routed(**options: Any) -> PreTrainedModel:
    model = convert_model(plain(), "moh", **options)
    torch.manual_seed(3)
    for module in converted_modules(model).values():
        nn.init.normal_(module.attnconv.routed_router)
    return model


def dense_calls(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each call of the model's own function has from now on."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def counted(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.shape[2])
        return own(module, query, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", counted)
    return calls


@pytest.mark.parametrize("options", [{"unit": "group", "active": 1}, {"active": 2}, {"active": 1, "num_shared": 1}])
def test_only_chosen_heads_are_computed(options: Any, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed(**options)
    with torch.enable_grad():
        wanted = model(PROMPT, use_cache=False).logits.detach()
    text = greedy(model, PROMPT[:1], cache_implementation="static")
    calls = dense_calls(model, monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-5)
    assert calls == []
    assert torch.equal(greedy(model, PROMPT[:1]), text)
    # A token that both KV heads serve is left to the model's own function.
    assert set(calls) <= {1}
    if options.get("unit") == "group":
        assert calls == []


@pytest.mark.parametrize("active", [1, 2])
def test_gates_are_worked_out_once_a_call(active: int, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the model does it all because so many are chosen."""
    model = routed(unit="group", active=active)
    (core, *_), seen = [module.attnconv for module in converted_modules(model).values()], []
    own = core.gates
    monkeypatch.setattr(core, "gates", lambda *inputs: seen.append(1) or own(*inputs))
    with torch.no_grad():
        cache = model(PROMPT[:1], use_cache=True).past_key_values
        assert len(seen) == 1
        model(PROMPT[:1, :1], past_key_values=cache)
    assert len(seen) == 2


@pytest.mark.parametrize("case", ["many", "padded", "bf16", "short", "eager", "gradients"])
def test_where_nothing_is_saved_the_model_does_it_all(case: str, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed(unit="group", active=2 if case == "many" else 1)
    tokens, options = PROMPT, {}
    if case == "bf16":
        model = model.bfloat16()
    if case == "eager":
        model = convert_model(plain(attn_implementation="eager"), "moh", unit="group", active=2)
    if case == "short":
        tokens = PROMPT[:, :5]
    if case == "padded":
        options = {"attention_mask": PADDED}
    calls = dense_calls(model, monkeypatch)
    with torch.set_grad_enabled(case == "gradients"):
        model(tokens, use_cache=False, **options)
    assert len(calls) == (0 if case == "eager" else 3)


def test_windows_and_packed_rows_are_left_to_the_model(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed(unit="group", active=1)
    positions = torch.cat([torch.arange(9), torch.arange(6)])[None]
    with torch.enable_grad():
        wanted = model(PROMPT[:1], position_ids=positions, use_cache=False).logits.detach()
    with torch.no_grad():
        found = model(PROMPT[:1], position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    window = convert_model(plain("mistral", sliding_window=6), "moh", unit="group", active=1, router="query_norm")
    with torch.enable_grad():
        wanted = window(PROMPT, use_cache=False).logits.detach()
    with torch.no_grad():
        torch.testing.assert_close(window(PROMPT, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-5)
