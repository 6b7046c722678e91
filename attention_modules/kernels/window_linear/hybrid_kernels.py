# mypy: ignore-errors
"""Triton kernels of the softmax terms in a sliding window: the hybrid's forward pass and the window's gradients.

Query `t` stands at key row `t + offset` and sees rows `(t + offset - window, t + offset]` exactly; what lies before is
the linear part, whose key rows are those of `chunk_kernels` with `shift = offset - window`. Logits are in units of
log 2.
"""

import triton
import triton.language as tl

from ..chunk_linear.chunk_kernels import linear_terms
from ..tiles import first_real, product, store_tile, tile, tile_transposed


@triton.jit
def window_rows(
    queries,
    k,
    v,
    steps,
    is_query,
    low,
    columns_v,
    chunk,
    scale,
    num_keys,
    offset,
    window,
    D: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Softmax terms of a chunk of queries: numerator, mass, largest logit and the row of keys where that stands."""
    columns_d = tl.arange(0, BD)
    peak = tl.full([CHUNK], -1e30, dtype=tl.float32)
    best = tl.full([CHUNK], -1, dtype=tl.int32)
    acc = tl.zeros([CHUNK, BV], dtype=tl.float32)
    mass = tl.zeros([CHUNK], dtype=tl.float32)
    for part in range(tl.cdiv(window + CHUNK, CHUNK)):
        rows = (chunk + part) * CHUNK + offset - window + tl.arange(0, CHUNK)
        exists = (rows >= low) & (rows < num_keys)
        inside = (rows[None, :] > steps[:, None] + offset - window) & (rows[None, :] <= steps[:, None] + offset)
        visible = inside & exists[None, :] & is_query[:, None]
        keys = tile_transposed(k, rows, exists, columns_d, D)
        logits = tl.where(visible, product(queries, keys, COMPUTE, PRECISION) * scale, -1e30)
        highest = tl.max(logits, 1)
        where = tl.min(tl.where(logits == highest[:, None], rows[None, :], num_keys), 1)
        best = tl.where(highest > peak, where, best)
        new_peak = tl.maximum(peak, highest)
        weights = tl.where(visible, tl.exp2(logits - new_peak[:, None]), 0.0)
        shrink = tl.exp2(peak - new_peak)
        mass = mass * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + product(weights, tile(v, rows, exists, columns_v, V), COMPUTE, PRECISION)
        peak = new_peak
    return acc, mass, peak, best


@triton.jit
def window_factors(share, peak, ABSOLUTE: tl.constexpr):
    """What softmax terms, relative to their peak, and linear ones are multiplied by; see `absolute_factors`."""
    if ABSOLUTE:
        level = peak + share
        return tl.exp2(tl.maximum(tl.minimum(level, 0.0), -60.0)), tl.exp2(tl.minimum(-level, 0.0))
    return peak * 0.0 + share, peak * 0.0 + 1.0


@triton.jit
def hybrid_outputs(
    q,
    k,
    v,
    query_features,
    key_features,
    gamma,
    start,
    sums,
    norms,
    out,
    rest,
    mass_out,
    peak_out,
    best_out,
    scale,
    length,
    num_keys,
    offset,
    window,
    H: tl.constexpr,
    HS: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_START: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs of one chunk of queries of one head; also each row's normaliser, largest logit and where that stands.

    `rest` takes what the outputs lose by rounding, for the gradients.
    """
    block_v, chunk, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = index // H, index % H
    here = (b * HS + h // (H // HS)) * tl.cdiv(length, CHUNK) + chunk
    k += (b * HV + h // (H // HV)) * num_keys * D
    v += (b * HV + h // (H // HV)) * num_keys * V
    steps = chunk * CHUNK + tl.arange(0, CHUNK)
    is_query = steps < length
    low = first_real(start, b, HAS_START)
    columns_d = tl.arange(0, BD)
    columns_v = block_v * BV + tl.arange(0, BV)
    queries = tile(q + index * length * D, steps, is_query, columns_d, D)
    acc, mass, peak, best = window_rows(
        queries,
        k,
        v,
        steps,
        is_query,
        low,
        columns_v,
        chunk,
        scale,
        num_keys,
        offset,
        window,
        D,
        V,
        CHUNK,
        BD,
        BV,
        COMPUTE,
        PRECISION,
    )
    rows = steps + offset - window
    past, past_mass = linear_terms(
        query_features + index * length * K,
        key_features + (b * HK + h // (H // HK)) * num_keys * K,
        v,
        gamma,
        sums + here * K * V,
        norms + here * K,
        steps,
        rows,
        is_query,
        is_query & (rows >= low) & (rows < num_keys),
        columns_v,
        K,
        V,
        CHUNK,
        BK,
        BV,
        False,
        COMPUTE,
        PRECISION,
    )
    near, far = window_factors(tl.load(gamma + h), peak, ABSOLUTE)
    mass = near * mass + far * past_mass
    acc = (near[:, None] * acc + far[:, None] * past) / tl.where(mass == 0.0, 1.0, mass)[:, None]
    store_tile(out + index * length * V, acc, steps, is_query, columns_v, V)
    if rest is not None:
        acc -= acc.to(out.dtype.element_ty).to(tl.float32)
        store_tile(rest + index * length * V, acc, steps, is_query, columns_v, V)
    if block_v == 0:
        tl.store(mass_out + index * length + steps, mass, mask=is_query)
        tl.store(peak_out + index * length + steps, peak, mask=is_query)
        tl.store(best_out + index * length + steps, best, mask=is_query)


@triton.jit
def window_query_gradients(
    q,
    k,
    v,
    gamma,
    start,
    d_out,
    d_mass,
    peak,
    best,
    d_q,
    response,
    scale,
    scaling,
    length,
    num_keys,
    offset,
    window,
    H: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    HAS_START: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the queries through the softmax terms, and each row's response to a factor on those terms.

    `d_out` and `d_mass` are the gradients of the fraction's two sides. The largest logit, which all weights of a row
    are relative to, takes the opposite of what they all together get: linear terms do not follow it.
    """
    chunk, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = index // H, index % H
    k += (b * HV + h // (H // HV)) * num_keys * D
    v += (b * HV + h // (H // HV)) * num_keys * V
    steps = chunk * CHUNK + tl.arange(0, CHUNK)
    is_query = steps < length
    low = first_real(start, b, HAS_START)
    columns_d = tl.arange(0, BD)
    queries = tile(q + index * length * D, steps, is_query, columns_d, D)
    highest = tl.load(peak + index * length + steps, mask=is_query, other=0.0)
    mass = tl.load(d_mass + index * length + steps, mask=is_query, other=0.0)
    acc = tl.zeros([CHUNK, BD], dtype=tl.float32)
    total = tl.zeros([CHUNK], dtype=tl.float32)
    for part in range(tl.cdiv(window + CHUNK, CHUNK)):
        rows = (chunk + part) * CHUNK + offset - window + tl.arange(0, CHUNK)
        exists = (rows >= low) & (rows < num_keys)
        inside = (rows[None, :] > steps[:, None] + offset - window) & (rows[None, :] <= steps[:, None] + offset)
        visible = inside & exists[None, :] & is_query[:, None]
        keys = tile(k, rows, exists, columns_d, D)
        logits = product(queries, tl.trans(keys), COMPUTE, PRECISION) * scale - highest[:, None]
        weights = tl.where(visible, tl.exp2(tl.where(visible, logits, 0.0)), 0.0)
        d_weights = tl.zeros([CHUNK, CHUNK], dtype=tl.float32) + mass[:, None]
        for first in range(0, V, BV):
            columns_v = first + tl.arange(0, BV)
            outs = tile(d_out + index * length * V, steps, is_query, columns_v, V)
            d_weights += product(outs, tile_transposed(v, rows, exists, columns_v, V), COMPUTE, PRECISION)
        d_logits = weights * d_weights
        total += tl.sum(d_logits, 1)
        acc += product(d_logits, keys, COMPUTE, PRECISION)
    at = tl.load(best + index * length + steps, mask=is_query, other=-1)
    acc -= total[:, None] * tile(k, at, at >= 0, columns_d, D).to(tl.float32)
    store_tile(d_q + index * length * D, acc * (tl.load(gamma + h) * scaling), steps, is_query, columns_d, D)
    tl.store(response + index * length + steps, total, mask=is_query)


@triton.jit
def window_key_gradients(
    q,
    k,
    v,
    gamma,
    start,
    d_out,
    d_mass,
    peak,
    best,
    response,
    d_k,
    d_v,
    scale,
    scaling,
    length,
    num_keys,
    offset,
    window,
    H: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    HAS_START: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of keys and values through the softmax terms; one program holds all columns of a chunk of keys."""
    chunk, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b = index // HV
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    exists = (rows >= first_real(start, b, HAS_START)) & (rows < num_keys)
    columns_d = tl.arange(0, BD)
    columns_v = tl.arange(0, BV)
    keys = tile(k + index * num_keys * D, rows, exists, columns_d, D)
    values = tile(v + index * num_keys * V, rows, exists, columns_v, V)
    d_keys = tl.zeros([CHUNK, BD], dtype=tl.float32)
    d_values = tl.zeros([CHUNK, BV], dtype=tl.float32)
    parts = tl.cdiv(window + CHUNK - 1, CHUNK)
    for turn in range((H // HV) * parts):
        head = index * (H // HV) + turn // parts
        share = tl.load(gamma + head % H)
        steps = (chunk + turn % parts) * CHUNK - offset + tl.arange(0, CHUNK)
        is_query = (steps >= 0) & (steps < length)
        inside = (rows[:, None] > steps[None, :] + offset - window) & (rows[:, None] <= steps[None, :] + offset)
        visible = inside & exists[:, None] & is_query[None, :]
        highest = tl.load(peak + head * length + steps, mask=is_query, other=0.0)
        mass = tl.load(d_mass + head * length + steps, mask=is_query, other=0.0)
        total = tl.load(response + head * length + steps, mask=is_query, other=0.0)
        at = tl.load(best + head * length + steps, mask=is_query, other=-1)
        queries = tile(q + head * length * D, steps, is_query, columns_d, D)
        outs = tile(d_out + head * length * V, steps, is_query, columns_v, V)
        logits = product(keys, tl.trans(queries), COMPUTE, PRECISION) * scale - highest[None, :]
        weights = tl.where(visible, tl.exp2(tl.where(visible, logits, 0.0)), 0.0) * share
        d_values += product(weights, outs, COMPUTE, PRECISION)
        d_logits = weights * (product(values, tl.trans(outs), COMPUTE, PRECISION) + mass[None, :])
        d_logits -= tl.where(at[None, :] == rows[:, None], (share * total)[None, :], 0.0)
        d_keys += product(d_logits, queries, COMPUTE, PRECISION)
    store_tile(d_k + index * num_keys * D, d_keys * scaling, rows, rows < num_keys, columns_d, D)
    store_tile(d_v + index * num_keys * V, d_values, rows, rows < num_keys, columns_v, V)
