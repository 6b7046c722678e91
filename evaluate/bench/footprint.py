"""What a sequence costs in memory while a model generates: key/value cache against the states of a conversion."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ...attention_modules import AttentionModule, Geometry

LENGTHS = (4_096, 32_768, 131_072)


@dataclass(frozen=True)
class CachedLayer:
    """One attention layer as the cache sees it.

    Attributes:
        geometry: its head counts and sizes.
        window: newest tokens that the unconverted layer keeps; None means all.
        module: the method's module in place of softmax attention (its weights may be on the meta device); None if
            the layer stays as it is.
    """

    geometry: Geometry
    window: int | None
    module: AttentionModule | None


@dataclass(frozen=True)
class Footprint:
    """Bytes that one sequence holds.

    Attributes:
        tokens: length of the sequence.
        before: key/value cache of the model as it is.
        after: states of the converted layers and key/value cache of the others.
    """

    tokens: int
    before: int
    after: int


def footprints(
    layers: Sequence[CachedLayer], dtype: torch.dtype, lengths: Sequence[int] = LENGTHS
) -> tuple[Footprint, ...]:
    """Bytes per sequence at each length, with keys and values in `dtype`; the layers are those that keep a cache."""
    rows = []
    for tokens in lengths:
        before = [cache_bytes(layer.geometry, tokens, dtype, window=layer.window) for layer in layers]
        after = [
            kept if layer.module is None or layer.module.keeps_softmax else layer.module.state_bytes(1, tokens, dtype)
            for layer, kept in zip(layers, before, strict=True)
        ]
        rows.append(Footprint(tokens, sum(before), sum(after)))
    return tuple(rows)


def cache_bytes(geometry: Geometry, tokens: int, dtype: torch.dtype, *, window: int | None = None) -> int:
    """Bytes of the keys and values of one sequence in one softmax layer that keeps the last `window` tokens."""
    kept = tokens if window is None else min(tokens, window)
    return kept * geometry.num_kv_heads * (geometry.head_dim + geometry.value_dim) * dtype.itemsize


def native_window(config: PreTrainedConfig, layer_idx: int | None) -> int | None:
    """Tokens that a layer's own cache keeps at most, by the model's configuration; None means all of them."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if not kinds or layer_idx is None or layer_idx >= len(kinds):
        return None
    keys = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    window = getattr(text, keys.get(kinds[layer_idx], ""), None)
    return int(window) if window else None
