"""Lines of an attention map: columns, which many queries look at, and diagonals, keys at one distance from each query.

Some queries, all next to one another, are looked at in full; what they see tells where the lines are, which are then
taken to go on for the queries behind them. Lines are found token by token and attended in whole blocks.

Letters in shapes: those of `canvas`, and `M` queries that are looked at.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .canvas import Canvas
from .selectors import TopMass


@dataclass(frozen=True)
class Lines:
    """What some queries of every row see, summed along lines and over the query heads that share keys.

    Attributes:
        columns: `[B, KV, S]` share of each key.
        diagonals: `[B, KV, S]` share of the keys at each distance, beginning with 0, the query's own.
    """

    columns: Tensor
    diagonals: Tensor


@dataclass(frozen=True)
class Witnesses:
    """Queries that are looked at in full.

    Attributes:
        queries: `[B, KV, G, M, D]`.
        position: `[B, M]` int64, where they stand in their row; below zero where there is none.
    """

    queries: Tensor
    position: Tensor

    @classmethod
    def before(cls, end: Tensor, queries: Tensor, canvas: Canvas, *, number: int) -> "Witnesses":
        """The queries before a position.

        Args:
            end: `[B]` int64, that position in each row.
            queries: `[B, heads, Q, D]`, the newest last.
            canvas: of the call.
            number: how many, M.
        """
        held = queries.shape[2]
        position = end[:, None] + torch.arange(-number, 0, device=end.device)
        at = (position + (held - canvas.count)[:, None]).clamp(0, held - 1)
        taken = queries.gather(2, at[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[-1]))
        return cls(taken.unflatten(1, (canvas.keys.shape[1], -1)), position)

    def lines(self, keys: Tensor, *, scaling: float) -> Lines:
        """What they see.

        Args:
            keys: `[B, KV, N, block, D]`, each at its position in the row.
            scaling: factor on query-key products.
        """
        keys = keys.flatten(2, 3)
        groups, number = self.queries.shape[2:4]
        behind = self.position[..., None] - torch.arange(keys.shape[2], device=keys.device)
        logits = (self.queries.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (groups, number)) * scaling
        weights = logits.masked_fill((behind < 0)[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        weights, behind = weights.mean(2) / number, behind[:, None].expand(-1, keys.shape[1], -1, -1)
        # Of each query the key at each distance, which is as far from it as the distance is from the key.
        shifted = weights.gather(-1, behind.clamp(0, keys.shape[2] - 1)).masked_fill(behind < 0, 0.0)
        return Lines(weights.sum(2), shifted.sum(2))

    def guess(self, keys: Tensor, *, scaling: float) -> Tensor:
        """`[B, KV, N]` share of each block by the mean of the queries and the means of keys, mean over query heads."""
        block = keys.shape[3]
        end = self.position[:, -1:] + 1
        held = (end - torch.arange(keys.shape[2], device=keys.device) * block).clamp(0, block)
        means = keys.sum(3) / held.clamp_min(1)[:, None, :, None]
        logits = self.queries.mean(3) @ means.transpose(-1, -2) * scaling
        weights = logits.masked_fill((held == 0)[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        return weights.mean(2)


@dataclass(frozen=True)
class StrongestLines:
    """The blocks with the strongest single columns, and those with the strongest single diagonals, so many of each.

    Attributes:
        columns: blocks of columns.
        diagonals: blocks of distances; queries of one block see each of them in two blocks of keys.

    Paper: https://arxiv.org/abs/2407.02490
    """

    columns: int
    diagonals: int

    def choose(self, lines: Lines, block: int) -> tuple[Tensor, Tensor]:
        """`[B, KV, N]` bool by blocks of columns, and by blocks of distances."""
        pairs = (lines.columns, self.columns), (lines.diagonals, self.diagonals)
        columns, diagonals = (_most(t.unflatten(-1, (-1, block)).amax(-1), number) for t, number in pairs)
        return columns, diagonals

    def keep(self, shares: Tensor, number: Tensor, forced: Tensor) -> Tensor:
        """As any selector, of shares that are 1 on chosen lines and 0 elsewhere."""
        column = torch.arange(shares.shape[-1], device=shares.device)
        return (shares > 0) & (column <= number[:, None, :, None]) | forced

    def expected(self, number: Tensor) -> Tensor:
        return torch.full_like(number, self.columns + 2 * self.diagonals + 1)

    @property
    def telling_share(self) -> float:
        return 0.5


def _most(shares: Tensor, number: int) -> Tensor:
    """The largest `number` shares above zero, as bool."""
    top = shares.topk(min(number, shares.shape[-1]), -1)
    return torch.zeros_like(shares, dtype=torch.bool).scatter(-1, top.indices, top.values > 0)


def covering_lines(lines: Lines, block: int, mass: float) -> tuple[Tensor, Tensor]:
    """The fewest blocks of columns, and of distances, that hold a share of the attention each.

    Returns:
        `[B, KV, N]` bool by blocks of columns, and by blocks of distances.

    Paper: https://arxiv.org/abs/2502.20766
    """
    shares = torch.stack([lines.columns, lines.diagonals], 2).unflatten(-1, (-1, block)).sum(-1)
    last = torch.full((len(shares), 1), shares.shape[-1] - 1, device=shares.device)
    columns, diagonals = TopMass(mass).keep(shares, last, torch.zeros_like(shares, dtype=torch.bool)).unbind(2)
    return columns, diagonals


def on_lines(columns: Tensor, diagonals: Tensor, number: Tensor) -> Tensor:
    """Which blocks lie on chosen lines.

    Args:
        columns: `[B, KV, N]` bool by blocks of columns.
        diagonals: `[B, KV, N]` bool by blocks of distances.
        number: `[B, R]` int64, the blocks of the queries.

    Returns:
        `[B, KV, R, N]` bool.
    """
    # Keys at a distance lie in the block that is as many whole blocks back, and in the one before it.
    reached = diagonals.clone()
    reached[..., 1:] |= diagonals[..., :-1]
    back = number[..., None] - torch.arange(columns.shape[-1], device=number.device)
    back = back[:, None].expand(-1, columns.shape[1], -1, -1)
    rows = reached[:, :, None].expand(-1, -1, back.shape[2], -1)
    return columns[:, :, None] | rows.gather(-1, back.clamp_min(0)) & (back >= 0)


def square_root_divergence(first: Tensor, second: Tensor) -> Tensor:
    """`√JSD` of distributions in the last axis, with natural logarithms."""
    middle = (first + second) / 2
    # Nothing in either is nothing.
    middle = middle.clamp_min(torch.finfo(middle.dtype).tiny)
    both = torch.special.xlogy(first, first / middle), torch.special.xlogy(second, second / middle)
    divergence: Tensor = 0.5 * (both[0].sum(-1) + both[1].sum(-1))
    return divergence.clamp_min(0).sqrt()
