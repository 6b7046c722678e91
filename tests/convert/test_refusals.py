"""What a converted model cannot compute exactly is refused with a sentence that says why; it never runs as softmax."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fresh_process
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    ContinuousBatchingConfig,
    DiffLlamaConfig,
    DogeConfig,
    DynamicCache,
    FalconConfig,
    Gemma2Config,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnconv.compat import cache_argument
from attnconv.convert import apply_plan, convert_model, converted_modules, make_plan, probe
from attnconv.convert.planning.section import sealed
from attnconv.errors import AttnConvError, PlanError
from attnconv.recipes import AttentionRule

CACHE = cache_argument(LlamaForCausalLM.forward)
IDS = torch.arange(3, 21).view(2, 9)
attend = ALL_ATTENTION_FUNCTIONS["attnconv"]
COMMON: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = COMMON | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
}


def plan_for(config: PreTrainedConfig, *, allow_lossy: bool = False) -> Any:
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    rule = AttentionRule(layers="all", method="lolcats", options={"window": 3})
    return make_plan([rule], probe(config, model_class), allow_lossy=allow_lossy)


def llama(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | changes)).eval()


@pytest.fixture
def converted() -> PreTrainedModel:
    return convert_model(llama(), "lolcats", window=3)


def edited(model: PreTrainedModel, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Save a model and change what its config says about the conversion."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["attnconv"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_unknown_method(converted: PreTrainedModel, tmp_path: Path) -> None:
    def change(section: dict[str, Any]) -> None:
        for entry in section["modules"].values():
            entry["method"] = "of_tomorrow"

    with pytest.raises(PlanError, match=r"of_tomorrow.*update attnconv with `pip install .`"):
        AutoModelForCausalLM.from_pretrained(edited(converted, tmp_path, change))


def test_unknown_section_version(converted: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"section version 2.*update attnconv with `pip install .`"):
        AutoModelForCausalLM.from_pretrained(edited(converted, tmp_path, lambda section: section.update(version=2)))


def test_modules_that_are_not_there(converted: PreTrainedModel, tmp_path: Path) -> None:
    def change(section: dict[str, Any]) -> None:
        section["modules"] = {f"elsewhere.{i}": entry for i, entry in enumerate(section["modules"].values())}
        section.update(sealed(section))

    with pytest.raises(PlanError, match=r"elsewhere\.0.*not in LlamaForCausalLM|not in LlamaForCausalLM.*elsewhere\.0"):
        AutoModelForCausalLM.from_pretrained(edited(converted, tmp_path, change))


def test_without_attnconv_nothing_loads(converted: PreTrainedModel, tmp_path: Path) -> None:
    converted.save_pretrained(tmp_path)
    program = (
        "import sys\n"
        "sys.modules['attnconv'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
    )
    # On its own path: nothing of ours may be importable.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = fresh_process.run("-c", program, env=environment)
    assert run.returncode != 0
    assert "attnconv" in run.stderr.splitlines()[-1]


def test_continuous_batching(converted: PreTrainedModel) -> None:
    module = next(iter(converted_modules(converted).values()))
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(PlanError, match="paged caches"):
        attend(module, query, key, key, None, scaling=1.0, cache=object())


def test_continuous_batching_answers_nothing(converted: PreTrainedModel) -> None:
    (result,) = converted.generate_batch(
        inputs=[IDS[0].tolist()],
        generation_config=GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16),
    ).values()
    assert "paged caches" in result.error
    assert not result.generated_tokens


@pytest.mark.slow
@torch.no_grad()
def test_packed_sequences_in_a_graph() -> None:
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    # Tracing takes seconds for every layer, and with gradients twice as many.
    converted = convert_model(llama(num_hidden_layers=1), "lolcats", window=3)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    # Neither positions that go on nor those of padding are taken for others.
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4, 5]])
    compiled(input_ids=IDS[:1], attention_mask=mask, position_ids=positions, use_cache=False)
    with pytest.raises(RuntimeError, match="packed sequences"):
        compiled(input_ids=IDS[:1], position_ids=packed, use_cache=False)


@pytest.mark.parametrize("name", ["cp_size", "sp_size"])
def test_parallelism_of_accelerate(converted: PreTrainedModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = SimpleNamespace(**{"cp_size": 1, "sp_size": 1} | {name: 2})
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", sizes)
    with pytest.raises(PlanError, match="context or sequence parallelism"):
        converted(input_ids=IDS)
    setattr(sizes, name, 1)
    converted(input_ids=IDS)


def test_parallelism_of_torch(converted: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def split(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing of a converted model calls this")

    split.__module__ = "torch.distributed.tensor.experimental._context_parallel._attention"
    monkeypatch.setattr(F, "scaled_dot_product_attention", split)
    with pytest.raises(PlanError, match="context or sequence parallelism"):
        converted(input_ids=IDS)


def test_a_cache_that_another_model_filled(converted: PreTrainedModel) -> None:
    cache = DynamicCache()
    llama()(input_ids=IDS, **{CACHE: cache}, use_cache=True)
    with pytest.raises(PlanError, match="filled by an unconverted model"):
        converted(input_ids=IDS[:, :1], **{CACHE: cache}, use_cache=True)


def test_a_quantized_cache(converted: PreTrainedModel) -> None:
    # transformers' own words: a state has no keys and values to quantize.
    with pytest.raises(ValueError, match="only supported for models with only full attention layers"):
        converted.generate(IDS, max_new_tokens=2, cache_implementation="quantized", cache_config={"backend": "fp8"})


def test_a_mask_that_cannot_be_read(converted: PreTrainedModel) -> None:
    module = next(iter(converted_modules(converted).values()))
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(PlanError, match="mask of type object cannot be read"):
        attend(module, query, key, key, object(), scaling=1.0)


def test_attention_that_was_not_converted() -> None:
    plain = llama()
    plain.config._attn_implementation_internal = "attnconv"
    with pytest.raises(PlanError, match="was not converted"):
        plain(input_ids=IDS)


def test_cross_attention_at_run_time(converted: PreTrainedModel) -> None:
    module = next(iter(converted_modules(converted).values()))
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(PlanError, match="cross-attention"):
        attend(module, query, key, key, None, scaling=1.0)


def test_cross_attention_is_never_planned() -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = BartConfig(**COMMON, **sizes, encoder_attention_heads=4, decoder_attention_heads=4)
    rule = AttentionRule(layers="all", method="lolcats", options={"window": 3})
    plan = make_plan([rule], probe(config, BartForConditionalGeneration))
    assert [entry.name for entry in plan.converted] == [
        "model.encoder.layers.0.self_attn",
        "model.decoder.layers.0.self_attn",
    ]
    only_cross = AttentionRule(layers=".*encoder_attn", method="lolcats", options={"window": 3})
    with pytest.raises(AttnConvError):
        make_plan([only_cross], probe(config, BartForConditionalGeneration))


T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}
LEFT_OUT = {
    "soft cap": (Gemma2Config(**SMALL, attn_logit_softcapping=5.0), "soft cap"),
    "sinks": (GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1), "sinks"),
    "bias": (T5Config(**COMMON | T5_SIZES), "position bias"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_would_be_left_out_takes_a_flag(kind: str) -> None:
    config, words = LEFT_OUT[kind]
    if isinstance(config, T5Config):
        model = T5ForConditionalGeneration(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(PlanError, match=f"{words}.*--allow-lossy"):
        convert_model(model, "lolcats", window=3)
    assert not converted_modules(model)
    convert_model(model, "lolcats", window=3, allow_lossy=True)
    assert converted_modules(model)


REFUSED = {
    "own attention classes": (
        FalconConfig(**COMMON, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        "does not use transformers' attention interface",
    ),
    "own arithmetic": (BloomConfig(**COMMON, hidden_size=32, n_layer=2, n_head=4), "no self-attention"),
    "no attention": (MambaConfig(**COMMON, hidden_size=32, num_hidden_layers=2, state_size=4), "no self-attention"),
    "two calls a layer": (DiffLlamaConfig(**SMALL), "runs 2 times in one forward"),
    "a mask that weighs keys": (DogeConfig(**SMALL), "attention mask of its own"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_architectures_without_a_place_for_a_core(kind: str) -> None:
    config, words = REFUSED[kind]
    with pytest.raises(PlanError, match=words):
        plan_for(config, allow_lossy=True)


def test_a_refused_plan_leaves_the_model_alone() -> None:
    model = llama()
    before = model(input_ids=IDS).logits
    plan = plan_for(LlamaConfig(**SMALL | {"num_hidden_layers": 3}))
    with pytest.raises(PlanError, match=r"not in LlamaForCausalLM: model\.layers\.2\.self_attn"):
        apply_plan(model, plan)
    assert not converted_modules(model)
    assert torch.equal(model(input_ids=IDS).logits, before)
