# mypy: ignore-errors
"""Triton kernels of the hybrid with LoLCATs' hedgehog map inside, `φ(x) = [softmax(xW), softmax(-xW)]`.

Features are never written out: a block of the sums belongs to one half of φ. Heads, rows and window are as in
`chunk_kernels` and `window_kernels`.
"""

import triton
import triton.language as tl

from ..tiles import first_real, product, store_tile, tile
from .hybrid_kernels import window_factors, window_rows


@triton.jit
def hedgehog_tile(
    x,
    weight,
    half,
    rows,
    exists,
    D: tl.constexpr,
    F: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BF: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One half of φ of some rows, `[CHUNK, BF]`, clamped as the module clamps it; zero outside."""
    columns_f = tl.arange(0, BF)
    logits = tl.zeros([CHUNK, BF], dtype=tl.float32)
    for first in range(0, D, STEP):
        columns_d = first + tl.arange(0, STEP)
        weights = tile(weight, columns_d, columns_d < D, columns_f, F)
        logits += product(tile(x, rows, exists, columns_d, D), weights, COMPUTE, PRECISION)
    logits = tl.where((columns_f < F)[None, :], logits * (1.0 - 2.0 * half), -1e30)
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    weights = tl.maximum(weights / tl.sum(weights, 1)[:, None], 1e-12)
    return tl.where((columns_f < F)[None, :] & exists[:, None], weights, 0.0)


@triton.jit
def hedgehog_states(
    k,
    v,
    key_weight,
    start,
    first_sums,
    first_norm,
    sums,
    norms,
    length,
    num_keys,
    shift,
    HS: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the sums before every chunk; one program for each half of φ and block of values."""
    half, block_v, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, s = index // HS, index % HS
    num_chunks = tl.cdiv(length, CHUNK)
    columns_k = half * F + tl.arange(0, BF)
    inside_k = tl.arange(0, BF) < F
    columns_v = block_v * BV + tl.arange(0, BV)
    k += (b * HV + s // (HS // HV)) * num_keys * D
    v += (b * HV + s // (HS // HV)) * num_keys * V
    low = first_real(start, b, HAS_START)
    state = tl.zeros([BF, BV], dtype=tl.float32)
    norm = tl.zeros([BF], dtype=tl.float32)
    if HAS_FIRST:
        state += tile(first_sums + index * 2 * F * V, columns_k, inside_k, columns_v, V)
        norm += tl.load(first_norm + index * 2 * F + columns_k, mask=inside_k, other=0.0)
    for chunk in range(num_chunks):
        here = index * num_chunks + chunk
        store_tile(sums + here * 2 * F * V, state, columns_k, inside_k, columns_v, V)
        if block_v == 0:
            tl.store(norms + here * 2 * F + columns_k, norm, mask=inside_k)
        steps = chunk * CHUNK + tl.arange(0, CHUNK)
        rows = steps + shift
        exists = (steps < length) & (rows >= low) & (rows < num_keys)
        keys = hedgehog_tile(k, key_weight + s * D * F, half, rows, exists, D, F, CHUNK, STEP, BF, COMPUTE, PRECISION)
        state += product(tl.trans(keys), tile(v, rows, exists, columns_v, V), COMPUTE, PRECISION)
        norm += tl.sum(keys, 0)


@triton.jit
def hedgehog_hybrid_outputs(
    q,
    k,
    v,
    query_weight,
    key_weight,
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
    HV: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    BD: tl.constexpr,
    STEP: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    HAS_START: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What `hybrid_outputs` writes, with both feature maps inside."""
    block_v, chunk, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    b, h = index // H, index % H
    s = h // (H // HS)
    here = (b * HS + s) * tl.cdiv(length, CHUNK) + chunk
    k += (b * HV + h // (H // HV)) * num_keys * D
    v += (b * HV + h // (H // HV)) * num_keys * V
    q += index * length * D
    steps = chunk * CHUNK + tl.arange(0, CHUNK)
    is_query = steps < length
    low = first_real(start, b, HAS_START)
    columns_v = block_v * BV + tl.arange(0, BV)
    acc, mass, peak, best = window_rows(
        tile(q, steps, is_query, tl.arange(0, BD), D),
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
    near, far = window_factors(tl.load(gamma + h), peak, ABSOLUTE)
    acc *= near[:, None]
    mass *= near
    rows = steps + offset - window
    is_key = is_query & (rows >= low) & (rows < num_keys)
    weights = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    inside_k = tl.arange(0, BF) < F
    for half in range(2):
        columns_k = half * F + tl.arange(0, BF)
        queries = hedgehog_tile(
            q, query_weight + h * D * F, half, steps, is_query, D, F, CHUNK, STEP, BF, COMPUTE, PRECISION
        )
        if ABSOLUTE:
            queries *= far[:, None]
        keys = hedgehog_tile(k, key_weight + s * D * F, half, rows, is_key, D, F, CHUNK, STEP, BF, COMPUTE, PRECISION)
        weights += product(queries, tl.trans(keys), COMPUTE, PRECISION)
        acc += product(queries, tile(sums + here * 2 * F * V, columns_k, inside_k, columns_v, V), COMPUTE, PRECISION)
        norm = tl.load(norms + here * 2 * F + columns_k, mask=inside_k, other=0.0)
        mass += tl.sum(queries * norm[None, :], 1)
    weights = tl.where((steps[:, None] >= steps[None, :]) & is_key[None, :] & is_query[:, None], weights, 0.0)
    acc += product(weights, tile(v, rows, is_key, columns_v, V), COMPUTE, PRECISION)
    mass += tl.sum(weights, 1)
    acc /= tl.where(mass == 0.0, 1.0, mass)[:, None]
    store_tile(out + index * length * V, acc, steps, is_query, columns_v, V)
    if rest is not None:
        acc -= acc.to(out.dtype.element_ty).to(tl.float32)
        store_tile(rest + index * length * V, acc, steps, is_query, columns_v, V)
    if block_v == 0:
        tl.store(mass_out + index * length + steps, mass, mask=is_query)
        tl.store(peak_out + index * length + steps, peak, mask=is_query)
        tl.store(best_out + index * length + steps, best, mask=is_query)
