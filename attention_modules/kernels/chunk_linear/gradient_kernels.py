# mypy: ignore-errors
"""Triton kernels of the gradients of `chunk_kernels`; heads, shift and gates as there.

`d_out` is the gradient of the numerator, `d_mass` that of the denominator. Without `norms` there are no denominators,
and without `d_sums` values are asked about their own chunk alone.
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
def chunk_state_gradients(
    q,
    gates,
    bounds,
    offsets,
    d_out,
    d_mass,
    d_last_sums,
    d_last_norm,
    d_sums,
    d_norms,
    d_first_sums,
    d_first_norm,
    length,
    num_chunks,
    H: tl.constexpr,
    HS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_GATES: tl.constexpr,
    HAS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write the gradients of the sums after every chunk, and of those before the first; chunks from the last on."""
    block_k, block_v, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, low_chunk, high_chunk = sequence_chunks(offsets, index // HS, num_chunks)
    state_index = b * HS + index % HS
    columns_k = block_k * BK + tl.arange(0, BK)
    columns_v = block_v * BV + tl.arange(0, BV)
    inside_k = columns_k < K
    state = tl.zeros([BK, BV], dtype=tl.float32)
    norm = tl.zeros([BK], dtype=tl.float32)
    if HAS_LAST:
        state += tile(d_last_sums + index * K * V, columns_k, inside_k, columns_v, V)
        norm += tl.load(d_last_norm + index * K + columns_k, mask=inside_k, other=0.0)
    if HAS_GATES:
        gates += state_index * length * (K if VECTOR else 1)
    for back in range(high_chunk - low_chunk):
        chunk = high_chunk - 1 - back
        here = state_index * num_chunks + chunk
        store_tile(d_sums + here * K * V, state, columns_k, inside_k, columns_v, V)
        if block_v == 0:
            tl.store(d_norms + here * K + columns_k, norm, mask=inside_k)
        begin, end = chunk_bounds(bounds, chunk, length, CHUNK)
        steps = begin + tl.arange(0, CHUNK)
        is_query = steps < end
        inner = tl.zeros([1, CHUNK], dtype=tl.float32)
        if VECTOR:
            total = tl.load(gates + (end - 1) * K + columns_k, mask=inside_k, other=0.0)
            inner = tile_transposed(gates, steps, is_query, columns_k, K)
            state *= tl.exp(total)[:, None]
            norm *= tl.exp(total)
        elif HAS_GATES:
            total = tl.load(gates + end - 1)
            inner += tl.load(gates + steps, mask=is_query, other=0.0)[None, :]
            state *= tl.exp(total)
            norm *= tl.exp(total)
        for member in range(H // HS):
            head = state_index * (H // HS) + member
            queries = tile_transposed(q + head * length * K, steps, is_query, columns_k, K).to(tl.float32)
            if HAS_GATES:
                queries *= tl.exp(inner)
            mass = tl.load(d_mass + head * length + steps, mask=is_query, other=0.0)
            state += product(
                queries, tile(d_out + head * length * V, steps, is_query, columns_v, V), COMPUTE, PRECISION
            )
            norm += tl.sum(queries * mass[None, :], 1)
    store_tile(d_first_sums + index * K * V, state, columns_k, inside_k, columns_v, V)
    if block_v == 0:
        tl.store(d_first_norm + index * K + columns_k, norm, mask=inside_k)


@triton.jit
def chunk_feature_gradients(
    q,
    k,
    v,
    gates,
    start,
    bounds,
    sums,
    norms,
    d_out,
    d_mass,
    d_sums,
    d_norms,
    d_q,
    d_k,
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
):
    """Gradients of queries `[batch, H, length, K]` and of keys, per state head `[batch, HS, num_keys, K]`."""
    block_k, chunk, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, s = index // HS, index % HS
    here = index * num_chunks + chunk
    k += (b * HK + s // (HS // HK)) * num_keys * K
    v += (b * HV + s // (HS // HV)) * num_keys * V
    begin, end = chunk_bounds(bounds, chunk, length, CHUNK)
    steps = begin + tl.arange(0, CHUNK)
    rows = steps + shift
    is_query = steps < end
    is_key = is_query & (rows >= first_real(start, b, HAS_START)) & (rows < num_keys)
    visible = (steps[:, None] >= steps[None, :]) & is_key[None, :] & is_query[:, None]
    columns_k = block_k * BK + tl.arange(0, BK)
    inside_k = columns_k < K
    inner = tl.zeros([CHUNK], dtype=tl.float32)
    total = 0.0
    if HAS_GATES:
        inner += tl.load(gates + index * length + steps, mask=is_query, other=0.0)
        total = tl.load(gates + index * length + end - 1)
    keys = tile(k, rows, is_key, columns_k, K)
    d_keys = tl.zeros([CHUNK, BK], dtype=tl.float32)
    if norms is not None:
        norm = tl.load(norms + here * K + columns_k, mask=inside_k, other=0.0)
        d_keys += tl.load(d_norms + here * K + columns_k, mask=inside_k, other=0.0)[None, :]
    for first in range(0, V, BV):
        columns_v = first + tl.arange(0, BV)
        later = tile_transposed(d_sums + here * K * V, columns_k, inside_k, columns_v, V)
        d_keys += product(tile(v, rows, is_key, columns_v, V), later, COMPUTE, PRECISION)
    if HAS_GATES:
        d_keys *= tl.exp(tl.where(is_query, total - inner, 0.0))[:, None]
    for member in range(H // HS):
        head = index * (H // HS) + member
        d_weights = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
        d_queries = tl.zeros([CHUNK, BK], dtype=tl.float32)
        if norms is not None:
            mass = tl.load(d_mass + head * length + steps, mask=is_query, other=0.0)
            d_weights += mass[:, None]
            d_queries += mass[:, None] * norm[None, :]
        for first in range(0, V, BV):
            columns_v = first + tl.arange(0, BV)
            outs = tile(d_out + head * length * V, steps, is_query, columns_v, V)
            before = tile_transposed(sums + here * K * V, columns_k, inside_k, columns_v, V)
            d_queries += product(outs, before, COMPUTE, PRECISION)
            d_weights += product(outs, tile_transposed(v, rows, is_key, columns_v, V), COMPUTE, PRECISION)
        d_weights = tl.where(visible, d_weights, 0.0)
        if HAS_GATES:
            d_weights *= decay_inside(inner, inner, visible)
            d_queries *= tl.exp(inner)[:, None]
        d_queries += product(d_weights, keys, COMPUTE, PRECISION)
        store_tile(d_q + head * length * K, d_queries, steps, is_query, columns_k, K)
        queries = tile(q + head * length * K, steps, is_query, columns_k, K)
        d_keys += product(tl.trans(d_weights), queries, COMPUTE, PRECISION)
    store_tile(d_k + index * num_keys * K, d_keys, rows, is_key, columns_k, K)


@triton.jit
def chunk_value_gradients(
    q,
    k,
    gates,
    start,
    bounds,
    weights,
    d_out,
    d_sums,
    d_v,
    length,
    num_keys,
    shift,
    num_chunks,
    H: tl.constexpr,
    HS: tl.constexpr,
    HK: tl.constexpr,
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
    """Gradient of the values, per state head `[batch, HS, num_keys, V]`."""
    block_v, chunk, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, s = index // HS, index % HS
    here = index * num_chunks + chunk
    k += (b * HK + s // (HS // HK)) * num_keys * K
    begin, end = chunk_bounds(bounds, chunk, length, CHUNK)
    steps = begin + tl.arange(0, CHUNK)
    rows = steps + shift
    is_query = steps < end
    is_key = is_query & (rows >= first_real(start, b, HAS_START)) & (rows < num_keys)
    # Keys stand in rows here and queries in columns.
    visible = (steps[:, None] <= steps[None, :]) & is_key[:, None] & is_query[None, :]
    columns_v = block_v * BV + tl.arange(0, BV)
    d_values = tl.zeros([CHUNK, BV], dtype=tl.float32)
    if d_sums is not None:
        for first in range(0, K, BK):
            columns_k = first + tl.arange(0, BK)
            later = tile(d_sums + here * K * V, columns_k, columns_k < K, columns_v, V)
            keys = tile(k, rows, is_key, columns_k, K)
            if VECTOR:
                base = gates + index * length * K
                total = tl.load(base + (end - 1) * K + columns_k, mask=columns_k < K, other=0.0)
                keys *= tl.exp(tl.minimum(total[None, :] - tile(base, steps, is_query, columns_k, K), 0.0))
            d_values += product(keys, later, COMPUTE, PRECISION)
    decay = tl.full([CHUNK, CHUNK], 1.0, dtype=tl.float32)
    if HAS_GATES and not VECTOR:
        inner = tl.load(gates + index * length + steps, mask=is_query, other=0.0)
        total = tl.load(gates + index * length + end - 1)
        d_values *= tl.exp(tl.where(is_query, total - inner, 0.0))[:, None]
        decay = tl.exp(tl.where(visible, inner[None, :] - inner[:, None], 0.0))
    for member in range(H // HS):
        head = index * (H // HS) + member
        between = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
        if VECTOR:
            place = tl.arange(0, CHUNK)
            base = weights + (head * num_chunks + chunk) * CHUNK * CHUNK
            between += tile_transposed(base, place, place >= 0, place, CHUNK)
        else:
            for first in range(0, K, BK):
                columns_k = first + tl.arange(0, BK)
                queries = tile_transposed(q + head * length * K, steps, is_query, columns_k, K)
                between += product(tile(k, rows, is_key, columns_k, K), queries, COMPUTE, PRECISION)
        between = tl.where(visible, between, 0.0) * decay
        outs = tile(d_out + head * length * V, steps, is_query, columns_v, V)
        d_values += product(between, outs, COMPUTE, PRECISION)
    store_tile(d_v + index * num_keys * V, d_values, rows, is_key, columns_v, V)
