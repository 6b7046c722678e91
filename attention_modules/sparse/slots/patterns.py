"""Patterns that look at no key: which blocks are attended follows from where they stand.

Each is a selector whose shares nobody asks for. Letters in shapes: those of `canvas`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def _distance(number: Tensor, num_blocks: int) -> Tensor:
    """`[B, 1, R, N]` blocks between each own block and each other one, below zero behind it."""
    return number[:, None, :, None] - torch.arange(num_blocks, device=number.device)


@dataclass(frozen=True)
class Strided:
    """Every `stride`-th block, counted back from the own one or from the row's first.

    Attributes:
        stride: blocks from one to the next.
        offset_by_head: whether each KV head begins at another block, so that together they see all.
    """

    stride: int
    offset_by_head: bool = False

    def keep(self, shares: Tensor, number: Tensor, forced: Tensor) -> Tensor:
        distance = _distance(number, shares.shape[-1])
        shift = torch.arange(shares.shape[1], device=number.device)[:, None, None] if self.offset_by_head else 0
        kept = ((distance - shift) % self.stride == 0) & (distance >= 0)
        return (kept | forced).expand(shares.shape)

    def expected(self, number: Tensor) -> Tensor:
        return number // self.stride + 1 + int(self.offset_by_head)

    @property
    def telling_share(self) -> float:
        return 0.5


@dataclass(frozen=True)
class Powers:
    """Blocks at distances of powers of two: in L layers a token reaches 2^L blocks.

    Paper: https://arxiv.org/abs/2503.03588
    """

    def keep(self, shares: Tensor, number: Tensor, forced: Tensor) -> Tensor:
        distance = _distance(number, shares.shape[-1])
        # A power of two has one bit.
        kept = (distance > 0) & ((distance & (distance - 1)) == 0)
        return (kept | forced).expand(shares.shape)

    def expected(self, number: Tensor) -> Tensor:
        return (number + 1).double().log2().ceil().long() + 2

    @property
    def telling_share(self) -> float:
        return 0.5


@dataclass(frozen=True)
class Scattered:
    """So many blocks for each block of queries by chance, the same whenever one asks.

    Attributes:
        blocks: how many, fewer where two fall together.
        seed: of the chance.
    """

    blocks: int
    seed: int = 0

    def keep(self, shares: Tensor, number: Tensor, forced: Tensor) -> Tensor:
        heads, num_blocks = shares.shape[1], shares.shape[-1]
        head = torch.arange(heads, device=number.device)[:, None]
        kept = torch.zeros(len(number), heads, number.shape[1], num_blocks, dtype=torch.bool, device=number.device)
        for draw in range(self.blocks):
            mixed = _mixed(number[:, None] * 8191 + head * 131 + draw * 31 + self.seed)
            kept = kept.scatter(-1, (mixed % (number[:, None] + 1))[..., None], True)
        return kept | forced

    def expected(self, number: Tensor) -> Tensor:
        return torch.full_like(number, self.blocks + 1)

    @property
    def telling_share(self) -> float:
        return 0.5


def _mixed(number: Tensor) -> Tensor:
    """Whole numbers without a pattern, none below zero: steps of an integer hash in 31 bits."""
    mask = (1 << 31) - 1
    for factor in (0x45D9F3B, 0x119DE1F3):
        number = ((number ^ (number >> 16)) * factor) & mask
    return number ^ (number >> 16)


@dataclass(frozen=True)
class Spans:
    """For each KV head the newest blocks, more of them the longer the row is.

    Attributes:
        base: `α` of each KV head, in tokens.
        growth: `β` of each: the head looks back `α + β·n` tokens at the n-th token.
        block: tokens of a block.

    Paper: https://arxiv.org/abs/2406.14909
    """

    base: tuple[float, ...]
    growth: tuple[float, ...]
    block: int

    def blocks_at(self, number: Tensor) -> Tensor:
        """`[..., KV]` blocks that each head attends of queries in a block, its own included."""
        base, growth = (torch.tensor(t, device=number.device, dtype=torch.float64) for t in (self.base, self.growth))
        # Counted from the block's beginning, so that all its queries see the same.
        tokens = base + growth * (number[..., None] * self.block)
        return (tokens / self.block).ceil().long().clamp_min(1)

    def keep(self, shares: Tensor, number: Tensor, forced: Tensor) -> Tensor:
        distance = _distance(number, shares.shape[-1])
        seen = self.blocks_at(number).permute(0, 2, 1)[..., None]
        return (distance >= 0) & (distance < seen) | forced

    def expected(self, number: Tensor) -> Tensor:
        return self.blocks_at(number).double().mean(-1).ceil().long()

    @property
    def telling_share(self) -> float:
        return 0.5

    def share_at(self, length: int) -> float:
        """Share of the pairs of a row of so many tokens that is attended, mean over heads."""
        number = torch.arange(math.ceil(length / self.block))
        seen = torch.minimum(self.blocks_at(number), number[:, None] + 1)
        return float(seen.double().mean(1).sum() / (number + 1).sum())
