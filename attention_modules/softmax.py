"""Softmax attention itself, as a method: the identity of every conversion."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import AttentionModule
from .contract import AttentionOptions, Memory
from .registry import register
from .state import AttentionState
from .tokens import Call
from .window import LOG2E, divide, softmax_terms, window_mask


class SoftmaxOptions(AttentionOptions):
    """Softmax has no options."""


@register(name="softmax", options=SoftmaxOptions, paper="", summary="softmax attention, kept as it is")
class SoftmaxAttention(AttentionModule):
    """`y_i = Σ_j softmax_j(s q_i·k_j) v_j` over `j ≤ i`, or over all j when not causal.

    In a recipe `method: softmax` leaves a layer untouched; this class is what other methods are compared with.
    """

    is_recurrent = False

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        return attend_dense_naive(call, causal=self.geometry.causal)

    def attend_torch(self, call: Call, memory: Memory) -> Tensor:
        return attend_dense(call, causal=self.geometry.causal)

    def decode_torch(self, call: Call, state: AttentionState) -> Tensor:
        return decode_dense(call.over(call.query, state.append(call.tokens)))


def attend_dense_naive(call: Call, *, causal: bool) -> Tensor:
    """Softmax over all tokens, every weight written out: `[batch, num_heads, T, value_dim]`."""
    groups = call.query.shape[1] // call.tokens.keys.shape[1]
    keys, values = (t.repeat_interleave(groups, 1) for t in (call.tokens.keys, call.tokens.values))
    logits = call.query @ keys.transpose(-1, -2) * (call.scaling * LOG2E)
    numerator, denominator, _ = softmax_terms(logits, _visible(call, causal=causal), values)
    return divide(numerator, denominator)


def attend_dense(call: Call, *, causal: bool) -> Tensor:
    """The same by torch's own kernels."""
    query, tokens = call.query, call.tokens
    if tokens.valid is None and (not causal or call.past == 0):
        mask, is_causal = None, causal
    else:
        mask, is_causal = _visible(call, causal=causal), False
    grouped = query.shape[1] > tokens.keys.shape[1]
    return F.scaled_dot_product_attention(
        query, tokens.keys, tokens.values, mask, is_causal=is_causal, scale=call.scaling, enable_gqa=grouped
    )


def decode_dense(call: Call) -> Tensor:
    """The same of one query of every row.

    Query heads that share keys are the rows of one product: on a CPU two to three times as fast as `enable_gqa`. In the
    dtype of the keys, for a copy of all of them in another would take longer than the attention itself.
    """
    tokens = call.tokens
    dtype = torch.promote_types(tokens.keys.dtype, tokens.values.dtype)
    mask = None
    if tokens.valid is not None:
        mask = tokens.valid.clone()
        # A row of padding looks at itself, so that no kernel divides zero by zero.
        mask[:, -1] = True
        mask = mask[:, None, None]
    rows = call.query.to(dtype).unflatten(1, (tokens.keys.shape[1], -1)).squeeze(3)
    keys, values = tokens.keys.to(dtype), tokens.values.to(dtype)
    out = F.scaled_dot_product_attention(rows, keys, values, mask, scale=call.scaling)
    return out.flatten(1, 2).unsqueeze(2)


def _visible(call: Call, *, causal: bool) -> Tensor:
    query, num_keys, valid = call.query, call.tokens.length, call.tokens.valid
    inside = window_mask(call.length, num_keys, num_keys, causal=causal, device=query.device)
    if valid is None:
        return inside
    # Rows of padding look at themselves, so that no kernel divides zero by zero.
    return inside & valid[:, None, None, :] | torch.eye(num_keys, dtype=torch.bool, device=query.device)[call.past :]
