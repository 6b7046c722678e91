# Triton's language is untyped: what a kernel's arguments are is said by its signature at compile time.
# mypy: ignore-errors
"""Pieces that the Triton kernels share: masked tiles of a matrix, dot products in a chosen precision, decay in a chunk.

Importing this module imports triton, which only Linux on x86-64 has.
"""

import triton
import triton.language as tl

from .launching import is_interpreted

# Interpreted products of bf16 are garbage, for numpy has no such numbers.
IS_INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def product(left, right, COMPUTE: tl.constexpr, PRECISION: tl.constexpr):
    """`left @ right` with operands rounded to COMPUTE and an fp32 sum."""
    left, right = left.to(COMPUTE), right.to(COMPUTE)
    if IS_INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def tile(base, rows, exists, columns, WIDTH: tl.constexpr):
    """Rows and columns of a row-major `[..., WIDTH]` matrix, zero outside."""
    mask = exists[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)


@triton.jit
def tile_transposed(base, rows, exists, columns, WIDTH: tl.constexpr):
    """The same, `[columns, rows]`."""
    mask = exists[None, :] & (columns < WIDTH)[:, None]
    return tl.load(base + rows[None, :] * WIDTH + columns[:, None], mask=mask, other=0.0)


@triton.jit
def store_tile(base, values, rows, exists, columns, WIDTH: tl.constexpr):
    """Write what `tile` reads."""
    mask = exists[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + rows[:, None] * WIDTH + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def first_real(start, batch_index, HAS_START: tl.constexpr):
    """Index of a row's first key that is no padding."""
    if HAS_START:
        return tl.load(start + batch_index)
    return 0


@triton.jit
def chunk_bounds(bounds, chunk, length, CHUNK: tl.constexpr):
    """A chunk's first token and the one behind its last; those of packed sequences stand in a table."""
    begin, end = chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length)
    if bounds is not None:
        begin, end = tl.load(bounds + 2 * chunk), tl.load(bounds + 2 * chunk + 1)
    return begin, end


@triton.jit
def sequence_chunks(offsets, sequence, num_chunks):
    """A sequence's row of the batch, its first chunk and the one behind its last; packed ones stand in one row."""
    row, low, high = sequence, 0, num_chunks
    if offsets is not None:
        row, low, high = sequence * 0, tl.load(offsets + sequence), tl.load(offsets + sequence + 1)
    return row, low, high


@triton.jit
def decay_inside(sums_row, sums_column, visible):
    """`exp(g_row - g_column)` where a row sees a column; elsewhere 1, for the difference could overflow there."""
    return tl.exp(tl.where(visible, sums_row[:, None] - sums_column[None, :], 0.0))
