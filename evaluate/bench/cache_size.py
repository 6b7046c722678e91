"""How much a model's cache holds, whatever its layers are."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from ...convert.surgery.cache_layer import AttnConvCacheLayer


def held_bytes(cache: Any) -> int:
    """Bytes of everything in a cache: keys and values, states of convolutions and recurrences, states of ours.

    Counted are the tensors' elements. What a tensor keeps alive besides, because it is a view into a larger one, is
    not; peak memory shows that.

    Args:
        cache: what a model returned as its cache, or a layer of it.
    """
    if isinstance(cache, torch.Tensor):
        # Single numbers are counters.
        return int(cache.nbytes) if cache.dim() else 0
    if isinstance(cache, AttnConvCacheLayer):
        return cache.nbytes + held_bytes(cache.inner)
    if isinstance(cache, Cache | CacheLayerMixin | LinearAttentionCacheLayerMixin):
        return held_bytes(vars(cache))
    if isinstance(cache, Mapping):
        return sum(held_bytes(value) for value in cache.values())
    if isinstance(cache, list | tuple):
        return sum(held_bytes(value) for value in cache)
    return 0
