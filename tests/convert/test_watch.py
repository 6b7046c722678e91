"""Watching sees every attention call, the right weights, and leaves no trace."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DiffLlamaConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from attnconv.convert import convert_model
from attnconv.convert.surgery.recording import WatchedCall, attention_layers, watching
from attnconv.errors import PlanError

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KEY_VALUE = {"num_key_value_heads": 2, "head_dim": 8}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **KEY_VALUE),
    "soft cap and window": Gemma2Config(**SIZES, **KEY_VALUE, sliding_window=6, attn_logit_softcapping=2.0),
    "sinks": GptOssConfig(**SIZES, **KEY_VALUE, **MOE, sliding_window=6),
    "window": MistralConfig(**SIZES, **KEY_VALUE, sliding_window=6),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
}
IDS = torch.randint(1, 97, (2, 21), generator=torch.Generator().manual_seed(0))


def tiny(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


@torch.no_grad()
def watched(model: PreTrainedModel, ids: torch.Tensor = IDS) -> tuple[dict[str, WatchedCall], dict[str, torch.Tensor]]:
    calls, weights = {}, {}

    def watcher(call: WatchedCall) -> None:
        calls[call.name], weights[call.name] = call, call.weights()

    with watching(model, watcher, [layer.name for layer in attention_layers(model)]):
        model(input_ids=ids, use_cache=False)
    return calls, weights


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_those_that_transformers_returns(name: str) -> None:
    model = tiny(CONFIGS[name], attn_implementation="eager")
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False, output_attentions=True).attentions
    _, weights = watched(model)
    assert len(weights) == len(expected) == 2
    for ours, theirs in zip(weights.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_computes_what_it_did_and_is_left_as_it_was(name: str) -> None:
    model = tiny(CONFIGS[name])
    configs = [getattr(module, "config", None) for module in model.modules()]
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
        seen: list[str] = []
        names = [layer.name for layer in attention_layers(model)]
        with watching(model, lambda call: seen.append(call.name), names):
            assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)
        assert seen == names
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)
    assert seen == names
    assert all(a is getattr(b, "config", None) for a, b in zip(configs, model.modules(), strict=True))
    assert not any("watched" in key or "attnconv_hook" in key for module in model.modules() for key in vars(module))


def test_a_hybrid_shows_both_kinds_of_layers() -> None:
    plain = tiny(CONFIGS["llama"])
    model = convert_model(tiny(CONFIGS["llama"]), _first_layer("lolcats", window=4))
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False).logits
    calls, weights = watched(model)
    first, second = calls.values()
    assert first.core is not None
    assert second.core is None
    assert list(first.statistics()) == ["linear share"]
    assert second.statistics() == {}
    # The first layers see the same input, the second ones do not.
    _, plain_weights = watched(plain)
    assert not torch.allclose(weights[first.name], plain_weights[first.name], atol=1e-3)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)


def test_only_the_named_layers_are_watched_and_errors_restore_the_rest() -> None:
    model, seen = tiny(CONFIGS["llama"]), []

    def watcher(call: WatchedCall) -> None:
        seen.append(call.name)
        raise RuntimeError("from the watcher")

    config = model.model.layers[1].self_attn.config
    with (
        pytest.raises(RuntimeError, match="from the watcher"),
        watching(model, watcher, ["model.layers.1.self_attn"]),
    ):
        model(input_ids=IDS, use_cache=False)
    assert seen == ["model.layers.1.self_attn"]
    assert model.model.layers[1].self_attn.config is config
    with pytest.raises(PlanError, match=r"model\.layers\.9"), watching(model, watcher, ["model.layers.9.self_attn"]):
        pass


def test_layers_are_counted_and_refused_as_in_a_plan() -> None:
    layers = attention_layers(tiny(CONFIGS["llama"]))
    assert [(layer.index, layer.name, layer.refused) for layer in layers] == [
        (0, "model.layers.0.self_attn", None),
        (1, "model.layers.1.self_attn", None),
    ]
    twice = attention_layers(tiny(DiffLlamaConfig(**SIZES, num_key_value_heads=2)))
    assert all("runs 2 times" in str(layer.refused) for layer in twice)


def test_a_bidirectional_model() -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()
    _, weights = watched(model)
    for matrix in weights.values():
        torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 4, 21))
        assert (matrix.triu(1) > 0).any()


def _first_layer(method: str, **options: Any) -> Any:
    from attnconv.recipes import build_recipe

    return build_recipe({"name": "test", "attention": [{"layers": "0", "method": method, "options": options}]})
