"""What some rows of queries give to each block of keys, by a kernel that keeps nothing else."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...window import LOG2E
from ..launching import block as columns_at_a_time
from ..launching import launch, power_of_two, precision
from ..selection import in_one_dtype, problem_with

# Rows and blocks are made of so many tokens, or rows of one.
PIECE = 16


def pooled_problem(query: Tensor, key: Tensor, block: int, together: int) -> str | None:
    """Why the kernel cannot take a call, or None; arguments as for `pooled_map`."""
    if block % PIECE or (together > 1 and together % PIECE):
        return f"blocks have {block} tokens and rows {together}, and the kernel takes multiples of {PIECE}"
    return problem_with(query, key, dims=(query.shape[-1],))


def pooled_map(
    query: Tensor, key: Tensor, *, scaling: float, block: int, together: int, first: int, largest: bool
) -> Tensor:
    """Causal attention of some queries pooled over blocks of keys, each head's by itself; without gradients.

    Args:
        query: `[batch, num_heads, Q, head_dim]`, those from the token `first` on, whole rows of them, but for the last
            of all tokens.
        key: `[batch, num_kv_heads, T, head_dim]`, of sequences without padding.
        scaling: factor on query-key products.
        block: tokens of a block of keys.
        together: queries of a row.
        first: their first token, with which a row begins.
        largest: take a block's largest weight in any of a row's queries, instead of the sum over the block, mean over
            the queries.

    Returns:
        `[batch, num_heads, rows, blocks]` fp32; of a last row that is short the sum over what is there, divided by
        `together`.

    Raises:
        ValueError: the kernel does not take such tensors.
    """
    query, key = in_one_dtype(query, key)
    problem = pooled_problem(query, key, block, together)
    if problem is not None:
        raise ValueError(f"the kernel cannot pool attention: {problem}")
    found: Tensor = _pooled_map(query, key, scaling, block, _tile(together, query.dtype), first, largest)
    # Tiles of a row.
    tiles = max(1, together // _tile(together, query.dtype))
    nothing = -torch.inf if largest else 0.0
    rows: Tensor = F.pad(found, (0, 0, 0, -found.shape[2] % tiles), value=nothing).unflatten(2, (-1, tiles))
    return rows.amax(3).exp2() if largest else rows.sum(3) / together


def _tile(together: int, dtype: torch.dtype) -> int:
    """Queries of a row that one program pools; 1 where each is a row by itself."""
    most = 64 if dtype == torch.bfloat16 else 32
    return together if together == 1 else next(size for size in (64, 32, 16) if size <= most and together % size == 0)


@torch.library.custom_op("attnconv::pooled_map", mutates_args=())
def _pooled_map(
    query: Tensor, key: Tensor, scaling: float, block: int, pooled: int, first: int, largest: bool
) -> Tensor:
    from .kernels import pool_attention

    batch, heads, length, head_dim = query.shape
    queries = columns_at_a_time(64, query.dtype) if pooled == 1 else pooled
    out = _empty(query, key, block, pooled).fill_(-torch.inf if largest else 0.0)
    wide = power_of_two(head_dim) > (128 if query.dtype == torch.bfloat16 else 64)
    keys = columns_at_a_time(block, query.dtype)
    launch(
        pool_attention,
        (-(-length // queries), batch * heads),
        {
            "q": query.contiguous(),
            "k": key.contiguous(),
            "out": out,
            "scale": scaling * LOG2E,
            "first": first,
            "num_queries": length,
            "num_keys": key.shape[2],
            "width": out.shape[-1],
        },
        {
            "H": heads,
            "HV": key.shape[1],
            "D": head_dim,
            "BD": power_of_two(head_dim),
            "BLOCK": block,
            "BQ": queries,
            "BK": max(16, keys // (1 + wide)),
            "LARGEST": largest,
            "EACH": pooled == 1,
            **precision(query.dtype),
        },
    )
    return out


@_pooled_map.register_fake
def _empty_map(
    query: Tensor, key: Tensor, scaling: float, block: int, pooled: int, first: int, largest: bool
) -> Tensor:
    return _empty(query, key, block, pooled)


def _empty(query: Tensor, key: Tensor, block: int, pooled: int) -> Tensor:
    shape = *query.shape[:2], -(-query.shape[2] // pooled), -(-key.shape[2] // block)
    return query.new_empty(shape, dtype=torch.float32)
