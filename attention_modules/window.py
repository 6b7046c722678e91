"""Exact softmax terms inside a sliding window, in blocks: time and memory linear in the length.

Both functions return the two sides of a fraction relative to the row's maximum, so that a caller can add other terms to
them before dividing.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .sinks import Sinks
from .tokens import Call

# exp2 of masked logits is twenty times as fast on a CPU as exp of them, so logits are kept in units of log 2.
LOG2E = math.log2(math.e)
# Finite, so that a row with nothing to see gives zeros instead of NaN.
MASKED = -1e30
BLOCK = 32
# Softmax terms of less than this beside linear ones, in units of log 2, are lost in fp64 too.
LEAST_LEVEL = -60.0


class SoftmaxTerms(NamedTuple):
    """The two sides of a masked softmax before the division, relative to its maximum.

    Attributes:
        numerator: `[..., T, value_dim]`.
        denominator: `[..., T, 1]`.
        peak: `[..., T, 1]` the largest logit in units of log 2, far below all logits where nothing is visible.
    """

    numerator: Tensor
    denominator: Tensor
    peak: Tensor


def window_mask(num_queries: int, num_keys: int, window: int, *, causal: bool, device: torch.device) -> Tensor:
    """`[num_queries, num_keys]` bool: which keys stand inside the window of each query (itself included)."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None]
    inside = query - key < window
    return inside & (key <= query) if causal else inside & (key - query < window)


def tokens_in_window(rank: Tensor, total: Tensor, window: int, kept: int, *, causal: bool) -> Tensor:
    """Tokens inside each query's window, and others that stay visible outside of it.

    Args:
        rank: see `AttentionContract.tokens_attended`.
        total: likewise.
        window: tokens seen back from the query, itself included; when not causal, as many ahead.
        kept: most tokens that stay visible although the window does not hold them: of a causal layer any that it has
            left behind, of others the first of the row.
        causal: whether tokens after the query are hidden.

    Returns:
        `[batch, T]` int64.
    """
    behind = (rank - window).clamp_min(0)
    last = rank if causal else torch.minimum(rank + window - 1, total)
    ahead = 0 if causal else (total.clamp_max(kept) - last).clamp_min(0)
    return last - behind + behind.clamp_max(kept) + ahead


def softmax_terms(logits: Tensor, visible: Tensor, values: Tensor) -> SoftmaxTerms:
    """Terms of a masked softmax.

    Args:
        logits: `[..., T, S]` in units of log 2, that is times `LOG2E`.
        visible: bool, broadcast over `logits`.
        values: `[..., S, value_dim]`.
    """
    logits = logits.masked_fill(~visible, MASKED)
    # Clamped above MASKED: where nothing is visible every weight underflows to zero.
    peak = logits.amax(-1, keepdim=True).clamp_min(MASKED / 1e10)
    weights = (logits - peak).exp2()
    return SoftmaxTerms(weights @ values, weights.sum(-1, keepdim=True), peak)


