"""Attention of one new token to the blocks that were chosen for it, gathered out of a cache."""

import torch
from torch import Tensor

from ...tokens import Tokens

# Rows times heads that are gathered one by one: many heads, or short rows, are quicker together.
MOST_SELECTED = 128


def attend_one(query: Tensor, tokens: Tokens, indices: Tensor, count: Tensor, *, block: int, scaling: float) -> Tensor:
    """Exact softmax over the chosen blocks.

    Args:
        query: `[B, heads, 1, D]`.
        tokens: all that are held, padding first, that of the query last.
        indices: `[B, KV, 1, K]` int64 chosen blocks, counted from each row's first real token; -1 for none.
        count: `[B]` int64, real tokens of each row, at least 1.
        block: tokens of a block.
        scaling: factor on query-key products.

    Returns:
        `[B, heads, 1, V]`.
    """
    total, device = tokens.length, query.device
    indices = indices[:, :, 0]
    at = (indices[..., None] * block + torch.arange(block, device=device)).flatten(2)
    is_seen = (indices >= 0).repeat_interleave(block, -1) & (at < count[:, None, None])
    slots = (at + (total - count)[:, None, None]).clamp(0, total - 1)
    dtype = torch.promote_types(tokens.keys.dtype, tokens.values.dtype)
    keys, values = (gather_tokens(t, slots).to(dtype) for t in (tokens.keys, tokens.values))
    rows = query.to(dtype).unflatten(1, (keys.shape[1], -1)).squeeze(3)
    # Written out: so few keys that a fused kernel gains nothing, and would take another way with a mask.
    logits = (rows @ keys.transpose(-1, -2)).to(torch.promote_types(dtype, torch.float32)) * scaling
    weights = logits.masked_fill(~is_seen[:, :, None], -torch.inf).softmax(-1)
    out: Tensor = weights.to(dtype) @ values
    return out.flatten(1, 2).unsqueeze(2)


def gather_tokens(tensor: Tensor, slots: Tensor) -> Tensor:
    """Tokens `[B, KV, K]` of `tensor` `[B, KV, S, D]`, of each head its own: `[B, KV, K, D]`."""
    batch, heads = slots.shape[:2]
    if slots.device.type == "cpu" and batch * heads <= MOST_SELECTED:
        # Whole vectors at a time.
        pairs = zip(tensor.flatten(0, 1), slots.flatten(0, 1), strict=True)
        together: Tensor = torch.stack([own.index_select(0, at) for own, at in pairs]).unflatten(0, (batch, heads))
        return together
    row, head = (torch.arange(n, device=slots.device) for n in (batch, heads))
    return tensor[row[:, None, None], head[:, None], slots]
