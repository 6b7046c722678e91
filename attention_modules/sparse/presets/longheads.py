"""LongHeads: each token chooses chunks by what the attention inside a chunk makes of its keys."""

from dataclasses import dataclass

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...registry import register
from ..base import SparseAttention
from ..options import BlockOptions
from ..slots.scorers import Means
from ..slots.selectors import TopBlocks
from ..slots.slots import Slots


class LongHeadsOptions(BlockOptions):
    """Options of `longheads`.

    Attributes:
        block: tokens of a chunk.
        local_blocks: chunks before a token's own one that are always attended; the own one always is.
        blocks: chunks that each token attends, its own, the first and the local ones included.
    """

    block: int = Field(256, ge=1)
    local_blocks: int = Field(1, ge=0)
    blocks: int = Field(16, ge=1)


@dataclass(frozen=True, kw_only=True)
class PooledKeys(Means):
    """Keys of a block, weighed by the query that attention among them makes, mean over the block.

    A block that is not whole, which is attended anyway, is known by the mean of its keys.

    Attributes:
        scaling: factor on products of keys.

    Paper: https://arxiv.org/abs/2402.10685
    """

    scaling: float

    def of_keys(self, blocks: Tensor) -> Tensor:
        # Fused kernels are for tensors of four axes.
        keys = blocks.flatten(0, -3)[None]
        mixed = F.scaled_dot_product_attention(keys, keys, keys, scale=self.scaling)
        query = mixed.mean(-2, keepdim=True)
        pooled = F.scaled_dot_product_attention(query, keys, keys, scale=self.scaling)
        return pooled.view(*blocks.shape[:-2], 1, blocks.shape[-1])


@register(
    name="longheads",
    options=LongHeadsOptions,
    paper="https://arxiv.org/abs/2402.10685",
    summary="chunks by a mean of their keys, weighed by attention inside them, with the first and the last ones",
)
class LongHeadsAttention(SparseAttention):
    """Chunks with the largest `q · c`, `c = softmax(s f Kᵀ) K`, where f is the mean of `softmax(s K Kᵀ) K`, s = 1/√d.

    As published f is made of the queries and values of a chunk; here keys stand for both, so that a chunk is known by
    its keys alone. Published for more tokens than a model was trained on, with positions counted anew among the chosen
    ones; here they stay what they are.

    Paper: https://arxiv.org/abs/2402.10685
    """

    options: LongHeadsOptions

    def make_slots(self) -> Slots:
        scorer = PooledKeys(scaling=self.geometry.head_dim**-0.5)
        return self.options.slots(scorer=scorer, selector=TopBlocks(blocks=self.options.blocks), by="token")
