"""Softmax attention of the heads and tokens that a gate has chosen, and of no others, where that saves time.

The rule is what was measured on one thread of an AMD EPYC, 9 query and 3 KV heads of 64, fp32, gates included: of what
SDPA's causal kernel needs for all heads, 2,048 tokens take 0.75 x with half of the pairs of tokens and KV heads, 0.6 x
with a third, 0.8 to 0.9 x with two thirds and 1.15 x with all. A single token takes 0.26 x with one of three KV heads
and 0.5 x with two over 32,768 others, 0.4 x and 0.75 x over 8,192. Over 2,048 gates take about as long
as the kernel, so that nothing is saved against a layer without them: about 1 x with one KV head and 1.5 x with two,
where the kernel and gates together take 1.8 x. In bf16 such products are slower than the kernel.

Letters in shapes: `H` query heads, `K` KV heads, `T` queries, `S` keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Share of all pairs of tokens and heads up to which gathering pays, and tokens from which on it was measured to.
GATHERED_SHARE, LEAST_QUERIES, LEAST_KEYS = 0.5, 1024, 2048
# Queries at a time, against the keys up to the last of them.
GATHERED_BLOCK = 128


def gathering_pays(query: Tensor, key: Tensor) -> bool:
    """Whether a call is one in which leaving out heads can save time, whatever is chosen.

    Args:
        query: `[batch, H, T, head_dim]`.
        key: `[batch, K, S, head_dim]`.
    """
    if query.dtype != torch.float32 or query.device.type != "cpu":
        return False
    if query.shape[2] == 1:
        return query.shape[0] == 1 and key.shape[2] >= LEAST_KEYS
    return query.shape[2] == key.shape[2] >= LEAST_QUERIES and torch.get_num_threads() == 1


def gathered_attention(query: Tensor, key: Tensor, value: Tensor, gates: Tensor, scaling: float) -> Tensor | None:
    """Causal softmax attention of what is chosen.

    Args:
        query: `[batch, H, T, head_dim]`, of the newest tokens.
        key: `[batch, K, S, head_dim]`; S is T, or T is 1.
        value: `[batch, K, S, value_dim]`.
        gates: `[batch, H, T]`, 0 where nothing is chosen.
        scaling: factor on query-key products.

    Returns:
        `[batch, H, T, value_dim]`, 0 where nothing is chosen; None where so much is that all heads take no longer.
    """
    if query.shape[2] == 1:
        return _attend_one_token(query, key, value, gates, scaling)
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    # `[batch, K, group, T]`
    wanted = (gates != 0).unflatten(1, (kv_heads, group))
    if float(wanted.float().mean()) > GATHERED_SHARE:
        return None
    out = value.new_zeros(*query.shape[:3], value.shape[-1])
    for row in range(query.shape[0]):
        for head in range(kv_heads):
            own, keys, values = wanted[row, head], key[row, head], value[row, head]
            together = bool((own == own[:1]).all())
            for first in range(0, group, group if together else 1):
                places = own[first].nonzero()[:, 0]
                if len(places):
                    at = slice(head * group + first, head * group + first + (group if together else 1))
                    out[row, at, places] = _attend_places(
                        query[row, at].index_select(1, places), keys, values, places, scaling
                    )
    return out


def _attend_one_token(query: Tensor, key: Tensor, value: Tensor, gates: Tensor, scaling: float) -> Tensor | None:
    """The same for the newest token of one sequence: KV heads none of whose query heads is chosen are not read."""
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    # On a CPU one list is read faster than many small tensors.
    factors: list[float] = gates.flatten().tolist()
    wanted = [head for head in range(kv_heads) if any(factors[head * group : (head + 1) * group])]
    if len(wanted) == kv_heads:
        return None
    # `[1, K, group, head_dim]`: query heads that share keys are the rows of one product.
    rows = query.unflatten(1, (kv_heads, group)).squeeze(3)
    out = value.new_zeros(1, kv_heads, group, value.shape[-1])
    for head in wanted:
        at = slice(head, head + 1)
        out[:, at] = F.scaled_dot_product_attention(rows[:, at], key[:, at], value[:, at], scale=scaling)
    return out.flatten(1, 2).unsqueeze(2)


def _attend_places(query: Tensor, key: Tensor, value: Tensor, places: Tensor, scaling: float) -> Tensor:
    """`[heads, n, value_dim]` of queries `[heads, n, head_dim]` at some places among keys that all heads share."""
    heads, count, dim = query.shape
    key, value = key.contiguous(), value.contiguous()
    out, ends = query.new_empty(heads, count, value.shape[-1]), places.tolist()
    for start in range(0, count, GATHERED_BLOCK):
        stop = min(start + GATHERED_BLOCK, count)
        first, last = ends[start], ends[stop - 1] + 1
        weights = (query[:, start:stop] * scaling).reshape(-1, dim) @ key[:last].T
        if last > first + 1:
            # Only what comes after the first of these queries can be hidden from one of them.
            ahead = torch.arange(first + 1, last) > places[start:stop, None]
            weights.view(heads, stop - start, last)[..., first + 1 :].masked_fill_(ahead, float("-inf"))
        out[:, start:stop] = (weights.softmax(-1) @ value[:last]).view(heads, stop - start, -1)
    return out
