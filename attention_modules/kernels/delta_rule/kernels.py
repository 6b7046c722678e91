# mypy: ignore-errors
"""Triton kernels of the gated delta rule in chunks, and of what its gradients add to those of linear attention.

With `e_i` the value of token i less what the state before it answers to its key, the token adds `u_i = β_i e_i` under
its key; all else is linear attention with values u. Inside a chunk `e = r - N (β r)`, where r is the value less the
answer of the state before the chunk, M holds `e^{g_i - g_j} k_i·k_j` below its diagonal and `N = (1 + M β)⁻¹ M`. N is
what `corrections` holds, `[batch * HS, num_chunks, CHUNK, CHUNK]`. Heads, gates, `bounds` and `offsets` are those of
`chunk_kernels.py`; `beta` is `[batch, HS, T]`.
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
def delta_corrections(
    k,
    gates,
    beta,
    start,
    bounds,
    corrections,
    length,
    num_chunks,
    HS: tl.constexpr,
    HK: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    HAS_START: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write N of every chunk: the triangular system solved row after row, in blocks of 16 rows."""
    chunk, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, s = index // HS, index % HS
    k += (b * HK + s // (HS // HK)) * length * K
    begin, end = chunk_bounds(bounds, chunk, length, CHUNK)
    place = tl.arange(0, CHUNK)
    steps = begin + place
    exists = (steps < end) & (steps >= first_real(start, b, HAS_START))
    overlaps = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for first in range(0, K, BK):
        columns_k = first + tl.arange(0, BK)
        keys = tile(k, steps, exists, columns_k, K)
        overlaps += product(keys, tile_transposed(k, steps, exists, columns_k, K), COMPUTE, PRECISION)
    inner = tl.load(gates + index * length + steps, mask=exists, other=0.0)
    strength = tl.load(beta + index * length + steps, mask=exists, other=0.0)
    earlier = (place[:, None] > place[None, :]) & exists[:, None]
    overlaps = tl.where(earlier, overlaps, 0.0) * decay_inside(inner, inner, earlier)
    system = overlaps * strength[None, :]
    same = (place // 16)[:, None] == (place // 16)[None, :]
    BLOCKS: tl.constexpr = CHUNK // 16
    # The blocks on the diagonal, all others being zero.
    blocks = tl.sum(tl.reshape(tl.where(same, system, 0.0), [BLOCKS, 16, BLOCKS, 16]), 2)
    order = tl.arange(0, 16)
    inverse = tl.where((order[:, None] == order[None, :])[None, :, :], 1.0, 0.0) + tl.zeros_like(blocks)
    for row in range(1, 16):
        here = (order == row)[None, :, None]
        left = tl.sum(tl.where(here, blocks, 0.0), 1)
        done = inverse - tl.sum(left[:, :, None] * inverse, 1)[:, None, :]
        inverse = tl.where(here, done, inverse)
    wide = tl.broadcast_to(inverse[:, :, None, :], [BLOCKS, 16, BLOCKS, 16])
    inverses = tl.where(same, tl.reshape(wide, [CHUNK, CHUNK]), 0.0)
    system = tl.where(same, 0.0, system)
    solved = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for block in range(BLOCKS):
        right = overlaps - tl.dot(system, solved, input_precision=PRECISION)
        done = tl.dot(inverses, right, input_precision=PRECISION)
        solved = tl.where((place // 16 == block)[:, None], done, solved)
    base = corrections + (index * num_chunks + chunk) * CHUNK * CHUNK
    store_tile(base, solved, place, place >= 0, place, CHUNK)


@triton.jit
def delta_states(
    k,
    v,
    gates,
    beta,
    start,
    bounds,
    offsets,
    corrections,
    first_sums,
    sums,
    errors,
    last_sums,
    length,
    num_chunks,
    HS: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the states before every chunk and after the last, and e of every token; chunks in turn."""
    block_v, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s = index % HS
    b, low_chunk, high_chunk = sequence_chunks(offsets, index // HS, num_chunks)
    rows = (b * HS + s) * length
    k += (b * HK + s // (HS // HK)) * length * K
    v += (b * HV + s // (HS // HV)) * length * V
    columns_k, columns_v, place = tl.arange(0, BD), block_v * BV + tl.arange(0, BV), tl.arange(0, CHUNK)
    low = first_real(start, b, HAS_START)
    state = tl.zeros([BD, BV], dtype=tl.float32)
    if HAS_FIRST:
        state += tile(first_sums + index * K * V, columns_k, columns_k < K, columns_v, V)
    for chunk in range(low_chunk, high_chunk):
        here = (b * HS + s) * num_chunks + chunk
        store_tile(sums + here * K * V, state, columns_k, columns_k < K, columns_v, V)
        begin, end = chunk_bounds(bounds, chunk, length, CHUNK)
        steps = begin + place
        inside = steps < end
        exists = inside & (steps >= low)
        inner = tl.load(gates + rows + steps, mask=inside, other=0.0)
        total = tl.load(gates + rows + end - 1)
        strength = tl.load(beta + rows + steps, mask=inside, other=0.0)
        keys = tile(k, steps, exists, columns_k, K)
        answers = product(keys, state, COMPUTE, PRECISION) * tl.exp(inner)[:, None]
        wrong = tile(v, steps, exists, columns_v, V).to(tl.float32) - answers
        correction = tile(corrections + here * CHUNK * CHUNK, place, inside, place, CHUNK)
        wrong -= product(correction, wrong * strength[:, None], COMPUTE, PRECISION)
        store_tile(errors + rows * V, wrong, steps, inside, columns_v, V)
        added = wrong * (strength * tl.exp(tl.where(inside, total - inner, 0.0)))[:, None]
        state = state * tl.exp(total) + product(tl.trans(keys), added, COMPUTE, PRECISION)
    store_tile(last_sums + index * K * V, state, columns_k, columns_k < K, columns_v, V)


@triton.jit
def delta_state_gradients(
    q,
    k,
    gates,
    beta,
    start,
    bounds,
    offsets,
    corrections,
    d_out,
    d_added,
    d_last_sums,
    d_sums,
    d_errors,
    d_first_sums,
    length,
    num_chunks,
    H: tl.constexpr,
    HS: tl.constexpr,
    HK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_LAST: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of the states after every chunk and before the first, and of r; chunks from the last on.

    `d_added` is the gradient of u through the outputs of the same chunk; that of v is β times that of r.
    """
    block_v, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    s = index % HS
    b, low_chunk, high_chunk = sequence_chunks(offsets, index // HS, num_chunks)
    state_index = b * HS + s
    rows = state_index * length
    k += (b * HK + s // (HS // HK)) * length * K
    columns_k, columns_v, place = tl.arange(0, BD), block_v * BV + tl.arange(0, BV), tl.arange(0, CHUNK)
    low = first_real(start, b, HAS_START)
    state = tl.zeros([BD, BV], dtype=tl.float32)
    if HAS_LAST:
        state += tile(d_last_sums + index * K * V, columns_k, columns_k < K, columns_v, V)
    for back in range(high_chunk - low_chunk):
        chunk = high_chunk - 1 - back
        here = state_index * num_chunks + chunk
        store_tile(d_sums + here * K * V, state, columns_k, columns_k < K, columns_v, V)
        begin, end = chunk_bounds(bounds, chunk, length, CHUNK)
        steps = begin + place
        inside = steps < end
        inner = tl.load(gates + rows + steps, mask=inside, other=0.0)
        total = tl.load(gates + rows + end - 1)
        strength = tl.load(beta + rows + steps, mask=inside, other=0.0)
        keys = tile(k, steps, inside & (steps >= low), columns_k, K)
        later = product(keys, state, COMPUTE, PRECISION)
        later *= tl.exp(tl.where(inside, total - inner, 0.0))[:, None]
        later += tile(d_added + rows * V, steps, inside, columns_v, V)
        correction = tile_transposed(corrections + here * CHUNK * CHUNK, place, inside, place, CHUNK)
        later -= product(correction, later * strength[:, None], COMPUTE, PRECISION)
        store_tile(d_errors + rows * V, later, steps, inside, columns_v, V)
        state *= tl.exp(total)
        state -= product(tl.trans(keys), later * (strength * tl.exp(inner))[:, None], COMPUTE, PRECISION)
        for member in range(H // HS):
            head = state_index * (H // HS) + member
            queries = tile_transposed(q + head * length * K, steps, inside, columns_k, K)
            queries = queries.to(tl.float32) * tl.exp(inner)[None, :]
            outs = tile(d_out + head * length * V, steps, inside, columns_v, V)
            state += product(queries, outs, COMPUTE, PRECISION)
    store_tile(d_first_sums + index * K * V, state, columns_k, columns_k < K, columns_v, V)


@triton.jit
def delta_key_gradients(
    k,
    added,
    gates,
    start,
    bounds,
    sums,
    d_v,
    d_asked,
    d_k,
    length,
    num_chunks,
    HS: tl.constexpr,
    HK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_START: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of keys where they ask the state, as queries of the values' negative gradient would, and are asked.

    The first are written to `d_asked`, the second added to `d_k`, both `[batch, HS, T, K]`.
    """
    block_k, chunk, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, s = index // HS, index % HS
    here, rows = index * num_chunks + chunk, index * length
    k += (b * HK + s // (HS // HK)) * length * K
    begin, end = chunk_bounds(bounds, chunk, length, CHUNK)
    steps = begin + tl.arange(0, CHUNK)
    inside = steps < end
    exists = inside & (steps >= first_real(start, b, HAS_START))
    columns_k = block_k * BK + tl.arange(0, BK)
    weights = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    asking = tl.zeros([CHUNK, BK], dtype=tl.float32)
    for first in range(0, V, BV):
        columns_v = first + tl.arange(0, BV)
        values = tile(d_v + rows * V, steps, exists, columns_v, V)
        asking -= product(
            values, tile_transposed(sums + here * K * V, columns_k, columns_k < K, columns_v, V), COMPUTE, PRECISION
        )
        weights -= product(values, tile_transposed(added + rows * V, steps, exists, columns_v, V), COMPUTE, PRECISION)
    inner = tl.load(gates + rows + steps, mask=inside, other=0.0)
    earlier = (steps[:, None] > steps[None, :]) & exists[:, None]
    weights = tl.where(earlier, weights, 0.0) * decay_inside(inner, inner, earlier)
    keys = tile(k, steps, exists, columns_k, K)
    asking = asking * tl.exp(inner)[:, None] + product(weights, keys, COMPUTE, PRECISION)
    store_tile(d_asked + rows * K, asking, steps, inside, columns_k, K)
    asked = tile(d_k + rows * K, steps, inside, columns_k, K) + product(tl.trans(weights), keys, COMPUTE, PRECISION)
    store_tile(d_k + rows * K, asked, steps, inside, columns_k, K)
