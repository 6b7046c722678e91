"""How much of a query's attention a block of keys is thought to hold: what stands for keys, for queries, their product.

A scorer turns a block of keys into a few columns and some queries into rows; a softmax over the columns that a row may
see, summed over the columns of a block, is the block's share.

Letters in shapes: those of `canvas`, and `C` columns of a block, `M` rows of some queries, `E` entries of either.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
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
        takes_largest: whether a block counts for as much as the largest of its columns, instead of their sum.
    """

    @property
    def columns(self) -> int: ...

    @property
    def factor(self) -> float: ...

    @property
    def is_ordered(self) -> bool: ...

    @property
    def is_compact(self) -> bool: ...

    @property
    def takes_largest(self) -> bool: ...

    def of_keys(self, blocks: Tensor) -> Tensor:
        """`[..., block, D]` → `[..., C, E]`."""

    def of_queries(self, blocks: Tensor) -> Tensor:
        """`[..., any, D]` → `[..., M, E]`; a query by itself is a block of one."""


@runtime_checkable
class PrefixScorer(Scorer, Protocol):
    """One that knows what stands for a part of a block, which a query inside it has before it."""

    def of_prefixes(self, blocks: Tensor) -> Tensor:
        """`[..., block, D]` → `[..., block, E]`: what stands for the first, the first two, the first three keys ..."""


@dataclass(frozen=True)
class Means:
    """The mean of the keys and the mean of the queries."""

    factor: float = 1.0
    is_ordered: bool = False
    is_compact: bool = True
    takes_largest: bool = False

    @property
    def columns(self) -> int:
        return 1

    def of_keys(self, blocks: Tensor) -> Tensor:
        return blocks.mean(-2, keepdim=True)

    def of_prefixes(self, blocks: Tensor) -> Tensor:
        number = torch.arange(1, blocks.shape[-2] + 1, device=blocks.device)
        return blocks.cumsum(-2) / number[:, None]

    def of_queries(self, blocks: Tensor) -> Tensor:
        return blocks.mean(-2, keepdim=True)


@dataclass(frozen=True)
class Boxes:
    """The box around the keys: `Σ_d max(q_d hi_d, q_d lo_d)` is at least as large as the product with any key in it.

    Paper: https://arxiv.org/abs/2406.10774
    """

    columns: int = 1
    factor: float = 1.0
    is_ordered: bool = False
    is_compact: bool = True
    takes_largest: bool = False

    def of_keys(self, blocks: Tensor) -> Tensor:
        return torch.cat([blocks.amax(-2, keepdim=True), blocks.amin(-2, keepdim=True)], -1)

    def of_prefixes(self, blocks: Tensor) -> Tensor:
        return torch.cat([blocks.cummax(-2).values, blocks.cummin(-2).values], -1)

    def of_queries(self, blocks: Tensor) -> Tensor:
        mean = blocks.mean(-2, keepdim=True)
        return torch.cat([mean.clamp_min(0), mean.clamp_max(0)], -1)


@dataclass(frozen=True)
class Antidiagonals:
    """Sums along antidiagonals of `stride x stride` squares of the products: one product of vectors `stride` as long.

    Paper: https://arxiv.org/abs/2503.16428
    """

    block: int
    stride: int
    is_ordered: bool = True
    is_compact: bool = False
    takes_largest: bool = False

    @property
    def columns(self) -> int:
        return self.block // self.stride

    @property
    def factor(self) -> float:
        return 1.0 / self.stride

    def of_keys(self, blocks: Tensor) -> Tensor:
        columns: Tensor = blocks.unflatten(-2, (self.columns, self.stride)).flatten(-2)
        return columns

    def of_queries(self, blocks: Tensor) -> Tensor:
        rows: Tensor = blocks.unflatten(-2, (self.columns, self.stride)).flip(-2).flatten(-2)
        return rows


@dataclass(frozen=True, kw_only=True)
class OverlappingMeans(Means):
    """Means of `kernel` keys at every `stride`-th inside a block.

    Paper: https://arxiv.org/abs/2509.24663
    """

    block: int
    kernel: int
    stride: int
    takes_largest: bool = True

    @property
    def columns(self) -> int:
        return (self.block - self.kernel) // self.stride + 1

    def of_keys(self, blocks: Tensor) -> Tensor:
        return blocks.unfold(-2, self.kernel, self.stride).mean(-1)


@dataclass(frozen=True)
class Products:
    """The products themselves, of every query with every key: as much work as dense attention.

    Attributes:
        columns: tokens of a block.
    """

    columns: int
    factor: float = 1.0
    is_ordered: bool = True
    is_compact: bool = False
    takes_largest: bool = False

    def of_keys(self, blocks: Tensor) -> Tensor:
        return blocks

    def of_queries(self, blocks: Tensor) -> Tensor:
        return blocks


