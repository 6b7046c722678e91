# mypy: ignore-errors
"""Triton kernels of softmax over gathered blocks of keys, and of its gradients.

A tile has ROWS of the BLOCK * G rows that a block of queries makes with the G query heads of a key/value head, so that
any G fills it. Blocks are counted from each row's first real token, `low`; causality is looked at in every block.
Logits are in units of log 2.
"""

import triton
import triton.language as tl

from ..tiles import first_real, product, store_tile, tile, tile_transposed


@triton.jit
def tile_rows(
    number,
    index,
    low,
    length,
    num_keys,
    H: tl.constexpr,
    HV: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Of a tile's rows: which of the queries each one is, its position in the row, and whether it exists."""
    # Where the first query stands; below zero where that is padding.
    shift = num_keys - low - length
    inside = number % TILES * ROWS + tl.arange(0, ROWS)
    position = (tl.maximum(shift, 0) // BLOCK + number // TILES) * BLOCK + inside // (H // HV)
    token = position - shift
    exists = (inside < BLOCK * (H // HV)) & (token >= 0) & (token < length)
    # Heads of a group stand side by side, and so do groups: index * G = b * H + h * G.
    return (index * (H // HV) + inside % (H // HV)) * length + token, position, exists


@triton.jit
def gather_outputs(
    q,
    k,
    v,
    indices,
    counts,
    start,
    out,
    level_out,
    scale,
    length,
    num_keys,
    width,
    H: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    HAS_START: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write outputs and the log of the sum of all terms; a row that sees nothing gives zero and minus infinity."""
    number, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    low = first_real(start, index // HV, HAS_START)
    rows, position, exists = tile_rows(number, index, low, length, num_keys, H, HV, BLOCK, TILES, ROWS)
    columns_d, columns_v = tl.arange(0, BD), tl.arange(0, BV)
    queries = tile(q, rows, exists, columns_d, D)
    k += index * num_keys * D
    v += index * num_keys * V
    here = index * (tl.num_programs(0) // TILES) + number // TILES
    indices += here * width
    peak = tl.full([ROWS], -1e30, dtype=tl.float32)
    mass = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, BV], dtype=tl.float32)
    for step in range(tl.load(counts + here) * (BLOCK // BK)):
        chosen = tl.load(indices + step // (BLOCK // BK))
        # No choice is one behind all keys.
        first = tl.where(chosen >= 0, low + chosen * BLOCK + step % (BLOCK // BK) * BK, num_keys)
        keys = first + tl.arange(0, BK)
        is_key = keys < num_keys
        visible = (keys[None, :] - low <= position[:, None]) & is_key[None, :]
        logits = product(queries, tile_transposed(k, keys, is_key, columns_d, D), COMPUTE, PRECISION) * scale
        logits = tl.where(visible, logits, -1e30)
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        weights = tl.where(visible, tl.exp2(logits - new_peak[:, None]), 0.0)
        shrink = tl.exp2(peak - new_peak)
        mass = mass * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + product(weights, tile(v, keys, is_key, columns_v, V), COMPUTE, PRECISION)
        peak = new_peak
    is_empty = mass == 0.0
    mass = tl.where(is_empty, 1.0, mass)
    store_tile(out, acc / mass[:, None], rows, exists, columns_v, V)
    tl.store(level_out + rows, tl.where(is_empty, float("-inf"), peak + tl.log2(mass)), mask=exists)


@triton.jit
def gather_query_gradients(
    q,
    k,
    v,
    indices,
    counts,
    start,
    level,
    d_out,
    shifts,
    d_q,
    scale,
    scaling,
    length,
    num_keys,
    width,
    H: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    HAS_START: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """By the same tiles as the outputs; `shifts` is what is taken off the gradient of every weight of a row."""
    number, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    low = first_real(start, index // HV, HAS_START)
    rows, position, exists = tile_rows(number, index, low, length, num_keys, H, HV, BLOCK, TILES, ROWS)
    columns_d, columns_v = tl.arange(0, BD), tl.arange(0, BV)
    queries = tile(q, rows, exists, columns_d, D)
    upstream = tile(d_out, rows, exists, columns_v, V)
    levels = tl.load(level + rows, mask=exists, other=0.0)
    shift = tl.load(shifts + rows, mask=exists, other=0.0)
    k += index * num_keys * D
    v += index * num_keys * V
    here = index * (tl.num_programs(0) // TILES) + number // TILES
    indices += here * width
    acc = tl.zeros([ROWS, BD], dtype=tl.float32)
    for step in range(tl.load(counts + here) * (BLOCK // BK)):
        chosen = tl.load(indices + step // (BLOCK // BK))
        # No choice is one behind all keys.
        first = tl.where(chosen >= 0, low + chosen * BLOCK + step % (BLOCK // BK) * BK, num_keys)
        keys = first + tl.arange(0, BK)
        is_key = keys < num_keys
        visible = (keys[None, :] - low <= position[:, None]) & is_key[None, :]
        near = tile(k, keys, is_key, columns_d, D)
        logits = product(queries, tl.trans(near), COMPUTE, PRECISION) * scale
        weights = tl.exp2(tl.where(visible, logits - levels[:, None], -1e30))
        d_weights = product(upstream, tile_transposed(v, keys, is_key, columns_v, V), COMPUTE, PRECISION)
        acc += product(weights * (d_weights - shift[:, None]), near, COMPUTE, PRECISION)
    store_tile(d_q, acc * scaling, rows, exists, columns_d, D)


@triton.jit
def gather_key_gradients(
    q,
    k,
    v,
    readers,
    offsets,
    start,
    level,
    d_out,
    shifts,
    d_k,
    d_v,
    scale,
    scaling,
    length,
    num_keys,
    num_blocks,
    H: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    HAS_START: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for each BK keys, over all blocks of queries that chose them, so that nothing is added in a race."""
    piece, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    low = first_real(start, index // HV, HAS_START)
    keys = low + piece * BK + tl.arange(0, BK)
    is_key = keys < num_keys
    columns_d, columns_v = tl.arange(0, BD), tl.arange(0, BV)
    k += index * num_keys * D
    v += index * num_keys * V
    near, mixed = tile(k, keys, is_key, columns_d, D), tile(v, keys, is_key, columns_v, V)
    here = index * num_blocks + piece * BK // BLOCK
    acc_k = tl.zeros([BK, BD], dtype=tl.float32)
    acc_v = tl.zeros([BK, BV], dtype=tl.float32)
    for step in range(tl.load(offsets + here) * TILES, tl.load(offsets + here + 1) * TILES):
        number = tl.load(readers + step // TILES) * TILES + step % TILES
        rows, position, exists = tile_rows(number, index, low, length, num_keys, H, HV, BLOCK, TILES, ROWS)
        queries = tile(q, rows, exists, columns_d, D)
        upstream = tile(d_out, rows, exists, columns_v, V)
        levels = tl.load(level + rows, mask=exists, other=0.0)
        shift = tl.load(shifts + rows, mask=exists, other=0.0)
        visible = (keys[:, None] - low <= position[None, :]) & is_key[:, None] & exists[None, :]
        logits = product(near, tl.trans(queries), COMPUTE, PRECISION) * scale
        weights = tl.exp2(tl.where(visible, logits - levels[None, :], -1e30))
        acc_v += product(weights, upstream, COMPUTE, PRECISION)
        d_weights = product(mixed, tl.trans(upstream), COMPUTE, PRECISION)
        acc_k += product(weights * (d_weights - shift[None, :]), queries, COMPUTE, PRECISION)
    k_rows, v_rows = d_k + index * num_keys * D, d_v + index * num_keys * V
    store_tile(k_rows, acc_k * scaling, keys, is_key, columns_d, D)
    store_tile(v_rows, acc_v, keys, is_key, columns_v, V)
