"""How much of a query's attention a block of keys is thought to hold: what stands for keys, for queries, their product.

A scorer turns a block of keys into a few columns and some queries into rows; a softmax over the columns that a row may
see, summed over the columns of a block, is the block's share.

Letters in shapes: those of `canvas`, and `C` columns of a block, `M` rows of some queries, `E` entries of either.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...window import LOG2E, MASKED

# Products that are held at a time: 64 MiB in fp32.
MOST_PRODUCTS = 1 << 24


class Scorer(Protocol):
    """What stands for keys and for queries.

    Attributes:
        columns: of a block of keys.
        factor: on the products, besides the layer's scaling.
        is_ordered: whether rows and columns of one block stand in the order of time, so that one of them can be hidden
            from another.
        is_compact: whether the columns are much less than the keys, so that they are worth keeping.
    """

    @property
    def columns(self) -> int: ...

    @property
    def factor(self) -> float: ...

    @property
    def is_ordered(self) -> bool: ...

    @property
    def is_compact(self) -> bool: ...

    def of_keys(self, blocks: Tensor) -> Tensor:
        """`[..., block, D]` → `[..., C, E]`."""

    def of_queries(self, blocks: Tensor) -> Tensor:
        """`[..., block, D]` → `[..., M, E]`."""

    def of_each(self, queries: Tensor) -> Tensor:
        """`[..., D]` → `[..., E]`: every query by itself."""


@dataclass(frozen=True)
class Means:
    """The mean of the keys and the mean of the queries."""

    columns: int = 1
    factor: float = 1.0
    is_ordered: bool = False
    is_compact: bool = True

    def of_keys(self, blocks: Tensor) -> Tensor:
        return blocks.mean(-2, keepdim=True)

    def of_queries(self, blocks: Tensor) -> Tensor:
        return blocks.mean(-2, keepdim=True)

    def of_each(self, queries: Tensor) -> Tensor:
        return queries


@dataclass(frozen=True)
class Boxes:
    """The box around the keys: `Σ_d max(q_d hi_d, q_d lo_d)` is at least as large as the product with any key in it.

    Paper: https://arxiv.org/abs/2406.10774
    """

    columns: int = 1
    factor: float = 1.0
    is_ordered: bool = False
    is_compact: bool = True

    def of_keys(self, blocks: Tensor) -> Tensor:
        return torch.cat([blocks.amax(-2, keepdim=True), blocks.amin(-2, keepdim=True)], -1)

    def of_queries(self, blocks: Tensor) -> Tensor:
        return self.of_each(blocks.mean(-2, keepdim=True))

    def of_each(self, queries: Tensor) -> Tensor:
        return torch.cat([queries.clamp_min(0), queries.clamp_max(0)], -1)


@dataclass(frozen=True)
class Antidiagonals:
    """Sums along antidiagonals of `stride × stride` squares of the products: one product of vectors `stride` as long.

    Paper: https://arxiv.org/abs/2503.16428
    """

    block: int
    stride: int
    is_ordered: bool = True
    is_compact: bool = False

    @property
    def columns(self) -> int:
        return self.block // self.stride

    @property
    def factor(self) -> float:
        return 1.0 / self.stride

    def of_keys(self, blocks: Tensor) -> Tensor:
        return blocks.unflatten(-2, (self.columns, self.stride)).flatten(-2)

    def of_queries(self, blocks: Tensor) -> Tensor:
        return blocks.unflatten(-2, (self.columns, self.stride)).flip(-2).flatten(-2)

    def of_each(self, queries: Tensor) -> Tensor:
        raise NotImplementedError("antidiagonals are of whole blocks of queries")


def block_shares(
    scorer: Scorer, rows: Tensor, columns: Tensor, last: Tensor, *, scaling: float, is_own: bool, most: int
) -> Tensor:
    """The share of the attention of some queries that each block of keys is thought to hold.

    Args:
        scorer: whose rows and columns they are.
        rows: `[B, KV, R, G, M, E]`.
        columns: `[B, KV, N, C, E]`.
        last: `[B, R]` int64, the last block that is seen, below zero for none.
        scaling: the layer's factor on query-key products.
        is_own: whether the rows are queries of that last block, so that what of it is later than a row is hidden.
        most: blocks that the first of the R can see at most; each next one can see one more.

    Returns:
        `[B, KV, R, N]`, nowhere negative; a row adds up to 1, or to 0 where it sees nothing.
    """
    num_rows, num_blocks, width = rows.shape[2], columns.shape[2], scorer.columns
    products = rows[:, :, 0].numel() // rows.shape[-1] * num_blocks * width
    strip = max(1, MOST_PRODUCTS // max(products, 1))
    shares = rows.new_zeros(*rows.shape[:3], num_blocks)
    for start in range(0, num_rows, strip):
        stop = min(start + strip, num_rows)
        seen = max(min(most + stop - 1, num_blocks), 0)
        part = _strip(scorer, rows[:, :, start:stop], columns[:, :, :seen], last[:, start:stop], scaling, is_own)
        shares[:, :, start:stop, :seen] = part
    return shares


def _strip(scorer: Scorer, rows: Tensor, columns: Tensor, last: Tensor, scaling: float, is_own: bool) -> Tensor:
    groups, height = rows.shape[3:5]
    number = torch.arange(columns.shape[2], device=rows.device)
    visible = (number <= last[..., None])[:, None, :, None, None, :, None]
    if is_own and scorer.is_ordered:
        row, column = (torch.arange(n, device=rows.device) for n in (height, scorer.columns))
        # `[B, 1, R, 1, M, N, C]`
        is_later = (number == last[..., None])[:, None, :, None, None, :, None] & (
            (column > row[:, None])[:, None, :]
        )
        visible = visible & ~is_later
    logits = rows.flatten(2, 4) @ columns.flatten(2, 3).transpose(-1, -2) * (scaling * scorer.factor * LOG2E)
    logits = logits.unflatten(2, (-1, groups, height)).unflatten(-1, (-1, scorer.columns))
    logits = logits.masked_fill(~visible, MASKED)
    # Clamped above MASKED: where nothing is visible every weight underflows to zero.
    weights = (logits - logits.amax((-1, -2), keepdim=True).clamp_min(MASKED / 1e10)).exp2()
    weights = weights.sum(-1)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    return weights.mean((3, 4))
