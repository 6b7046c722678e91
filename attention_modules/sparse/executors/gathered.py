"""Attention of blocks of queries to the blocks of keys that were chosen for them, by gathering: for CPUs.

A row is a batch entry, a key/value head and a block of queries. Rows that attend equally many blocks run together, so
that nothing is padded; the own block stands first and is the only one with a mask, which all rows share. Time follows
the number of blocks chosen, memory the length.

Letters in shapes: those of `canvas`, and `K` chosen blocks at most.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Gathered keys of a strip: 4 MiB at head_dim 64 in fp32, and as much of values; more leaves the caches of a core.
STRIP_KEYS = 1 << 14


def attend_gathered(queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor, *, scaling: float) -> Tensor:
    """Exact softmax over the chosen blocks; differentiable in queries, keys and values.

    Args:
        queries: `[B, KV, R, G, block, D]`.
        keys: `[B, KV, N, block, D]`.
        values: `[B, KV, N, block, V]`.
        indices: `[B, KV, R, K]` int64: the queries' own block first, which is never absent, then others before it, each
            once, then -1.
        scaling: factor on query-key products.

    Returns:
        `[B, KV, R, G, block, V]`.
    """
    batch, heads, rows, groups, block, _ = queries.shape
    num_blocks = keys.shape[2]
    query = queries.flatten(0, 2)
    flat_keys, flat_values = (t.reshape(batch * heads * num_blocks, -1) for t in (keys, values))
    index = indices.flatten(0, 2)
    counts = (index >= 0).sum(-1)
    index = index + (torch.arange(batch * heads, device=index.device) * num_blocks).repeat_interleave(rows)[:, None]
    order = counts.argsort(stable=True)
    distinct, sizes = counts[order].unique_consecutive(return_counts=True)
    own = query.new_zeros(block, block).masked_fill(_later(block, query.device), -torch.inf)
    outs, start = [], 0
    for count, size in zip(distinct.tolist(), sizes.tolist(), strict=True):
        mask = F.pad(own, (0, (count - 1) * block))
        for part in order[start : start + size].split(max(1, STRIP_KEYS // (count * block))):
            chosen = index[part, :count].flatten()
            near, mixed = (
                t.index_select(0, chosen).view(len(part), 1, count * block, -1).expand(-1, groups, -1, -1)
                for t in (flat_keys, flat_values)
            )
            outs.append(F.scaled_dot_product_attention(query.index_select(0, part), near, mixed, mask, scale=scaling))
        start += size
    out = torch.cat(outs).index_select(0, order.argsort())
    return out.view(batch, heads, rows, groups, block, -1)


def _later(block: int, device: torch.device) -> Tensor:
    return torch.ones(block, block, dtype=torch.bool, device=device).triu(1)
