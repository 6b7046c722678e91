"""What a choice of blocks should foretell: a layer's attention pooled over blocks, a strip of queries at a time.

A strip of queries sees all its keys, so that its normaliser is known at once, and what is kept of it is one number for
each row of queries and block of keys; there never is a tensor of all queries by all keys.

Letters in shapes: `B` sequences, `KV` key/value heads, `T` tokens, `D` head_dim, `N` blocks of keys, `R` rows of
queries, a block of them or one.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention_modules.kernels.pooled_map.pooled import pooled_map, pooled_problem

Pooling = Literal["max", "mass"]


def pooled_attention(
    query: Tensor, key: Tensor, *, scaling: float, block: int, together: int, rows: range, pooling: Pooling
) -> Tensor:
    """What some rows of queries give to each block of keys, summed over the query heads that share them.

    Args:
        query: `[B, heads, T, D]` of sequences without padding.
        key: `[B, KV, T, D]`.
        scaling: factor on query-key products.
        block: keys of a block.
        together: queries of a row, counted from the first.
        rows: which of them.
        pooling: `max` takes a block's largest weight in any of a row's queries, `mass` the sum of its weights, mean
            over the row's queries.

    Returns:
        `[B, KV, R, N]` fp32 or fp64, not normalised; 0 behind a row.
    """
    length, heads = query.shape[2], key.shape[1]
    start, stop = rows.start * together, min(rows.stop * together, length)
    if query.device.type == "cuda" and pooled_problem(query, key, block, together) is None:
        part, largest = query[:, :, start:stop], pooling == "max"
        each = pooled_map(part, key, scaling=scaling, block=block, together=together, first=start, largest=largest)
        of_heads: Tensor = each.unflatten(1, (heads, -1)).sum(2)
        return of_heads
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query[:, :, start:stop].to(dtype).unflatten(1, (heads, -1))
    groups = grouped.shape[2]
    logits = (grouped.flatten(2, 3) * scaling) @ key[:, :, :stop].to(dtype).transpose(-1, -2)
    logits = logits.unflatten(2, (groups, -1))
    later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu(1)
    logits[..., start:].masked_fill_(later, -torch.inf)
    seen = -(-stop // block)
    # The last row and the last block may be short: what is not there weighs nothing.
    logits = F.pad(logits, (0, seen * block - stop), value=-torch.inf).unflatten(-1, (seen, block))
    held = logits.logsumexp(-1)
    level = held.logsumexp(-1, keepdim=True)
    if pooling == "max":
        pooled = _rows_of(logits.amax(-1) - level, together, -torch.inf).amax(-2).exp()
    else:
        pooled = _rows_of((held - level).exp(), together, 0.0).sum(-2) / together
    return F.pad(pooled.sum(2), (0, -(-length // block) - seen))


def _rows_of(queries: Tensor, together: int, nothing: float) -> Tensor:
    """`[B, KV, G, T, N]` → `[B, KV, G, R, together, N]`."""
    rows: Tensor = F.pad(queries, (0, 0, 0, -queries.shape[3] % together), value=nothing).unflatten(3, (-1, together))
    return rows
