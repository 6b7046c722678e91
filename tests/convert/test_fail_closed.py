"""However a version of transformers hands over a cache, a converted model is exact or stops: it never writes on without
what came before."""

from collections import OrderedDict, UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import (
    AutoModelForCausalLM,
    BatchEncoding,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from attnconv.compat import cache_argument
from attnconv.convert import convert_model
from attnconv.errors import PlanError

pytestmark = pytest.mark.compat

CACHE = cache_argument(LlamaForCausalLM.forward)
IDS = torch.arange(3, 15)[None]
CONFIG = LlamaConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=64,
    pad_token_id=0,
)

# How the layers of a model call their attention: from its arguments by name to others.
Calling = Callable[[Any, dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def model_calling(attention: type[LlamaAttention], calling: Calling, method: str = "hedgehog") -> PreTrainedModel:
    """A converted Llama whose attention modules are of another class and are called in another way."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    model = convert_model(_with_attention(model, attention), method)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda module, _, kwargs: calling(module, kwargs), with_kwargs=True)
    return model


def _with_attention(model: PreTrainedModel, attention: type[LlamaAttention]) -> PreTrainedModel:
    for layer in model.model.layers:
        layer.self_attn.__class__ = attention
    return model


def first_token(model: PreTrainedModel) -> None:
    model(input_ids=IDS[:, :6], use_cache=True, **{CACHE: DynamicCache(config=model.config)})


def assert_cache_is_without(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(input_ids=part, use_cache=True, **{CACHE: cache}).logits for part in IDS.split([6, 1, 1, 4], 1)]
        whole = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)


class Renamed(LlamaAttention):
    """Takes its cache under a name that nobody knows."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, remembered=None, **kwargs):
        given = remembered.cache if isinstance(remembered, SimpleNamespace) else remembered
        kwargs[CACHE] = given[0] if isinstance(given, list) else given
        return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)


class Swallowing(LlamaAttention):
    """Hands nothing but what it knows on to the attention function."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        given = {CACHE: getattr(self, "kept", None) or kwargs.get(CACHE)}
        return super().forward(hidden_states, position_embeddings, attention_mask, **given)


class Computing(LlamaAttention):
    """Computes softmax attention by itself."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def as_it_is(module: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), kwargs


def renamed(module: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"remembered": kwargs.pop(CACHE), **kwargs}


def positional(module: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = ("hidden_states", "position_embeddings", "attention_mask", CACHE)
    return tuple(kwargs.pop(name) for name in names), kwargs


def hidden(module: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"remembered": SimpleNamespace(cache=kwargs.pop(CACHE)), **kwargs}


def listed(module: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = positional(module, kwargs)
    return (*args[:3], [args[3]]), kwargs


def kept(module: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    module.__dict__["kept"] = kwargs.pop(CACHE)
    return (), kwargs


@pytest.mark.parametrize(
    ("attention", "calling"),
    [(LlamaAttention, as_it_is), (Renamed, renamed), (LlamaAttention, positional), (Swallowing, as_it_is)],
    ids=["as today", "renamed", "positional", "swallowed context"],
)
@pytest.mark.parametrize("method", ["hedgehog", "sliding_window"])
def test_a_cache_is_found_whatever_it_is_called(attention: type[LlamaAttention], calling: Calling, method: str) -> None:
    assert_cache_is_without(model_calling(attention, calling, method))


@pytest.mark.parametrize(
    ("attention", "calling", "words"),
    [
        (Renamed, hidden, "DynamicCache that was not among its arguments"),
        (Swallowing, kept, "DynamicCache that was not among its arguments"),
        (Renamed, listed, "its cache inside a list"),
        (Computing, as_it_is, "without the converted core"),
    ],
    ids=["renamed", "swallowed", "positional", "dense attention of its own"],
)
def test_what_cannot_be_found_stops_at_the_first_token(
    attention: type[LlamaAttention], calling: Calling, words: str
) -> None:
    with pytest.raises(PlanError, match=rf"{words}.*transformers {transformers.__version__}.*attnconv doctor"):
        first_token(model_calling(attention, calling))


class Paged:
    """Stores keys in a way of its own."""

    def update(self, key: Any, value: Any, *args: Any) -> tuple[Any, Any]:
        return key, value


class PagedMapping(Paged, dict[str, Any]):
    """The same, as a mapping of its pages."""


@pytest.mark.parametrize("pages", [Paged, PagedMapping])
@pytest.mark.parametrize("name", ["pages", CACHE])
def test_a_cache_of_another_kind_stops_at_the_first_token(pages: type[Any], name: str) -> None:
    def paged(module: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {**kwargs, CACHE: None, name: pages()}

    with pytest.raises(PlanError, match=rf"receives a {pages.__name__}.*paged caches"):
        first_token(model_calling(LlamaAttention, paged))


@pytest.mark.parametrize("mapping", [dict, OrderedDict, UserDict, BatchEncoding])
def test_a_mapping_that_is_no_cache_goes_through(mapping: type[Any]) -> None:
    def with_mapping(module: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {**kwargs, "shapes": mapping({"height": 3})}

    assert_cache_is_without(model_calling(LlamaAttention, with_mapping))


def test_a_token_in_the_middle_of_nothing_is_refused() -> None:
    model = model_calling(LlamaAttention, as_it_is)
    with pytest.raises(PlanError, match="at position 7 of a text, but 0 tokens before it"):
        model(input_ids=IDS[:, :1], position_ids=torch.tensor([[7]]), use_cache=False)
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS[:, :3], use_cache=True, **{CACHE: cache})
    with pytest.raises(PlanError, match="at position 7 of a text, but 3 tokens before it"):
        model(input_ids=IDS[:, :1], position_ids=torch.tensor([[7]]), use_cache=True, **{CACHE: cache})


def test_tokens_that_no_state_took_over_are_noticed_at_the_next_call() -> None:
    model = model_calling(LlamaAttention, as_it_is)
    cache = DynamicCache(config=model.config)
    assert isinstance(cache, Cache)
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with pytest.raises(PlanError, match="3 tokens of this cache were never taken over"):
        model(input_ids=IDS[:, :1], use_cache=True, **{CACHE: cache})
    cache.reset()
    model(input_ids=IDS[:, :1], use_cache=True, **{CACHE: cache})