@dataclass(frozen=True)
class Rows:
    """Queries that choose, as a scorer sees them.

    Attributes:
        entries: `[B, KV, R, G, M, E]`.
        last: `[B, R]` int64, the last block of keys that they are scored against, below zero for none.
        own: `[B, KV, R, E]`, what stands for the part of their own block that they see, which is the one behind `last`;
            None where the last is their own.
        within: `[B, R]` int64, columns of their own block that they see, counted from 0, where each is a single query.
    """

    entries: Tensor
    last: Tensor
    own: Tensor | None = None
    within: Tensor | None = None


def block_shares(scorer: Scorer, rows: Rows, columns: Tensor, *, scaling: float, most: int, num_blocks: int) -> Tensor:
    """The share of the attention of some queries that each block of keys is thought to hold.

    Args:
        scorer: whose rows and columns they are.
        rows: the queries.
        columns: `[B, KV, n, C, E]` of the first n blocks; the others are seen by nobody, but for their own queries.
        scaling: the layer's factor on query-key products.
        most: blocks that the first of the R can see at most; each next one can see one more.
        num_blocks: how many there are in all, N.

    Returns:
        `[B, KV, R, N]`, nowhere negative; a row adds up to 1 at most, and to 0 where it sees nothing.
    """
    num_rows = rows.entries.shape[2]
    products = rows.entries[:, :, 0].numel() // rows.entries.shape[-1] * num_blocks * scorer.columns
    strip = max(1, MOST_PRODUCTS // max(products, 1))
    if strip >= num_rows:
        return _strip(scorer, rows, columns, scaling, num_blocks)
    shares = rows.entries.new_zeros(*rows.entries.shape[:3], num_blocks)
    for start in range(0, num_rows, strip):
        stop = min(start + strip, num_rows)
        seen = max(min(most + stop - 1, num_blocks), 0)
        part = Rows(
            rows.entries[:, :, start:stop],
            rows.last[:, start:stop],
            None if rows.own is None else rows.own[:, :, start:stop],
            None if rows.within is None else rows.within[:, start:stop],
        )
        shares[:, :, start:stop, :seen] = _strip(scorer, part, columns[:, :, :seen], scaling, seen)
    return shares


def _strip(scorer: Scorer, rows: Rows, columns: Tensor, scaling: float, num_blocks: int) -> Tensor:
    entries, last = rows.entries, rows.last
    groups, height = entries.shape[3:5]
    if not columns.shape[2]:
        # Something to take the largest of; `last` says that it is not seen.
        columns = F.pad(columns, (0, 0, 0, 0, 0, 1))
    number = torch.arange(columns.shape[2], device=last.device)
    # Shapes from here on: `[B, KV, R, G, M, N, C]`.
    visible = (number <= last[..., None])[:, None, :, None, None, :, None]
    if rows.own is None and scorer.is_ordered:
        row, column = (torch.arange(n, device=last.device) for n in (height, scorer.columns))
        row = row[:, None, None] if rows.within is None else rows.within[:, None, :, None, None, None, None]
        is_last = (number == last[..., None])[:, None, :, None, None, :, None]
        visible = visible & ~(is_last & (column > row))
    logits = entries.flatten(2, 4) @ columns.flatten(2, 3).transpose(-1, -2)
    logits = logits.unflatten(2, (-1, groups, height)).unflatten(-1, (-1, scorer.columns))
    factor = scaling * scorer.factor * LOG2E
    logits = (logits * factor).masked_fill(~visible, MASKED)
    # Clamped above MASKED: where nothing is visible every weight underflows to zero.
    peak = logits.amax((-1, -2)).clamp_min(MASKED / 1e10)
    own = None
    if rows.own is not None:
        own = (entries * rows.own[:, :, :, None, None]).sum(-1) * factor
        peak = torch.maximum(peak, own)
    weights: Tensor = (logits - peak[..., None, None]).exp2()
    total = weights.sum((-1, -2))[..., None]
    weights = weights.amax(-1) if scorer.takes_largest else weights.sum(-1)
    if own is None:
        alone: Tensor = weights / total.clamp_min(torch.finfo(total.dtype).tiny)
        return F.pad(alone.mean((3, 4)), (0, num_blocks - columns.shape[2]))
    of_own = (own - peak).exp2()[..., None]
    total = total + of_own
    shares = F.pad((weights / total).mean((3, 4)), (0, num_blocks - columns.shape[2]))
    at = (last + 1).clamp_max(num_blocks - 1)[:, None, :, None].expand(-1, shares.shape[1], -1, -1)
    whole: Tensor = shares.scatter(-1, at, (of_own / total).mean((3, 4)))
    return whole
