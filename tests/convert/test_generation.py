"""Every way of generating says the same with the recurrent cache as without any cache."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    WhisperConfig,
)

from attnconv.compat import cache_argument, cache_of
from attnconv.convert import apply_plan, converted_modules, make_plan, probe
from attnconv.convert.surgery.cache_layer import AttnConvCacheLayer
from attnconv.recipes import AttentionRule

pytestmark = pytest.mark.compat

WINDOW = 3
CACHE = cache_argument(LlamaForCausalLM.forward)
PROMPT = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(PROMPT).index_fill_(1, torch.tensor([]).long(), 0)
PADDED[0, :4] = 0
COMMON: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = COMMON | {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
}
ENCODER_DECODER = COMMON | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = SMALL | {"layer_types": [SLIDING, FULL, SLIDING, FULL], "sliding_window": 4, "query_pre_attn_scalar": 8}
# Which config, and which of its layers are converted.
DECODERS: dict[str, tuple[PreTrainedConfig, Any]] = {
    "llama, all layers": (LlamaConfig(**SMALL), "all"),
    "llama, every second layer": (LlamaConfig(**SMALL), "0,2"),
    "gpt2, last layer": (GPT2Config(n_embd=32, n_layer=3, n_head=4, **COMMON), {"last": 1}),
    "gemma3, full layers": (Gemma3TextConfig(**GEMMA), "1,3"),
    "gemma3, sliding layers": (Gemma3TextConfig(**GEMMA), "0,2"),
}
# Ways of generating that need no more than arguments.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 4},
    "static cache": {"cache_implementation": "static"},
}


# What each model generates without a cache, which many ways of having one are compared with.
EXPECTED: dict[PreTrainedModel, dict[str, Any]] = {}


def tiny(config: PreTrainedConfig, auto_class: Any = AutoModelForCausalLM, seed: int = 0) -> PreTrainedModel:
    """A model whose weights are large enough that every layer shows in the logits."""
    torch.manual_seed(seed)
    model: PreTrainedModel = auto_class.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(8)
    return model


def converted(
    config: PreTrainedConfig, layers: Any = "all", auto_class: Any = AutoModelForCausalLM, seed: int = 0
) -> PreTrainedModel:
    model = tiny(config, auto_class, seed)
    rule = AttentionRule(layers=layers, method="lolcats", options={"window": WINDOW})
    apply_plan(model, make_plan([rule], probe(config, type(model)), allow_lossy=True))
    with torch.no_grad():
        for module in converted_modules(model).values():
            for parameter in module.attnconv.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@functools.cache
def decoder_of(name: str) -> PreTrainedModel:
    """Made once, for no way of generating changes a model."""
    return converted(*DECODERS[name])


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> PreTrainedModel:
    return decoder_of(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return decoder_of("llama, every second layer")


def generate(model: PreTrainedModel, inputs: Tensor = PROMPT, **options: Any) -> Any:
    torch.manual_seed(1)
    defaults = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(inputs, **defaults | options)


def without_cache(model: PreTrainedModel, inputs: Tensor = PROMPT, **options: Any) -> Any:
    # What only says how a cache is filled or kept means nothing without one.
    about_caches = ("prefill_chunk_size", "cache_implementation")
    kept = {name: value for name, value in options.items() if name not in about_caches}
    asked = {"inputs": inputs, **kept}
    words = sorted((name, str(v.tolist() if isinstance(v, Tensor) else v)) for name, v in asked.items())
    known = EXPECTED.setdefault(model, {})
    if str(words) not in known:
        known[str(words)] = generate(model, inputs, use_cache=False, **kept)
    return known[str(words)]


@pytest.mark.parametrize("padded", [False, True], ids=["full batch", "left-padded"])
@pytest.mark.parametrize("way", WAYS)
def test_with_cache_is_without(decoder: PreTrainedModel, way: str, padded: bool) -> None:
    options = WAYS[way] | ({"attention_mask": PADDED} if padded else {})
    assert torch.equal(generate(decoder, **options), without_cache(decoder, **options))


def test_logits_are_close(decoder: PreTrainedModel) -> None:
    options = {"return_dict_in_generate": True, "output_logits": True, "attention_mask": PADDED, "max_new_tokens": 20}
    found, expected = generate(decoder, **options), without_cache(decoder, **options)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_returned_cache_is_ours_and_does_not_grow(decoder: PreTrainedModel) -> None:
    sizes = []
    for length in (8, 40):
        cache = cache_of(generate(decoder, max_new_tokens=length, return_dict_in_generate=True))
        ours = [layer for layer in cache.layers if isinstance(layer, AttnConvCacheLayer)]
        assert len(ours) == len(converted_modules(decoder))
        assert all(layer.get_seq_length() == PROMPT.shape[1] + length - 1 for layer in ours)
        sizes.append([layer.nbytes for layer in ours])
    assert sizes[0] == sizes[1]


def test_the_cache_does_not_hold_on_to_the_prompt(decoder: PreTrainedModel) -> None:
    cache = cache_of(generate(decoder, max_new_tokens=1, return_dict_in_generate=True))
    for layer in cache.layers:
        if isinstance(layer, AttnConvCacheLayer):
            # Tensors without elements that are views of a large one would keep all of its memory.
            assert layer.keys.untyped_storage().nbytes() == 0
            assert layer.values.untyped_storage().nbytes() == 0


class NoStream:
    """Stands in for the CUDA streams on which an offloading cache moves layers."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, stream: "NoStream") -> None:
        pass


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
def test_offloaded_cache(decoder: PreTrainedModel, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    options = {"cache_implementation": implementation, "attention_mask": PADDED}
    assert torch.equal(generate(decoder, **options), without_cache(decoder, **options))


def test_user_made_cache(decoder: PreTrainedModel) -> None:
    cache = DynamicCache()
    assert torch.equal(generate(decoder, **{CACHE: cache}), without_cache(decoder))
    assert sum(isinstance(layer, AttnConvCacheLayer) for layer in cache.layers) == len(converted_modules(decoder))


def test_cache_made_for_the_config(decoder: PreTrainedModel) -> None:
    cache = DynamicCache(config=decoder.config)
    assert sum(isinstance(layer, AttnConvCacheLayer) for layer in cache.layers) == len(converted_modules(decoder))
    assert torch.equal(generate(decoder, **{CACHE: cache}), without_cache(decoder))


def test_a_cache_can_be_used_again_after_reset(decoder: PreTrainedModel) -> None:
    cache = DynamicCache(config=decoder.config)
    for _ in range(2):
        assert torch.equal(generate(decoder, **{CACHE: cache}), without_cache(decoder))
        cache = DynamicCache(config=decoder.config) if any(cache.is_sliding) else cache
        cache.reset()


@pytest.mark.parametrize("padded", [False, True], ids=["full batch", "left-padded"])
def test_several_turns(decoder: PreTrainedModel, padded: bool) -> None:
    mask = PADDED if padded else torch.ones_like(PROMPT)
    tokens, cache = PROMPT, None
    for turn in range(3):
        if turn:
            question = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(turn))
            tokens = torch.cat([tokens, question], 1)
        mask = torch.cat([mask, torch.ones(2, tokens.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        answer = generate(
            decoder, tokens, attention_mask=mask, **{CACHE: cache}, return_dict_in_generate=True, max_new_tokens=4
        )
        assert torch.equal(answer.sequences, without_cache(decoder, tokens, attention_mask=mask, max_new_tokens=4))
        tokens, cache = answer.sequences, cache_of(answer)


@pytest.mark.parametrize("kind", ["plain", "converted", pytest.param("itself", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layers", ["all", pytest.param("0,2", marks=pytest.mark.slow)])
def test_assisted_decoding(layers: str, kind: str) -> None:
    config = LlamaConfig(**SMALL)
    model = decoder_of("llama, all layers" if layers == "all" else "llama, every second layer")
    # One that is often wrong, so that many of its tokens are taken back, and one that is always right.
    other = LlamaConfig(**SMALL | {"num_hidden_layers": 2})
    assistant = {
        "plain": lambda: tiny(other, seed=7),
        "converted": lambda: converted(other, seed=7),
        "itself": lambda: converted(config, layers),
    }[kind]()
    for row in (PROMPT[:1], PROMPT[1:]):
        found = generate(model, row, assistant_model=assistant, max_new_tokens=16)
        assert torch.equal(found, without_cache(model, row, max_new_tokens=16))


@pytest.mark.parametrize("layers", ["all", "0,2"])
def test_prompt_lookup(layers: str) -> None:
    model = decoder_of("llama, all layers" if layers == "all" else "llama, every second layer")
    repeated = torch.cat([PROMPT[:1], PROMPT[:1], PROMPT[:1, :4]], 1)
    found = generate(model, repeated, prompt_lookup_num_tokens=3, max_new_tokens=24)
    assert torch.equal(found, without_cache(model, repeated, max_new_tokens=24))


def test_contrast_of_beams_in_groups_of_return_sequences(llama: PreTrainedModel) -> None:
    options = {"do_sample": True, "num_return_sequences": 3, "attention_mask": PADDED}
    assert torch.equal(generate(llama, **options), without_cache(llama, **options))


def test_token_by_token_forward_is_one_forward(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        expected = llama(input_ids=PROMPT, use_cache=False).logits
        cache, parts = DynamicCache(config=llama.config), []
        for start, stop in ((0, 1), (1, 5), (5, 6), (6, 9)):
            parts.append(llama(input_ids=PROMPT[:, start:stop], **{CACHE: cache}, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)


def test_rows_of_a_cache_can_be_selected_and_repeated(llama: PreTrainedModel) -> None:
    cache = DynamicCache(config=llama.config)
    order, following = torch.tensor([1, 0, 1]), torch.tensor([[5, 6], [7, 8], [9, 10]])
    with torch.no_grad():
        llama(input_ids=PROMPT, **{CACHE: cache}, use_cache=True)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(2 * order)
        found = llama(input_ids=following, **{CACHE: cache}, use_cache=True).logits
        expected = llama(input_ids=torch.cat([PROMPT[order], following], 1), use_cache=False).logits[:, -2:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@functools.cache
def encoder_decoder(kind: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A converted encoder-decoder, both sides converted, and a batch for it."""
    text = {"input_ids": PROMPT, "attention_mask": PADDED}
    if kind == "bart":
        return converted(BartConfig(**ENCODER_DECODER, forced_eos_token_id=None), "all", AutoModelForSeq2SeqLM), text
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}
        return converted(T5Config(**COMMON | sizes), "all", AutoModelForSeq2SeqLM), text
    config = WhisperConfig(**ENCODER_DECODER, num_mel_bins=8, max_source_positions=16, max_target_positions=64)
    config.begin_suppress_tokens = None
    sound = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    return converted(config, "all", AutoModelForSpeechSeq2Seq), {"input_features": sound}


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams"])
@pytest.mark.parametrize("kind", ["bart", "t5", "whisper"])
def test_encoder_decoders(kind: str, way: str) -> None:
    model, inputs = encoder_decoder(kind)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None} | WAYS[way]
    torch.manual_seed(1)
    found = model.generate(**inputs, **options)
    torch.manual_seed(1)
    assert torch.equal(found, model.generate(**inputs, use_cache=False, **options))


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_only_self_attention_of_a_decoder_is_replaced(kind: str) -> None:
    model, inputs = encoder_decoder(kind)
    result = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = cache_of(result)
    assert all(isinstance(layer, AttnConvCacheLayer) for layer in cache.self_attention_cache.layers)
    assert not any(isinstance(layer, AttnConvCacheLayer) for layer in cache.cross_attention_cache.layers)