def divide(numerator: Tensor, denominator: Tensor, epsilon: float = 0.0) -> Tensor:
    """Numerator over denominator, zero where a row has nothing to see."""
    empty = denominator == 0
    return (numerator / (denominator + epsilon).masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


def absolute_factors(gamma: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """What absolute softmax terms, kept relative to their peak, and linear terms are multiplied by, `[..., T]`.

    The larger of the two is 1, so that neither overflows; the first never vanishes, for it may stand alone.

    Args:
        gamma: `[num_heads]`, logarithm of the factor on the softmax terms, to base 2.
        peak: `[batch, num_heads, T]`, each query's largest logit, in units of log 2.
    """
    level = peak + gamma[:, None]
    return level.clamp(LEAST_LEVEL, 0.0).exp2(), (-level).clamp_max(0.0).exp2()


def windowed_softmax(
    call: Call,
    *,
    window: int,
    causal: bool,
    sinks: Sinks | None = None,
) -> SoftmaxTerms:
    """Softmax terms over the window of every query, and over sinks outside of it.

    Args:
        call: queries, keys and values.
        window: tokens seen back from the query, itself included; when not causal, as many ahead.
        causal: whether keys after the query are hidden.
        sinks: tokens seen wherever the window stands.
    """
    query, keys, values, valid = call.query, call.tokens.keys, call.tokens.values, call.tokens.valid
    num_heads, length = query.shape[1:3]
    num_kv_heads, num_keys = keys.shape[1], keys.shape[2]
    groups = num_heads // num_kv_heads
    window = min(window, num_keys)
    # Narrow windows in narrow blocks: every query meets window + block keys.
    block = min(BLOCK, max(16, window // 2), length)
    num_blocks = -(-length // block)
    ahead = 0 if causal else window
    span = window + block + ahead
    first = num_keys - length - window
    pad = (-first, first + window + num_blocks * block + ahead - num_keys)

    # Every query block beside the keys that any of its queries can see: overlapping views, no L x L tensor.
    key_blocks = F.pad(keys, (0, 0, *pad)).unfold(2, span, block)
    value_blocks = F.pad(values, (0, 0, *pad)).unfold(2, span, block).transpose(-1, -2)
    exists = torch.ones(1, num_keys, dtype=torch.bool, device=query.device) if valid is None else valid
    exists = F.pad(exists, pad, value=False).unfold(1, span, block)
    row = torch.arange(block, device=query.device)[:, None]
    column = torch.arange(span, device=query.device)[None] - window
    band = (
        (column > row - window) & (column < row + window) if not causal else (column > row - window) & (column <= row)
    )
    visible = (exists[:, :, None, :] & band)[:, None, :, None]

    rows = to_blocks(query * (call.scaling * LOG2E), num_kv_heads, num_blocks, block)
    logits = rows.flatten(3, 4) @ key_blocks
    weighted = value_blocks
    if sinks is not None:
        outside = _outside_window(sinks, num_keys - length, num_blocks * block, window, causal=causal)
        seen = outside.view(-1, 1, num_blocks, 1, block, outside.shape[-1])
        logits, visible, weighted = _with_sinks(rows, logits, visible, weighted, sinks, seen)
    visible = visible.expand(-1, -1, -1, groups, -1, -1).flatten(3, 4)
    return SoftmaxTerms(*(from_blocks(term, groups, length) for term in softmax_terms(logits, visible, weighted)))


def _outside_window(sinks: Sinks, offset: int, length: int, window: int, *, causal: bool) -> Tensor:
    """`[batch, length, num_sinks]` bool: sinks that a query sees although its window does not hold them."""
    query = torch.arange(offset, offset + length, device=sinks.index.device)[None, :, None]
    index = sinks.index[:, None, :]
    outside = index <= query - window
    if not causal:
        outside = outside | (index >= query + window)
    return outside & sinks.valid[:, None, :]


def _with_sinks(
    rows: Tensor, logits: Tensor, visible: Tensor, values: Tensor, sinks: Sinks, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the sinks' columns before those of the window."""
    num_blocks = rows.shape[2]
    scores = (rows.flatten(2, 4) @ sinks.keys.transpose(-1, -2)).view(*rows.shape[:-1], -1).flatten(3, 4)
    sink_values = sinks.values[:, :, None].expand(-1, -1, num_blocks, -1, -1)
    visible = visible.expand(seen.shape[0], -1, -1, -1, -1, -1)
    return torch.cat([scores, logits], -1), torch.cat([seen, visible], -1), torch.cat([sink_values, values], -2)


def to_blocks(tensor: Tensor, num_kv_heads: int, num_blocks: int, block: int) -> Tensor:
    """`[batch, heads, T, dim]` → `[batch, num_kv_heads, num_blocks, groups, block, dim]`, zeros behind the end."""
    batch, heads, length, dim = tensor.shape
    tensor = F.pad(tensor, (0, 0, 0, num_blocks * block - length))
    return tensor.view(batch, num_kv_heads, heads // num_kv_heads, num_blocks, block, dim).transpose(2, 3)


def from_blocks(tensor: Tensor, groups: int, length: int) -> Tensor:
    """`[batch, num_kv_heads, num_blocks, groups * block, dim]` → `[batch, heads, T, dim]`."""
    tensor = tensor.unflatten(3, (groups, -1)).transpose(2, 3)
    return tensor.flatten(3, 4).flatten(1, 2)[:, :, :length]
