"""Softmax over chosen blocks of keys as one operator."""

import math
from typing import Any

import torch
from torch import Tensor

from ...window import LOG2E
from ..launching import launch, power_of_two, precision
from ..selection import problem_with
from .index import reach, readers_of

# Blocks are made of pieces that `tl.dot` takes.
PIECE = 16


def gather_problem(query: Tensor, key: Tensor, value: Tensor, block: int) -> str | None:
    """Why the kernels cannot take a call, or None; arguments as for `block_gather`."""
    if block % PIECE:
        return f"a block has {block} tokens, and the kernels take multiples of {PIECE}"
    return problem_with(query, key, value, dims=(query.shape[-1], value.shape[-1]))


def block_gather(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    *,
    scaling: float,
    block: int,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact causal softmax over the blocks that each block of queries chose; differentiable in query, key and value.

    Query `t` of T stands at key `S - T + t`. Blocks of keys and of queries are counted from each row's first real
    token; the first block of queries is the one in which its first real query stands. Of a block that is chosen, a
    query sees what is not behind it. A block that is chosen twice counts twice.

    Args:
        query: `[batch, num_heads, T, head_dim]`.
        key: `[batch, num_kv_heads, S, head_dim]`.
        value: `[batch, num_kv_heads, S, value_dim]`.
        indices: `[batch, num_kv_heads, query_blocks, K]`, chosen blocks of keys in any order; -1 for none.
        scaling: factor on query-key products.
        block: tokens of a block, a multiple of 16.
        start: `[batch]` int32, tokens of padding that the keys of every row begin with; None when there is none.

    Returns:
        `[batch, num_heads, T, value_dim]` in the dtype of `value`, and the logarithm of the sum of all terms
        `[batch, num_heads, T]` fp32. A query that sees nothing, or that is padding, gives zero and minus infinity.

    Raises:
        ValueError: the kernels do not take such tensors, or there are choices of too few blocks of queries.
    """
    problem = gather_problem(query, key, value, block)
    if problem is not None:
        raise ValueError(f"the kernels cannot gather blocks: {problem}")
    length, total = query.shape[2], key.shape[2]
    # With padding the first query may be the last of a block.
    before = (total - length) % block if start is None else block - 1
    needed = min(-(-(length + before) // block), -(-total // block))
    if indices.shape[:2] != key.shape[:2] or indices.shape[2] < needed:
        raise ValueError(
            f"indices are {tuple(indices.shape)}, but {key.shape[0]} rows of {key.shape[1]} heads with {length} "
            f"queries need choices of {needed} blocks of queries each"
        )
    out, level = _forward(query, key, value, indices.to(torch.int32), start, scaling, block)
    return out, level * math.log(2)


def _constants(query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, block: int) -> dict[str, Any]:
    sizes = {"H": query.shape[1], "HV": key.shape[1], "D": query.shape[-1], "V": value.shape[-1], "BLOCK": block}
    widths = {"BD": power_of_two(query.shape[-1]), "BV": power_of_two(value.shape[-1])}
    return {**sizes, **widths, "HAS_START": start is not None, **precision(query.dtype)}


def _tiles(constants: dict[str, Any], dtype: torch.dtype, *, most_rows: int = 64) -> dict[str, int]:
    """Rows and keys that a program holds at a time: fewer where they are wide, by compiling for GPUs.

    Of a block, which may be any multiple of 16, pieces are the largest power of two that divides it.
    """
    block, widest = constants["BLOCK"], max(constants["BD"], constants["BV"])
    all_rows = block * (constants["H"] // constants["HV"])
    size = 64 if widest <= 128 else 32
    if dtype != torch.bfloat16:
        size = 32 if widest <= 64 else 16
    rows = min(most_rows if widest <= 64 and size == 64 else size, power_of_two(all_rows))
    return {"ROWS": rows, "TILES": -(-all_rows // rows), "BK": min(size, block & -block)}


def _warps(tiles: dict[str, int], constants: dict[str, Any]) -> int:
    return 4 if max(tiles["ROWS"], tiles["BK"]) * max(constants["BD"], constants["BV"]) <= 64 * 64 else 8


def _sizes(query: Tensor, key: Tensor, scaling: float) -> dict[str, Any]:
    return {"scale": scaling * LOG2E, "length": query.shape[2], "num_keys": key.shape[2]}


@torch.library.custom_op("attnconv::block_gather", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, start: Tensor | None, scaling: float, block: int
) -> tuple[Tensor, Tensor]:
    from .kernels import gather_outputs

    query, key, value, indices = (t.contiguous() for t in (query, key, value, indices))
    out, level = _room(query, value)
    if start is not None:
        # No tile has rows of padding.
        out.zero_()
        level.fill_(-torch.inf)
    constants = _constants(query, key, value, start, block)
    tiles = _tiles(constants, query.dtype, most_rows=128)
    launch(
        gather_outputs,
        (indices.shape[2] * tiles["TILES"], key.shape[0] * key.shape[1]),
        {
            "q": query,
            "k": key,
            "v": value,
            "indices": indices,
            "counts": reach(indices),
            "start": start,
            "out": out,
            "level_out": level,
            "width": indices.shape[3],
            **_sizes(query, key, scaling),
        },
        {**constants, **tiles},
        num_warps=_warps(tiles, constants),
    )
    return out, level


@_forward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, start: Tensor | None, scaling: float, block: int
) -> tuple[Tensor, Tensor]:
    return _room(query, value)


def _room(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return value.new_empty((*query.shape[:3], value.shape[-1])), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("attnconv::block_gather_gradients", mutates_args=())
def gather_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    start: Tensor | None,
    level: Tensor,
    d_out: Tensor,
    shifts: Tensor,
    scaling: float,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    Args:
        query: as for `block_gather`, and likewise the next four and the last two.
        key: likewise.
        value: likewise.
        indices: likewise, int32.
        start: likewise.
        level: log to base 2 of the sum of each row's terms.
        d_out: gradient of the output.
        shifts: what is taken off the gradient of each row's weights, `[batch, num_heads, T]` fp32.
        scaling: likewise.
        block: likewise.
    """
    from .kernels import gather_key_gradients, gather_query_gradients

    query, key, value, indices, d_out = (t.contiguous() for t in (query, key, value, indices, d_out))
    rows = query.shape[0] * key.shape[1], -(-key.shape[2] // block)
    make = torch.empty_like if start is None else torch.zeros_like
    d_query, d_key, d_value = make(query), make(key), make(value)
    constants = _constants(query, key, value, start, block)
    arguments: dict[str, Any] = {"q": query, "k": key, "v": value, "start": start, "level": level.contiguous()}
    arguments |= {"d_out": d_out, "shifts": shifts.contiguous(), "scaling": scaling, **_sizes(query, key, scaling)}
    tiles = _tiles(constants, query.dtype)
    launch(
        gather_query_gradients,
        (indices.shape[2] * tiles["TILES"], rows[0]),
        {**arguments, "indices": indices, "counts": reach(indices), "width": indices.shape[3], "d_q": d_query},
        {**constants, **tiles},
        # With four, what a thread holds of a tile is more than its registers.
        num_warps=8,
    )
    readers, offsets = readers_of(indices, rows[1])
    launch(
        gather_key_gradients,
        (rows[1] * (block // tiles["BK"]), rows[0]),
        {**arguments, "readers": readers, "offsets": offsets, "num_blocks": rows[1], "d_k": d_key, "d_v": d_value},
        {**constants, **tiles},
        # Gradients of keys and of values are both held.
        num_warps=8,
    )
    return d_query, d_key, d_value


@gather_gradients.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    start: Tensor | None,
    level: Tensor,
    d_out: Tensor,
    shifts: Tensor,
    scaling: float,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scaling, ctx.block = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, d_out: Tensor | None, d_level: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, level = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out.to(out.dtype)
    shifts = (out.float() * d_out.float()).sum(-1)
    if d_level is not None:
        shifts = shifts - d_level * LOG2E
    gradients = gather_gradients(*tensors, level, d_out, shifts, ctx.scaling, ctx.block)
    return *gradients, None, None, None, None


_forward.register_autograd(_backward, setup_context=_remember)
