"""Which blocks are attended, out of their shares: by number, by mass, or by a pattern that looks at nothing.

Letters in shapes: those of `canvas`; `R` are blocks of queries, or queries.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Forced:
    """Blocks that are attended whatever their shares.

    Attributes:
        sinks: first blocks of the row.
        local: blocks before the own one, which is always attended.
    """

    sinks: int = 1
    local: int = 0

    def of(self, number: Tensor, num_blocks: int) -> Tensor:
        """`[B, 1, R, N]` bool for queries in the blocks `number` `[B, R]`."""
        number = number[:, None, :, None]
        column = torch.arange(num_blocks, device=number.device)
        return ((column < self.sinks) | (number - column <= self.local)) & (column <= number)

    def number_of(self, number: Tensor) -> Tensor:
        """How many they are of queries in the blocks `number`."""
        return torch.minimum(number + 1, number.clamp(0, self.local) + 1 + (number - self.local).clamp(0, self.sinks))


class Selector(Protocol):
    """What chooses."""

    def keep(self, shares: Tensor, number: Tensor, forced: Tensor) -> Tensor:
        """Choose.

        Args:
            shares: `[B, KV, R, N]`, nowhere negative.
            number: `[B, R]` int64, the block in which the queries stand.
            forced: `[B, 1, R, N]` bool, blocks that are attended anyway and count as chosen.

        Returns:
            `[B, KV, R, N]` bool, none behind `number`, the forced ones among them.
        """

    def expected(self, number: Tensor) -> Tensor:
        """About how many blocks queries in the blocks `number` attend, where no key is better than another."""

    @property
    def telling_share(self) -> float:
        """See `AttentionContract.telling_share`."""


@dataclass(frozen=True)
class TopBlocks:
    """The blocks with the largest shares, so many in all.

    Attributes:
        blocks: how many, forced ones included; None where `density` says it.
        density: share of a row's query-key pairs that is attended, its own block's included.
    """

    blocks: int | None = None
    density: float = 1.0

    def number_at(self, number: Tensor) -> Tensor:
        """How many are attended by queries in a block, its own included.

        With a density, so many more in each block that the blocks up to it have that share of all pairs; half of the
        pairs in an own block are of later tokens.
        """
        if self.blocks is not None:
            return torch.full_like(number, self.blocks)
        return (_pairs(number + 1, self.density) - _pairs(number, self.density)).clamp_min(1)

    def number_in(self, number: int) -> int:
        """The same for one block."""
        return int(self.number_at(torch.tensor(number))) if self.blocks is None else self.blocks

    def expected(self, number: Tensor) -> Tensor:
        return self.number_at(number)

    @property
    def telling_share(self) -> float:
        return 0.5

    def most(self, num_blocks: int) -> int:
        """The largest number among so many blocks."""
        return num_blocks if self.blocks is None else min(self.blocks, num_blocks)

    def keep(self, shares: Tensor, number: Tensor, forced: Tensor) -> Tensor:
        num_blocks = shares.shape[-1]
        column = torch.arange(num_blocks, device=shares.device)
        visible = column <= number[:, None, :, None]
        # Forced ones first, whatever their shares, which are at most 1.
        ranked = shares.masked_fill(forced, 2.0).masked_fill(~visible, -1.0)
        best = ranked.topk(self.most(num_blocks), -1).values
        wanted = self.number_at(number)[:, None, :, None].clamp_max(best.shape[-1])
        least = best.gather(-1, (wanted - 1).expand(-1, best.shape[1], -1, -1))
        # Of equal ones the first, whatever stands behind them.
        above, equal = ranked > least, ranked == least
        kept = above | equal & (equal.cumsum(-1) <= wanted - above.sum(-1, keepdim=True))
        return kept & visible | forced


def _pairs(blocks: Tensor, density: float) -> Tensor:
    """Whole blocks' worth of pairs that so many blocks of queries attend at a density."""
    return (0.5 * blocks + density * 0.5 * blocks.square()).round().long()


@dataclass(frozen=True)
class TopMass:
    """As few blocks as hold a share of the mass: where attention is spread out more of them, elsewhere few.

    Attributes:
        mass: that share.
        of_rest: whether blocks that are attended anyway stay out of the account.
    """

    mass: float
    of_rest: bool = False

    def expected(self, number: Tensor) -> Tensor:
        # Of those before the own one, which is attended anyway.
        return (self.mass * number).ceil().long() + 1

    @property
    def telling_share(self) -> float:
        # Blocks are rounded up, and those that are attended anyway come on top.
        return 0.6 * (1 - self.mass)

    def keep(self, shares: Tensor, number: Tensor, forced: Tensor) -> Tensor:
        column = torch.arange(shares.shape[-1], device=shares.device)
        visible = column <= number[:, None, :, None]
        if self.mass >= 1:
            # All of it, whatever rounding makes of the sum.
            return (visible | forced).expand(shares.shape)
        counted = shares.masked_fill(~visible | forced if self.of_rest else ~visible, 0.0)
        counted = counted / counted.sum(-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
        sorted_shares, order = counted.sort(dim=-1, descending=True, stable=True)
        before = sorted_shares.cumsum(-1) - sorted_shares
        needed = (before < self.mass) & (sorted_shares > 0)
        return torch.zeros_like(needed).scatter(-1, order, needed) & visible | forced


def indices_of(keep: Tensor, number: Tensor, width: int) -> Tensor:
    """Chosen blocks as numbers, as transformers' own sparse models hand them on, but for the order.

    Args:
        keep: `[B, KV, R, N]` bool.
        number: `[B, R]` int64, the own block of the queries, which is among them.
        width: at least as many as any row has.

    Returns:
        `[B, KV, R, width]` int64: the own block first, the others in their order, then -1.
    """
    num_blocks = keep.shape[-1]
    column = torch.arange(num_blocks, device=keep.device)
    own = number[:, None, :, None]
    rank = torch.where(keep, torch.where(column == own, -1, column), num_blocks)
    rank = rank.sort(-1).values[..., :width]
    return torch.where(rank < 0, own, torch.where(rank < num_blocks, rank, -1))
