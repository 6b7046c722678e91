# mypy: ignore-errors
"""The Triton kernel of one decoding step of the hybrid: feature maps, ring of exact tokens, running sums and output."""

import triton
import triton.language as tl

from ..tiles import tile
from ..window_linear.hybrid_kernels import window_factors


@triton.jit
def mapped(x, weight, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr):
    """`x W` of one vector."""
    columns = tl.arange(0, BF)
    logits = tl.zeros([BF], dtype=tl.float32)
    for first in range(0, D, 16):
        rows = first + tl.arange(0, 16)
        part = tl.load(x + rows, mask=rows < D, other=0.0).to(tl.float32)
        logits += tl.sum(part[:, None] * tile(weight, rows, rows < D, columns, F).to(tl.float32), 0)
    return logits


@triton.jit
def hedgehog_half(logits, sign, inside):
    """`softmax(sign · x W)`, clamped as the module clamps it, zero behind the last feature."""
    logits = tl.where(inside, logits * sign, -1e30)
    weights = tl.exp(logits - tl.max(logits, 0))
    return tl.where(inside, tl.maximum(weights / tl.sum(weights, 0), 1e-12), 0.0)


@triton.jit
def window_terms(
    q,
    k,
    v,
    ring_keys,
    ring_values,
    position,
    scale,
    columns_v,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BW: tl.constexpr,
    BD: tl.constexpr,
):
    """Numerator of some columns, mass and largest logit of the softmax terms: the new token, then the ring by age."""
    columns_d = tl.arange(0, BD)
    query = tl.load(q + columns_d, mask=columns_d < D, other=0.0).to(tl.float32)
    own = tl.load(k + columns_d, mask=columns_d < D, other=0.0).to(tl.float32)
    peak = tl.sum(query * own, 0) * scale
    acc = tl.load(v + columns_v, mask=columns_v < V, other=0.0).to(tl.float32)
    mass = 1.0
    for first in range(1, WINDOW, BW):
        age = first + tl.arange(0, BW)
        exists = (age < WINDOW) & (age <= position)
        slots = tl.where(exists, position - age, 0) % WINDOW
        keys = tile(ring_keys, slots, exists, columns_d, D).to(tl.float32)
        logits = tl.where(exists, tl.sum(keys * query[None, :], 1) * scale, -1e30)
        new_peak = tl.maximum(peak, tl.max(logits, 0))
        weights = tl.where(exists, tl.exp2(logits - new_peak), 0.0)
        shrink = tl.exp2(peak - new_peak)
        values = tile(ring_values, slots, exists, columns_v, V).to(tl.float32)
        acc = acc * shrink + tl.sum(weights[:, None] * values, 0)
        mass = mass * shrink + tl.sum(weights, 0)
        peak = new_peak
    return acc, mass, peak


@triton.jit
def decode_hybrid(
    q,
    k,
    v,
    ring_keys,
    ring_values,
    sums,
    norm,
    query_weight,
    key_weight,
    gamma,
    count,
    valid,
    out,
    scale,
    H: tl.constexpr,
    HS: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    V: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_VALID: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    MEMBERS: tl.constexpr,
    BD: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    BW: tl.constexpr,
):
    """One program for each state: its query heads read, then the token that the window loses next goes into the sums.

    The slot of the new token is that of the one before the window, so that no other program reads where it is written.
    Columns of values come BV at a time.
    """
    index = tl.program_id(0).to(tl.int64)
    b, s = index // HS, index % HS
    kv = b * HV + s // (HS // HV)
    position = tl.load(count + b)
    is_real = True
    if HAS_VALID:
        is_real = tl.load(valid + b) != 0
    ring_keys += kv * WINDOW * D
    ring_values += kv * WINDOW * V
    columns_d, columns_f = tl.arange(0, BD), tl.arange(0, BF)
    leaves = is_real & (position + 1 >= WINDOW)
    # A window of one loses the new token itself.
    leaving_key = k + kv * D if WINDOW == 1 else ring_keys + (position + 1) % WINDOW * D
    leaving_value = v + kv * V if WINDOW == 1 else ring_values + (position + 1) % WINDOW * V
    member = tl.arange(0, MEMBERS)
    inside_f = columns_f < F
    asked = tl.zeros([MEMBERS, BF], dtype=tl.float32)
    for r in range(H // HS):
        h = s * (H // HS) + r
        logits = mapped(q + (b * H + h) * D, query_weight + h * D * F, D, F, BF)
        asked += tl.where(member[:, None] == r, logits[None, :], 0.0)
    left = tl.zeros([BF], dtype=tl.float32)
    if leaves:
        left += mapped(leaving_key, key_weight + s * D * F, D, F, BF)
    for first_v in range(0, V, BV):
        columns_v = first_v + tl.arange(0, BV)
        inside_v = columns_v < V
        leaving = tl.where(leaves, columns_v, V) < V
        old_value = tl.load(leaving_value + columns_v, mask=leaving, other=0.0).to(tl.float32)
        acc = tl.zeros([MEMBERS, BV], dtype=tl.float32)
        mass = tl.zeros([MEMBERS], dtype=tl.float32)
        for half in range(2):
            sign = 1.0 - 2.0 * half
            rows = half * F + columns_f
            state = tile(sums + index * 2 * F * V, rows, inside_f, columns_v, V)
            total = tl.load(norm + index * 2 * F + rows, mask=inside_f, other=0.0)
            for r in range(H // HS):
                logits = tl.sum(tl.where(member[:, None] == r, asked, 0.0), 0)
                features = hedgehog_half(logits, sign, inside_f)
                acc += tl.where(member[:, None] == r, tl.sum(features[:, None] * state, 0)[None, :], 0.0)
                mass += tl.where(member == r, tl.sum(features * total, 0), 0.0)
            if leaves:
                old = hedgehog_half(left, sign, inside_f)
                places = sums + index * 2 * F * V + rows[:, None] * V + columns_v[None, :]
                tl.store(places, state + old[:, None] * old_value[None, :], mask=inside_f[:, None] & inside_v[None, :])
                # Read again with the next columns.
                if first_v + BV >= V:
                    tl.store(norm + index * 2 * F + rows, total + old, mask=inside_f)
        for r in range(H // HS):
            h = b * H + s * (H // HS) + r
            exact, exact_mass, peak = window_terms(
                q + h * D,
                k + kv * D,
                v + kv * V,
                ring_keys,
                ring_values,
                position,
                scale,
                columns_v,
                WINDOW,
                D,
                V,
                BW,
                BD,
            )
            near, far = window_factors(tl.load(gamma + h % H), peak, ABSOLUTE)
            above = near * exact + far * tl.sum(tl.where(member[:, None] == r, acc, 0.0), 0)
            below = near * exact_mass + far * tl.sum(tl.where(member == r, mass, 0.0), 0)
            tl.store(out + h * V + columns_v, (above / below).to(out.dtype.element_ty), mask=inside_v)
        if is_real & (s % (HS // HV) == 0):
            new_value = tl.load(v + kv * V + columns_v, mask=inside_v, other=0.0)
            slot_values = ring_values + position % WINDOW * V
            tl.store(slot_values + columns_v, new_value.to(ring_values.dtype.element_ty), mask=inside_v)
    if is_real & (s % (HS // HV) == 0):
        new_key = tl.load(k + kv * D + columns_d, mask=columns_d < D, other=0.0)
        slot_keys = ring_keys + position % WINDOW * D
        tl.store(slot_keys + columns_d, new_key.to(ring_keys.dtype.element_ty), mask=columns_d < D)
