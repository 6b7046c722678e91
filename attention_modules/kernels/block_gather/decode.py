"""One query of every row against chosen blocks of a cache, which is read where it lies."""

import torch
from torch import Tensor

from ...window import LOG2E
from ..launching import launch, power_of_two, precision
from ..selection import in_one_dtype, problem_with
from .index import reach

# Chosen tokens that one program takes, so that a few rows and heads fill a GPU too.
SPAN = 256


def decode_problem(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why the kernels cannot take a call, or None; arguments as for `decode_blocks`, or new tokens alone."""
    return problem_with(query, key, value, dims=(query.shape[-1], value.shape[-1]))


def decode_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    *,
    scaling: float,
    block: int,
    start: Tensor | None = None,
) -> Tensor:
    """Exact softmax of the newest token over chosen blocks; without gradients.

    Args:
        query: `[batch, num_heads, 1, head_dim]`.
        key: `[batch, num_kv_heads, S, head_dim]`, the query's own the last; may be a part of a larger tensor.
        value: `[batch, num_kv_heads, S, value_dim]`; likewise.
        indices: `[batch, num_kv_heads, 1, K]`, chosen blocks in any order, counted from each row's first real token; -1
            for none. What is chosen twice counts twice.
        scaling: factor on query-key products.
        block: tokens of a block, any number.
        start: `[batch]` int32, tokens of padding that the keys of every row begin with; None when there is none.

    Returns:
        `[batch, num_heads, 1, value_dim]` in the dtype of `value`; zero where nothing was chosen.

    Raises:
        ValueError: the kernels do not take such tensors.
    """
    query, key, value = in_one_dtype(query, key, value)
    problem = decode_problem(query, key, value)
    if problem is not None:
        raise ValueError(f"the kernels cannot gather blocks: {problem}")
    out: Tensor = _decode(query, key, value, indices.to(torch.int32), start, scaling, block)
    return out


@torch.library.custom_op("attnconv::decode_blocks", mutates_args=())
def _decode(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, start: Tensor | None, scaling: float, block: int
) -> Tensor:
    from .decode_kernels import gather_all_parts, gather_part

    batch, heads, _, head_dim = query.shape
    kv_heads, width = key.shape[1], value.shape[-1]
    query, indices = query.contiguous(), indices.contiguous()
    # Tokens of a head one behind the other, wherever rows and heads begin.
    key, value = (t if t.stride()[2:] == (t.shape[3], 1) else t.contiguous() for t in (key, value))
    number = max(1, -(-indices.shape[-1] * block // SPAN))
    parts = query.new_empty((batch, heads, number, width), dtype=torch.float32)
    levels = query.new_empty((batch, heads, number), dtype=torch.float32)
    out = value.new_empty((batch, heads, 1, width))
    widths = {"V": width, "BV": power_of_two(width)}
    wide = max(power_of_two(head_dim), widths["BV"]) > (128 if query.dtype == torch.bfloat16 else 64)
    sizes = {"H": heads, "HV": kv_heads, "D": head_dim, "BD": power_of_two(head_dim), "BLOCK": block, "SPAN": SPAN}
    tiles = {"ROWS": power_of_two(heads // kv_heads), "BK": (64 if query.dtype == torch.bfloat16 else 32) // (1 + wide)}
    launch(
        gather_part,
        (number, batch * kv_heads),
        {
            "q": query,
            "k": key,
            "v": value,
            "indices": indices,
            "counts": reach(indices),
            "start": start,
            "parts": parts,
            "levels": levels,
            "scale": scaling * LOG2E,
            "num_keys": key.shape[2],
            "width": indices.shape[-1],
            "row_k": key.stride(0),
            "head_k": key.stride(1),
            "row_v": value.stride(0),
            "head_v": value.stride(1),
        },
        {**sizes, **widths, **tiles, "HAS_START": start is not None, **precision(query.dtype)},
    )
    launch(
        gather_all_parts,
        (batch * heads,),
        {"parts": parts, "levels": levels, "out": out, "number": number},
        {**widths, "STEP": 16},
    )
    return out


@_decode.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, start: Tensor | None, scaling: float, block: int
) -> Tensor:
    return value.new_empty((*query.shape[:3], value.shape[-1]))
