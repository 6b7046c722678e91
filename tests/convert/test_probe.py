"""What one forward on the meta device tells."""

import copy

import pytest
import torch
import transformers
from transformers import (
    AlbertConfig,
    BartConfig,
    BertConfig,
    CLIPVisionConfig,
    DiffLlamaConfig,
    DogeConfig,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    OPTConfig,
    PreTrainedConfig,
    T5Config,
    ViTConfig,
)

from attnconv.attention_modules import Geometry
from attnconv.convert import ProbedModule, make_plan, probe
from attnconv.convert.surgery.in_memory import _EveryLayer
from attnconv.errors import PlanError


def watch(config: PreTrainedConfig, model_class: str) -> tuple[ProbedModule, ...]:
    return probe(config, getattr(transformers, model_class))


def test_a_large_model_is_probed_without_weights() -> None:
    # 405B parameters: with weights this would end the process.
    config = LlamaConfig(
        hidden_size=16384,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        intermediate_size=53248,
    )
    before = copy.deepcopy(config.to_dict())
    modules = watch(config, "LlamaForCausalLM")
    assert len(modules) == 126
    assert modules[7] == ProbedModule(
        name="model.layers.7.self_attn",
        layer_idx=7,
        geometry=Geometry(128, 8, 128, 128, causal=True, hidden_size=16384),
        scaling=128**-0.5,
        calls=1,
        self_attention=True,
        extras=(),
        class_name="LlamaAttention",
        shows_rotation=True,
    )
    assert config.to_dict() == before


def test_scaling_is_what_the_model_passes() -> None:
    config = OPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32)
    assert watch(config, "OPTForCausalLM")[0].scaling == 1.0


def test_extras_are_noted() -> None:
    gemma = Gemma2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
    )
    assert {extra for module in watch(gemma, "Gemma2ForCausalLM") for extra in module.extras} == {
        "softcap",
        "sliding_window",
    }
    t5 = T5Config(d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48)
    assert all("position_bias" in module.extras for module in watch(t5, "T5ForConditionalGeneration")[:2])


def test_direction_is_read_from_the_mask() -> None:
    bert = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    assert not any(module.geometry.causal for module in watch(bert, "BertForMaskedLM"))
    bert.is_decoder = True
    assert all(module.geometry.causal for module in watch(bert, "BertLMHeadModel"))
    modern = ModernBertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, local_attention=4
    )
    assert not any(module.geometry.causal for module in watch(modern, "ModernBertForMaskedLM"))


def test_images() -> None:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    for config, name in (
        (ViTConfig(**settings, image_size=32, patch_size=8), "ViTForImageClassification"),
        (CLIPVisionConfig(**settings, image_size=32, patch_size=8), "CLIPVisionModel"),
    ):
        modules = watch(config, name)
        assert [module.geometry for module in modules] == [Geometry(4, 4, 8, 8, causal=False, hidden_size=32)] * 2


def test_cross_attention_is_told_apart() -> None:
    config = BartConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    )
    modules = {module.name: module for module in watch(config, "BartForConditionalGeneration")}
    assert not modules["model.decoder.layers.0.encoder_attn"].self_attention
    assert modules["model.decoder.layers.0.self_attn"].geometry.causal
    assert not modules["model.encoder.layers.0.self_attn"].geometry.causal


def test_sliding_layers_are_causal() -> None:
    config = MistralConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
    )
    (module,) = watch(config, "MistralForCausalLM")
    assert module.geometry.causal
    assert module.extras == ("sliding_window",)


def test_attention_outside_the_interface_is_refused() -> None:
    falcon = FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(PlanError, match="attention interface"):
        make_plan([_EveryLayer("lolcats")], watch(falcon, "FalconForCausalLM"))
    mamba = MambaConfig(hidden_size=32, num_hidden_layers=1)
    with pytest.raises(PlanError, match="no self-attention"):
        make_plan([_EveryLayer("lolcats")], watch(mamba, "MambaForCausalLM"))


def test_a_layer_that_runs_twice_is_refused_only_where_it_needs_a_state() -> None:
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    diff = watch(DiffLlamaConfig(**settings, num_key_value_heads=2), "DiffLlamaForCausalLM")
    assert diff[0].calls == 2
    with pytest.raises(PlanError, match="runs 2 times in one forward"):
        make_plan([_EveryLayer("lolcats")], diff)
    albert = watch(AlbertConfig(**settings, embedding_size=16), "AlbertForMaskedLM")
    assert albert[0].calls == 2
    assert make_plan([_EveryLayer("lolcats")], albert).converted


def test_a_mask_that_weighs_keys_is_refused() -> None:
    config = DogeConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
    )
    modules = watch(config, "DogeForCausalLM")
    assert modules[0].extras == ("mask",)
    with pytest.raises(PlanError, match="attention mask of its own"):
        make_plan([_EveryLayer("lolcats")], modules)


def test_experts_of_any_size_are_probed_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnconv.convert.planning.probe._MAX_CPU_PARAMETERS", 0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32}
    config = MixtralConfig(**sizes, intermediate_size=86, num_hidden_layers=1, num_local_experts=2)
    config.dtype = torch.bfloat16
    (module,) = watch(config, "MixtralForCausalLM")
    assert module.geometry.num_heads == 4
