"""Attention under a mask of chosen tokens: right for any choice, on any device, and as slow as dense attention.

But on CPUs only the tokens are read that one query of a strip sees at least.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...tokens import Call
from ...window import LOG2E, softmax_terms

# Queries of a strip, so that the mask takes memory in proportion to the length.
STRIP = 256


def attend_masked_naive(call: Call, visible: Tensor) -> Tensor:
    """Every weight written out.

    Args:
        call: queries and tokens.
        visible: `[B, KV, T, S]` bool.
    """
    groups = call.query.shape[1] // visible.shape[1]
    keys, values, visible = (t.repeat_interleave(groups, 1) for t in (call.tokens.keys, call.tokens.values, visible))
    logits = call.query @ keys.transpose(-1, -2) * (call.scaling * LOG2E)
    numerator, denominator, _ = softmax_terms(logits, visible, values)
    return numerator / denominator.clamp_min(torch.finfo(numerator.dtype).tiny)


def attend_masked(call: Call, visible: Callable[[int, int], Tensor]) -> Tensor:
    """The same in strips of queries.

    Args:
        call: queries and tokens.
        visible: of queries from one to another, `[B, KV, T, S]` bool; each sees a token at least.
    """
    keys, values = call.tokens.keys, call.tokens.values
    groups = call.query.shape[1] // keys.shape[1]
    outs = []
    for start in range(0, call.length, STRIP):
        stop = min(start + STRIP, call.length)
        # Query heads that share keys are rows of one product.
        rows = call.query[:, :, start:stop].unflatten(1, (-1, groups)).flatten(2, 3)
        mask = visible(start, stop)
        if mask.device.type == "cpu":
            out = _attend_seen(rows, keys, values, mask, call.scaling)
        else:
            out = F.scaled_dot_product_attention(rows, keys, values, mask.repeat(1, 1, groups, 1), scale=call.scaling)
        outs.append(out.unflatten(2, (groups, -1)).flatten(1, 2))
    return torch.cat(outs, 2)


def _attend_seen(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """The strip `[B, KV, G * T, D]` under its mask `[B, KV, T, S]`, of each KV head the tokens that it sees alone."""
    outs = []
    for query, key, value, seen in zip(*(t.flatten(0, 1) for t in (rows, keys, values, mask)), strict=True):
        at = seen.any(0).nonzero().flatten()
        near, mixed = key.index_select(0, at), value.index_select(0, at)
        own = seen.index_select(1, at).repeat(len(query) // len(seen), 1)
        outs.append(F.scaled_dot_product_attention(query[None], near[None], mixed[None], own, scale=scaling)[0])
    together: Tensor = torch.stack(outs).unflatten(0, rows.shape[:2])
    return together
