"""Attention that writes every weight out, on some queries at a time: memory linear in the length, time square."""

from collections.abc import Callable

import torch
from torch import Tensor

from .tokens import Call
from .window import window_mask

# Queries whose weights exist at once.
QUERIES_AT_ONCE = 128


def in_query_blocks(call: Call, attend: Callable[[Call], Tensor], *, causal: bool) -> Tensor:
    """The same as `attend` of the whole call, from calls of a few of its queries.

    Args:
        call: any call.
        attend: from a call to `[batch, num_heads, T, any]`, each query by itself.
        causal: whether queries see nothing behind them, which is then not looked at.
    """
    if call.length <= QUERIES_AT_ONCE:
        return attend(call)
    outs = []
    for start in range(0, call.length, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, call.length)
        query, past = call.query[:, :, start:stop], call.past
        # With the block's queries last, as calls have them.
        outs.append(
            attend(call.over(query, call.tokens.part(0, past + stop)) if causal else call.over(query, call.tokens))
        )
    return torch.cat(outs, 2)


def grouped_logits(call: Call) -> Tensor:
    """Query-key products times the scaling: `[batch, num_heads, T, S]`."""
    groups = call.query.shape[1] // call.tokens.keys.shape[1]
    keys = call.tokens.keys.repeat_interleave(groups, 1) if groups > 1 else call.tokens.keys
    return call.query @ keys.transpose(-1, -2) * call.scaling


def grouped_values(call: Call) -> Tensor:
    """The values as each query head sees them: `[batch, num_heads, S, value_dim]`."""
    groups = call.query.shape[1] // call.tokens.values.shape[1]
    return call.tokens.values.repeat_interleave(groups, 1) if groups > 1 else call.tokens.values


def visible_keys(call: Call, *, causal: bool) -> Tensor:
    """Bool, broadcast over `[batch, heads, T, S]`: the keys that a query sees."""
    count = call.tokens.length
    inside = window_mask(call.length, count, count, causal=causal, device=call.query.device)
    return inside if call.tokens.valid is None else inside & call.tokens.valid[:, None, None, :]
