"""Causal linear attention in chunks, and its running sums."""

import torch
from torch import Tensor

from ..contract import Memory
from ..window import from_blocks, to_blocks

CHUNK = 64
# Queries handled at a time: what is written out for them stays in the processor's cache.
SEGMENT = 512

# Numerator and denominator of a fraction that is divided at the end.
Terms = tuple[Tensor, Tensor]


def linear_sums(features: Tensor, values: Tensor) -> Memory:
    """Sums over a stretch of tokens.

    Args:
        features: `[batch, feature_heads, seq, feature_dim]`, φ(k), zero where padding stands.
        values: `[batch, num_kv_heads, seq, value_dim]`; `feature_heads` is a multiple of `num_kv_heads`.

    Returns:
        `key_values` `[batch, feature_heads, feature_dim, value_dim]` = Σ φ(k) vᵀ and
        `normalizer` `[batch, feature_heads, feature_dim]` = Σ φ(k).
    """
    batch, heads, length, feature_dim = features.shape
    num_kv_heads, value_dim = values.shape[1], values.shape[-1]
    rows = features.view(batch, num_kv_heads, -1, length, feature_dim).transpose(3, 4).flatten(2, 3)
    sums = (rows @ values).reshape(batch, heads, feature_dim, value_dim)
    return {"key_values": sums, "normalizer": features.sum(2)}


def add_memory(first: Memory, second: Memory) -> Memory:
    """Add two sets of running sums; an empty one counts as zero."""
    if not first:
        return second
    return {name: total + second[name] for name, total in first.items()} if second else first


def memory_terms(query_features: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    """What a query reads from running sums: numerator `[..., T, value_dim]`, denominator `[..., T, 1]`.

    Args:
        query_features: `[batch, num_heads, T, feature_dim]`.
        memory: sums whose head count divides `num_heads`.
    """
    batch, num_heads, length, _ = query_features.shape
    sums, normalizer = memory["key_values"], memory["normalizer"]
    rows = query_features.reshape(batch, sums.shape[1], -1, query_features.shape[-1])
    numerator = (rows @ sums).reshape(batch, num_heads, length, -1)
    return numerator, (rows @ normalizer[..., None]).reshape(batch, num_heads, length, 1)


def causal_linear(query_features: Tensor, key_features: Tensor, values: Tensor, memory: Memory) -> tuple[Terms, Memory]:
    """Linear attention terms over all keys up to and including the query's own position.

    Inside a chunk the weights are written out; between chunks running sums carry on, so time and memory are linear.

    Args:
        query_features: `[batch, num_heads, T, feature_dim]`.
        key_features: `[batch, feature_heads, T, feature_dim]`, with `feature_heads` either `num_kv_heads` or
            `num_heads`; zero where padding stands.
        values: `[batch, num_kv_heads, T, value_dim]`.
        memory: sums over everything before, may be empty.

    Returns:
        numerator `[batch, num_heads, T, value_dim]` and denominator `[batch, num_heads, T, 1]`; and the sums over
        everything up to the last of these tokens.
    """
    num_heads, length = query_features.shape[1:3]
    num_kv_heads = values.shape[1]
    # Inside a chunk the cost grows with its length, between chunks with the number of features.
    chunk = min(CHUNK, max(16, query_features.shape[-1] // 2), length)
    num_chunks = -(-length // chunk)
    groups = num_heads // num_kv_heads
    queries = to_blocks(query_features, num_kv_heads, num_chunks, chunk)
    keys = to_blocks(key_features, num_kv_heads, num_chunks, chunk)
    value_blocks = to_blocks(values, num_kv_heads, num_chunks, chunk).squeeze(3)
    if keys.shape[3] == 1:
        queries = queries.flatten(3, 4).unsqueeze(3)

    weights = (queries @ keys.transpose(-1, -2)).flatten(3, 4)
    order = torch.ones(chunk, chunk, dtype=weights.dtype, device=weights.device).tril()
    weights = weights * order.repeat(groups, 1)
    numerator, denominator = weights @ value_blocks, weights.sum(-1, keepdim=True)

    sums = (keys.transpose(-1, -2).flatten(3, 4) @ value_blocks).unflatten(3, keys.shape[3:4] + keys.shape[5:])
    sums_before, sums_after = _carry(sums, memory.get("key_values"))
    normalizer_before, normalizer_after = _carry(keys.sum(4), memory.get("normalizer"))
    numerator = numerator + (queries @ sums_before).flatten(3, 4)
    denominator = denominator + (queries @ normalizer_before[..., None]).flatten(3, 4)
    terms = from_blocks(numerator, groups, length), from_blocks(denominator, groups, length)
    return terms, {"key_values": sums_after, "normalizer": normalizer_after}


def _carry(per_chunk: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums before each chunk `[batch, num_kv_heads, num_chunks, key_groups, ...]`, and of all `[batch, heads, ...]`."""
    running = [torch.zeros_like(per_chunk[:, :, 0]) if start is None else start.reshape(per_chunk[:, :, 0].shape)]
    for chunk in per_chunk.unbind(2):
        running.append(running[-1] + chunk)
    return torch.stack(running[:-1], 2), running[-1].flatten(1, 2)
