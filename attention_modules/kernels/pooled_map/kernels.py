# mypy: ignore-errors
"""The Triton kernel of attention pooled over blocks: a tile of queries goes over its keys twice.

First for the logarithm of the sum of their terms, then for what each block of keys holds; no weight is written out.
"""

import triton
import triton.language as tl

from ..tiles import product, tile, tile_transposed


@triton.jit
def pool_attention(
    q,
    k,
    out,
    scale,
    first,
    num_queries,
    num_keys,
    width,
    H: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    LARGEST: tl.constexpr,
    EACH: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of each block of keys the log2 of the largest weight, or the sum of all: of a tile of queries, or of each."""
    part, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    places = part * BQ + tl.arange(0, BQ)
    is_query = places < num_queries
    tokens, columns = first + places, tl.arange(0, BD)
    queries = tile(q, index * num_queries + places, is_query, columns, D)
    k += (index // H * HV + index % H // (H // HV)) * num_keys * D
    last = tl.minimum(first + part * BQ + BQ, num_keys)
    peak = tl.full([BQ], -1e30, dtype=tl.float32)
    mass = tl.zeros([BQ], dtype=tl.float32)
    for step in range(0, last, BK):
        keys = step + tl.arange(0, BK)
        is_seen = (keys[None, :] <= tokens[:, None]) & (keys < last)[None, :]
        logits = product(queries, tile_transposed(k, keys, keys < last, columns, D), COMPUTE, PRECISION) * scale
        logits = tl.where(is_seen, logits, -1e30)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        mass = mass * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(logits - new_peak[:, None]), 1)
        peak = new_peak
    level = peak + tl.log2(mass)
    for number in range(tl.cdiv(last, BLOCK)):
        end = tl.minimum(number * BLOCK + BLOCK, last)
        held = tl.full([BQ], -1e30 if LARGEST else 0.0, dtype=tl.float32)
        for step in range(number * BLOCK, end, BK):
            keys = step + tl.arange(0, BK)
            is_seen = (keys[None, :] <= tokens[:, None]) & (keys < end)[None, :]
            logits = product(queries, tile_transposed(k, keys, keys < end, columns, D), COMPUTE, PRECISION) * scale
            logits = tl.where(is_seen, logits, -1e30) - level[:, None]
            if LARGEST:
                held = tl.maximum(held, tl.max(logits, 1))
            else:
                held += tl.sum(tl.exp2(logits), 1)
        held = tl.where(is_query, held, -1e30 if LARGEST else 0.0)
        if EACH:
            tl.store(out + (index * num_queries + places) * width + number, held, mask=is_query)
        else:
            whole = tl.max(held, 0) if LARGEST else tl.sum(held, 0)
            tl.store(out + (index * tl.num_programs(0) + part) * width + number, whole)
