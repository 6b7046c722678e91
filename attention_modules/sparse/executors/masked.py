"""Attention under a mask of chosen tokens: as slow as dense attention, right for any choice, on any device."""

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
        mask = visible(start, stop).repeat(1, 1, groups, 1)
        out = F.scaled_dot_product_attention(rows, keys, values, mask, scale=call.scaling)
        outs.append(out.unflatten(2, (groups, -1)).flatten(1, 2))
    return torch.cat(outs, 2)
