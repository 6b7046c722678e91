"""Products of rounded queries and keys, weighed against what the first and the nearest blocks get.

Letters in shapes: those of `canvas` and `scorers`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...window import LOG2E, MASKED
from .scorers import MOST_PRODUCTS

# Numbers on either side of zero that four bits hold.
STEPS = 7


def rounded(vectors: Tensor) -> Tensor:
    """`[..., D]`: each vector in four bits an entry, times a factor of its own."""
    largest = vectors.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    # In this order halves of a step are exact in every dtype that holds them, so that all round them alike.
    whole: Tensor = (vectors * STEPS / largest).round()
    return whole * (largest / STEPS)


def relative_scores(queries: Tensor, keys: Tensor, last: Tensor, near: Tensor, *, scaling: float) -> Tensor:
    """How much the best product in each block of keys weighs beside all those in the blocks that are near.

    Args:
        queries: `[B, KV, R, G, block, D]`.
        keys: `[B, KV, N, block, D]`.
        last: `[B, R]` int64, the block in which the queries stand, below zero for none.
        near: `[B, 1, R, N]` bool, up to `last`, which is among them.
        scaling: the layer's factor on query-key products.

    Returns:
        `[B, KV, R, N]` `max_ij exp(s q_i·k_j) / Σ_near exp(s q_i·k_n)` over the queries of all heads of a group, after
        rounding; zero behind `last`.
    """
    queries, keys = rounded(queries), rounded(keys)
    products = queries[:, :, 0].numel() // queries.shape[-1] * keys.shape[2] * keys.shape[3]
    strip = max(1, MOST_PRODUCTS // max(products, 1))
    parts = (slice(start, start + strip) for start in range(0, queries.shape[2], strip))
    return torch.cat([_scores_of_strip(queries[:, :, p], keys, last[:, p], near[:, :, p], scaling) for p in parts], 2)


def _scores_of_strip(queries: Tensor, keys: Tensor, last: Tensor, near: Tensor, scaling: float) -> Tensor:
    groups, block = queries.shape[3:5]
    number, at = (torch.arange(n, device=last.device) for n in keys.shape[2:4])
    # Shapes from here on: `[B, KV, R, G, M, N, C]`.
    logits = queries.flatten(2, 4) @ keys.flatten(2, 3).transpose(-1, -2) * (scaling * LOG2E)
    logits = logits.unflatten(2, (-1, groups, block)).unflatten(-1, (-1, block))
    last = last[:, None, :, None, None, None, None]
    ahead = (number[:, None] > last) | (number[:, None] == last) & (at > at[:, None, None])
    logits = logits.masked_fill(ahead, MASKED)
    best = logits.amax(-1)
    those = logits.masked_fill(~near[:, :, :, None, None, :, None], MASKED)
    peak = those.amax((-1, -2), keepdim=True).clamp_min(MASKED / 1e10)
    total = (those - peak).exp2().sum((-1, -2), keepdim=True).log2() + peak
    # Where nothing is near, nothing is seen at all.
    scores = (best - total[..., 0].clamp_min(MASKED / 1e10)).exp2()
    found: Tensor = scores.amax((3, 4)).masked_fill(number > last[:, :, :, 0, 0, :, 0], 0.0)
    return found


@dataclass(frozen=True)
class Above:
    """All blocks whose share, or score, is no less than a threshold.

    Attributes:
        threshold: that; 0 for all blocks.
    """

    threshold: float

    def keep(self, shares: Tensor, number: Tensor, forced: Tensor) -> Tensor:
        column = torch.arange(shares.shape[-1], device=shares.device)
        return (shares >= self.threshold) & (column <= number[:, None, :, None]) | forced

    def expected(self, number: Tensor) -> Tensor:
        # Among like keys all are as good as those that are near.
        return number + 1

    @property
    def telling_share(self) -> float:
        return 0.5
