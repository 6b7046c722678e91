# mypy: ignore-errors
"""Triton kernels of one query against chosen blocks of a cache: parts of the choice side by side, then all parts.

Tokens are taken one by one wherever their blocks lie, so that blocks of any size fill a tile.
"""

import triton
import triton.language as tl

from ..tiles import first_real, product, tile, tile_transposed


@triton.jit
def gather_part(
    q,
    k,
    v,
    indices,
    counts,
    start,
    parts,
    levels,
    scale,
    num_keys,
    width,
    row_k,
    head_k,
    row_v,
    head_v,
    H: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    HAS_START: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs of a group's query heads over SPAN of the chosen tokens, and the log of the sum of their terms."""
    part, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = index // HV, index % HV
    low = first_real(start, b, HAS_START)
    member = tl.arange(0, ROWS)
    exists = member < H // HV
    rows = index * (H // HV) + member
    columns_d, columns_v = tl.arange(0, BD), tl.arange(0, BV)
    queries = tile(q, rows, exists, columns_d, D)
    k += b * row_k + h * head_k
    v += b * row_v + h * head_v
    indices += index * width
    chosen_tokens = tl.load(counts + index) * BLOCK
    peak = tl.full([ROWS], -1e30, dtype=tl.float32)
    mass = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, BV], dtype=tl.float32)
    for step in range(part * SPAN, tl.minimum(chosen_tokens, part * SPAN + SPAN), BK):
        token = step + tl.arange(0, BK)
        chosen = tl.load(indices + token // BLOCK, mask=token < chosen_tokens, other=-1)
        # No choice is one behind all keys.
        keys = tl.where(chosen >= 0, low + chosen * BLOCK + token % BLOCK, num_keys)
        is_key = keys < num_keys
        logits = product(queries, tile_transposed(k, keys, is_key, columns_d, D), COMPUTE, PRECISION) * scale
        logits = tl.where(is_key[None, :], logits, -1e30)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.where(is_key[None, :], tl.exp2(logits - new_peak[:, None]), 0.0)
        shrink = tl.exp2(peak - new_peak)
        mass = mass * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + product(weights, tile(v, keys, is_key, columns_v, V), COMPUTE, PRECISION)
        peak = new_peak
    is_empty = mass == 0.0
    mass = tl.where(is_empty, 1.0, mass)
    here = rows * tl.num_programs(0) + part
    tl.store(levels + here, tl.where(is_empty, float("-inf"), peak + tl.log2(mass)), mask=exists)
    inside = exists[:, None] & (columns_v < V)[None, :]
    tl.store(parts + here[:, None] * V + columns_v[None, :], acc / mass[:, None], mask=inside)


@triton.jit
def gather_all_parts(parts, levels, out, number, V: tl.constexpr, STEP: tl.constexpr, BV: tl.constexpr):
    """One program for each query head; heads that saw nothing give zero."""
    index = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BV)
    levels += index * number
    parts += index * number * V
    peak = -1e30
    mass = 0.0
    acc = tl.zeros([BV], dtype=tl.float32)
    for first in range(0, number, STEP):
        part = first + tl.arange(0, STEP)
        level = tl.load(levels + part, mask=part < number, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(level, 0))
        weights = tl.exp2(level - new_peak)
        shrink = tl.exp2(peak - new_peak)
        mass = mass * shrink + tl.sum(weights, 0)
        # What holds nothing is not read.
        acc = acc * shrink + tl.sum(weights[:, None] * tile(parts, part, weights > 0.0, columns, V), 0)
        peak = new_peak
    acc = acc / tl.where(mass == 0.0, 1.0, mass)
    tl.store(out + index * V + columns, acc.to(out.dtype.element_ty), mask=columns < V)
