"""Rows laid out in whole blocks, counted from each row's first real token.

Padding stands before the real tokens of a call, so blocks of slots would begin elsewhere in every row of a batch. Here
each row begins at its first real token, and query blocks begin where key blocks do, whatever earlier calls have seen of
them: then a padded row, a chunked prefill and decoding choose what the row by itself chooses.

Letters in shapes: `B` rows, `KV` key/value heads, `G` query heads that share one, `T` queries of the call, `S` tokens,
`N` blocks of keys, `R` blocks of queries, `D` and `V` sizes of keys and values.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...padding import take_tokens
from ...tokens import Call


@dataclass(frozen=True)
class Canvas:
    """A call in blocks.

    Attributes:
        block: tokens of a block.
        count: `[B]` int64, real tokens of each row.
        shift: `[B]` int64, position of the first query in its row; below zero where that is padding.
        number: `[B, R]` int64, the block in which each block of queries stands.
        keys: `[B, KV, N, block, D]`; zero behind the end of a row.
        values: `[B, KV, N, block, V]`; likewise.
    """

    block: int
    count: Tensor
    shift: Tensor
    number: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, call: Call, block: int) -> "Canvas":
        """The canvas of a call whose tokens have their padding in front."""
        tokens, length = call.tokens, call.length
        batch, total, device = call.query.shape[0], tokens.length, call.query.device
        # Without padding all rows begin within a block at the same token; with it one may at its last.
        before = call.past % block if tokens.valid is None else block - 1
        count = torch.full((batch,), total, device=device) if tokens.valid is None else tokens.valid.sum(-1)
        num_blocks = -(-total // block)
        rows = min(-(-(length + before) // block), num_blocks)
        shift = count - length
        number = shift.clamp_min(0)[:, None] // block + torch.arange(rows, device=device)
        keys, values = (in_blocks(t, tokens.valid, block) for t in (tokens.keys, tokens.values))
        return cls(block, count, shift, number.clamp_max(num_blocks - 1), keys, values)

    @property
    def num_blocks(self) -> int:
        """Blocks of keys."""
        return self.keys.shape[2]

    @property
    def num_rows(self) -> int:
        """Blocks of queries."""
        return self.number.shape[1]

    def query_blocks(self, queries: Tensor, *, back: int = 0) -> Tensor:
        """Queries in blocks.

        Args:
            queries: `[B, heads, Q, D]`, the newest last; at least those of the call.
            back: how many blocks before those in `number` to take.

        Returns:
            `[B, KV, R, G, block, D]`; anything where a token is none of these.
        """
        held, rows = queries.shape[2], self.num_rows
        start = (self.number[:, 0] - back) * self.block + held - self.count
        at = torch.arange(rows * self.block, device=queries.device) + start[:, None]
        taken = take_tokens(queries, at.clamp(0, held - 1))
        blocks: Tensor = taken.unflatten(1, (self.keys.shape[1], -1)).unflatten(3, (rows, self.block)).transpose(2, 3)
        return blocks

    def unblock(self, out: Tensor, length: int) -> Tensor:
        """`[B, KV, R, G, block, V]` → `[B, heads, T, V]` of the call's `length` queries."""
        flat = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        at = torch.arange(length, device=out.device) + (self.shift - self.number[:, 0] * self.block)[:, None]
        return take_tokens(flat, at.clamp(0, flat.shape[2] - 1))

    def positions(self, length: int) -> Tensor:
        """`[B, T]` int64 positions of the call's `length` queries; below zero where padding stands."""
        return self.shift[:, None] + torch.arange(length, device=self.shift.device)

    def spread(self, of_blocks: Tensor, length: int) -> Tensor:
        """What holds for blocks of queries, `[B, heads, R, any]`, for each of the call's `length` queries."""
        row = self.positions(length) // self.block - self.number[:, :1]
        return take_tokens(of_blocks, row.clamp(0, self.num_rows - 1))


def with_values(call: Call, canvas: Canvas) -> tuple[Call, Canvas]:
    """A call and its canvas in full precision and with values, which a choice behind a kernel does without."""
    if canvas.values.shape[-1]:
        return call, canvas
    call = call.to(torch.promote_types(call.query.dtype, torch.float32))
    return call, Canvas.of(call, canvas.block)


def in_blocks(tensor: Tensor, valid: Tensor | None, block: int) -> Tensor:
    """What is known of all tokens of a call, `[B, heads, S, D]`, in blocks that begin at each row's first real token.

    Args:
        tensor: padding first.
        valid: `[B, S]` bool; None when all are real.
        block: tokens of a block.

    Returns:
        `[B, heads, N, block, D]`; zero behind the end of a row.
    """
    total = tensor.shape[2]
    if valid is not None:
        at, count = torch.arange(total, device=tensor.device), valid.sum(-1)[:, None]
        behind = (at >= count)[:, None, :, None]
        tensor = take_tokens(tensor, (at + total - count) % total).masked_fill(behind, 0.0)
    blocks: Tensor = F.pad(tensor, (0, 0, 0, -total % block)).unflatten(2, (-1, block))
    return blocks
