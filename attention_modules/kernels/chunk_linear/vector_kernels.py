# mypy: ignore-errors
"""Triton kernels for gates of each channel: the weights inside a chunk, and the gradients that pass through them.

What is left of a key's channel at a query is `e^{g_query - g_key}`, which no product of one factor for each can give
without overflow. So a chunk falls into blocks of 16 tokens: between blocks the factors are `e^{g_query - g}` and
`e^{g - g_key}` with g that of the last token before the query's block, and inside a block channels are written out.
No exponent is above 0. Heads and `bounds` are those of `chunk_kernels.py`, gates are `[batch, HS, T, K]`.
"""

import triton
import triton.language as tl

from ..tiles import chunk_bounds, first_real, product, store_tile, tile, tile_transposed


@triton.jit
def fading(later, earlier):
    """`exp(g_later - g_earlier)`, and 1 where the order is the other way round and the result is not used."""
    return tl.exp(tl.minimum(later - earlier, 0.0))


@triton.jit
def gates_before(gates, row, end, columns, K: tl.constexpr):
    """`[1, columns]` gates of the token before `row`."""
    # Triton 3.9 interprets no mask that is a vector and a number.
    limit = tl.where(row <= end, K, 0)
    return tl.load(gates + (row - 1) * K + columns, mask=columns < limit, other=0.0)[None, :]


@triton.jit
def vector_weights(
    q,
    k,
    gates,
    start,
    bounds,
    weights,
    length,
    num_chunks,
    H: tl.constexpr,
    HS: tl.constexpr,
    HK: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    HAS_START: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the weights of each chunk's keys for its queries, `[batch * H, num_chunks, CHUNK, CHUNK]`."""
    chunk, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = index // H, index % H
    q += index * length * K
    k += (b * HK + h // (H // HK)) * length * K
    gates += (b * HS + h // (H // HS)) * length * K
    begin, end = chunk_bounds(bounds, chunk, length, CHUNK)
    place = tl.arange(0, CHUNK)
    steps, block = begin + place, place // 16
    inside = steps < end
    low = first_real(start, b, HAS_START)
    total = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for first in range(0, K, BK):
        columns = first + tl.arange(0, BK)
        queries = tile(q, steps, inside, columns, K).to(tl.float32)
        keys = tile(k, steps, inside & (steps >= low), columns, K).to(tl.float32)
        inner = tile(gates, steps, inside, columns, K)
        for now in range(1, CHUNK // 16):
            middle = gates_before(gates, begin + 16 * now, end, columns, K)
            left, right = queries * fading(inner, middle), keys * fading(middle, inner)
            between = product(left, tl.trans(right), COMPUTE, PRECISION)
            total += tl.where((block == now)[:, None] & (block < now)[None, :], between, 0.0)
        for member in range(tl.minimum(end - begin, 16)):
            other = begin + block * 16 + member
            exists = (other < end) & (other >= low)
            faded = tile(k, other, exists, columns, K) * fading(inner, tile(gates, other, exists, columns, K))
            here = (steps[None, :] == other[:, None]) & (other <= steps)[:, None]
            total += tl.where(here, tl.sum(queries * faded, 1)[:, None], 0.0)
    store_tile(weights + (index * num_chunks + chunk) * CHUNK * CHUNK, total, place, place >= 0, place, CHUNK)


@triton.jit
def vector_feature_gradients(
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
    HAS_START: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of queries `[batch, H, T, K]` and of keys, per state head `[batch, HS, T, K]`."""
    block_k, chunk, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, s = index // HS, index % HS
    here = index * num_chunks + chunk
    k += (b * HK + s // (HS // HK)) * length * K
    v += (b * HV + s // (HS // HV)) * length * V
    gates += index * length * K
    begin, end = chunk_bounds(bounds, chunk, length, CHUNK)
    place = tl.arange(0, CHUNK)
    steps, block = begin + place, place // 16
    inside = steps < end
    low = first_real(start, b, HAS_START)
    is_key = inside & (steps >= low)
    visible = (place[:, None] >= place[None, :]) & is_key[None, :] & inside[:, None]
    columns = block_k * BK + tl.arange(0, BK)
    inside_k = columns < K
    keys = tile(k, steps, is_key, columns, K).to(tl.float32)
    inner = tile(gates, steps, inside, columns, K)
    norm = tl.load(norms + here * K + columns, mask=inside_k, other=0.0)
    d_norm = tl.load(d_norms + here * K + columns, mask=inside_k, other=0.0)
    d_keys = tl.zeros([CHUNK, BK], dtype=tl.float32) + d_norm[None, :]
    for first in range(0, V, BV):
        columns_v = first + tl.arange(0, BV)
        later = tile_transposed(d_sums + here * K * V, columns, inside_k, columns_v, V)
        d_keys += product(tile(v, steps, is_key, columns_v, V), later, COMPUTE, PRECISION)
    d_keys *= fading(gates_before(gates, end, end, columns, K), inner)
    for member in range(H // HS):
        head = index * (H // HS) + member
        queries = tile(q + head * length * K, steps, inside, columns, K).to(tl.float32)
        mass = tl.load(d_mass + head * length + steps, mask=inside, other=0.0)
        d_weights = tl.zeros([CHUNK, CHUNK], dtype=tl.float32) + mass[:, None]
        d_queries = mass[:, None] * norm[None, :]
        for first in range(0, V, BV):
            columns_v = first + tl.arange(0, BV)
            outs = tile(d_out + head * length * V, steps, inside, columns_v, V)
            before = tile_transposed(sums + here * K * V, columns, inside_k, columns_v, V)
            d_queries += product(outs, before, COMPUTE, PRECISION)
            d_weights += product(outs, tile_transposed(v, steps, is_key, columns_v, V), COMPUTE, PRECISION)
        d_weights = tl.where(visible, d_weights, 0.0)
        d_queries *= tl.exp(inner)
        for now in range(1, CHUNK // 16):
            middle = gates_before(gates, begin + 16 * now, end, columns, K)
            grown, faded = fading(inner, middle), fading(middle, inner)
            between = tl.where((block == now)[:, None] & (block < now)[None, :], d_weights, 0.0)
            d_queries += product(between, keys * faded, COMPUTE, PRECISION) * grown
            d_keys += product(tl.trans(between), queries * grown, COMPUTE, PRECISION) * faded
        for other_place in range(tl.minimum(end - begin, 16)):
            other = begin + block * 16 + other_place
            exists = other < end
            gate = tile(gates, other, exists, columns, K)
            # The other token as a key of each query, and as a query of each key.
            weight = tl.sum(tl.where(steps[None, :] == other[:, None], d_weights, 0.0), 1)
            other_keys = tile(k, other, exists & (other >= low), columns, K)
            d_queries += weight[:, None] * other_keys * fading(inner, gate)
            weight = tl.sum(tl.where(steps[:, None] == other[None, :], d_weights, 0.0), 0)
            other_queries = tile(q + head * length * K, other, exists, columns, K)
            d_keys += weight[:, None] * other_queries * fading(gate, inner)
        store_tile(d_q + head * length * K, d_queries, steps, inside, columns, K)
    store_tile(d_k + index * length * K, d_keys, steps, is_key, columns, K)
