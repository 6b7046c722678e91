# mypy: ignore-errors
"""Triton kernels of causal linear attention in chunks: sums before each chunk, outputs, and the gradients of both.

Query `t` reads key rows up to `t + shift`; a row of keys outside `[start, num_keys)` counts as zero. Query head `h`
reads state head `h // (H / HS)`; state head `s` reads key head `s // (HS / HK)` and value head `s // (HS / HV)`.
`gates` holds log decays summed up inside each chunk, `[batch, HS, T]`, or with VECTOR those of each channel,
`[batch, HS, T, K]`; the weights inside chunks come from `vector_kernels.py` then. Of sequences packed in one row,
`bounds` holds where every chunk starts and ends and `offsets` every sequence's first chunk. Without `norms` there are
no denominators.
"""

import triton
import triton.language as tl

from ..tiles import (
    chunk_bounds,
    decay_inside,
    first_real,
    product,
    sequence_chunks,
    store_tile,
    tile,
    tile_transposed,
)


@triton.jit
def chunk_states(
    k,
    v,
    gates,
    start,
    bounds,
    offsets,
    first_sums,
    first_norm,
    sums,
    norms,
    last_sums,
    last_norm,
    length,
    num_keys,
    shift,
    num_chunks,
    HS: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_GATES: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write the sums before every chunk and after the last; one program per block of a state, chunks in turn."""
    block_k, block_v, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    s = index % HS
    b, low_chunk, high_chunk = sequence_chunks(offsets, index // HS, num_chunks)
    columns_k = block_k * BK + tl.arange(0, BK)
    columns_v = block_v * BV + tl.arange(0, BV)
    k += (b * HK + s // (HS // HK)) * num_keys * K
    v += (b * HV + s // (HS // HV)) * num_keys * V
    low = first_real(start, b, HAS_START)
    inside_k = columns_k < K
    state = tl.zeros([BK, BV], dtype=tl.float32)
    norm = tl.zeros([BK], dtype=tl.float32)
    if HAS_FIRST:
        state += tile(first_sums + index * K * V, columns_k, inside_k, columns_v, V)
        norm += tl.load(first_norm + index * K + columns_k, mask=inside_k, other=0.0)
    if HAS_GATES:
        gates += (b * HS + s) * length * (K if VECTOR else 1)
    for chunk in range(low_chunk, high_chunk):
        here = (b * HS + s) * num_chunks + chunk
        store_tile(sums + here * K * V, state, columns_k, inside_k, columns_v, V)
        if block_v == 0:
            tl.store(norms + here * K + columns_k, norm, mask=inside_k)
        begin, end = chunk_bounds(bounds, chunk, length, CHUNK)
        steps = begin + tl.arange(0, CHUNK)
        rows = steps + shift
        exists = (steps < end) & (rows >= low) & (rows < num_keys)
        keys = tile_transposed(k, rows, exists, columns_k, K).to(tl.float32)
        values = tile(v, rows, exists, columns_v, V)
        if VECTOR:
            total = tl.load(gates + (end - 1) * K + columns_k, mask=inside_k, other=0.0)
            inner = tile_transposed(gates, steps, steps < end, columns_k, K)
            keys *= tl.exp(tl.minimum(total[:, None] - inner, 0.0))
            state *= tl.exp(total)[:, None]
            norm *= tl.exp(total)
        elif HAS_GATES:
            total = tl.load(gates + end - 1)
            inner = tl.load(gates + steps, mask=steps < end, other=0.0)
            keys *= tl.exp(tl.where(steps < end, total - inner, 0.0))[None, :]
            state *= tl.exp(total)
            norm *= tl.exp(total)
        state += product(keys, values, COMPUTE, PRECISION)
        norm += tl.sum(keys, 1)
    store_tile(last_sums + index * K * V, state, columns_k, inside_k, columns_v, V)
    if block_v == 0:
        tl.store(last_norm + index * K + columns_k, norm, mask=inside_k)


@triton.jit
def linear_terms(
    q,
    k,
    v,
    gates,
    sums,
    norms,
    steps,
    rows,
    is_query,
    is_key,
    columns_v,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_GATES: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR: tl.constexpr = False,
    faded=None,
):
    """Numerator `[CHUNK, BV]` and denominator `[CHUNK]` of a chunk of queries; all pointers stand at its head."""
    weights = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    out = tl.zeros([CHUNK, BV], dtype=tl.float32)
    mass = tl.zeros([CHUNK], dtype=tl.float32)
    for first in range(0, K, BK):
        columns_k = first + tl.arange(0, BK)
        inside_k = columns_k < K
        queries = tile(q, steps, is_query, columns_k, K)
        if VECTOR:
            queries = queries.to(tl.float32) * tl.exp(tile(gates, steps, is_query, columns_k, K))
        else:
            weights += product(queries, tile_transposed(k, rows, is_key, columns_k, K), COMPUTE, PRECISION)
        out += product(queries, tile(sums, columns_k, inside_k, columns_v, V), COMPUTE, PRECISION)
        if norms is not None:
            norm = tl.load(norms + columns_k, mask=inside_k, other=0.0)
            mass += tl.sum(queries.to(tl.float32) * norm[None, :], 1)
    visible = (steps[:, None] >= steps[None, :]) & is_key[None, :] & is_query[:, None]
    if VECTOR:
        place = tl.arange(0, CHUNK)
        weights += tile(faded, place, place >= 0, place, CHUNK)
    weights = tl.where(visible, weights, 0.0)
    if HAS_GATES and not VECTOR:
        inner = tl.load(gates + steps, mask=is_query, other=0.0)
        weights *= decay_inside(inner, inner, visible)
        out *= tl.exp(inner)[:, None]
        mass *= tl.exp(inner)
    out += product(weights, tile(v, rows, is_key, columns_v, V), COMPUTE, PRECISION)
    return out, mass + tl.sum(weights, 1)


@triton.jit
def chunk_outputs(
    q,
    k,
    v,
    gates,
    start,
    bounds,
    weights,
    sums,
    norms,
    numerator,
    denominator,
    length,
    num_keys,
    shift,
    num_chunks,
    H: tl.constexpr,
    HS: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_GATES: tl.constexpr,
    HAS_START: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Numerator and denominator of one chunk of queries of one head, one block of values."""
    block_v, chunk, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = index // H, index % H
    state_index = b * HS + h // (H // HS)
    here = state_index * num_chunks + chunk
    k += (b * HK + h // (H // HK)) * num_keys * K
    v += (b * HV + h // (H // HV)) * num_keys * V
    q += index * length * K
    begin, end = chunk_bounds(bounds, chunk, length, CHUNK)
    steps = begin + tl.arange(0, CHUNK)
    rows = steps + shift
    is_query = steps < end
    is_key = is_query & (rows >= first_real(start, b, HAS_START)) & (rows < num_keys)
    columns_v = block_v * BV + tl.arange(0, BV)
    out, mass = linear_terms(
        q,
        k,
        v,
        gates + state_index * length * (K if VECTOR else 1) if HAS_GATES else gates,
        sums + here * K * V,
        norms + here * K if norms is not None else norms,
        steps,
        rows,
        is_query,
        is_key,
        columns_v,
        K,
        V,
        CHUNK,
        BK,
        BV,
        HAS_GATES,
        COMPUTE,
        PRECISION,
        VECTOR,
        weights + (index * num_chunks + chunk) * CHUNK * CHUNK if VECTOR else weights,
    )
    store_tile(numerator + index * length * V, out, steps, is_query, columns_v, V)
    if block_v == 0 and norms is not None:
        tl.store(denominator + index * length + steps, mass, mask=is_query)
