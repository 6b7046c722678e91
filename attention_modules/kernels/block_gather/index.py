"""Chosen blocks as the kernels read them: how far each row of choices goes, and who chose each block.

Letters in shapes: `B` rows, `KV` key/value heads, `R` blocks of queries, `K` choices of one, `N` blocks of keys.
"""

import torch
from torch import Tensor


def reach(indices: Tensor) -> Tensor:
    """Choices of each block of queries up to the last that is one: `[B, KV, R, K]` → `[B, KV, R]` int32."""
    place = torch.arange(1, indices.shape[-1] + 1, device=indices.device)
    return torch.where(indices >= 0, place, 0).amax(-1).to(torch.int32)


def readers_of(indices: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """The same choices from the other side.

    Args:
        indices: `[B, KV, R, K]`, -1 for none.
        num_blocks: how many blocks of keys there are, `N`.

    Returns:
        blocks of queries `[B * KV * R * K]` int32, those that chose the same block of keys side by side in their order;
        and where those of each block of keys begin, `[B * KV * N + 1]` int32.
    """
    batch, heads, rows, width = indices.shape
    total = batch * heads * num_blocks
    first = torch.arange(0, total, num_blocks, device=indices.device).view(batch, heads, 1, 1)
    is_chosen = (indices >= 0) & (indices < num_blocks)
    # What is no choice stands behind all others, so that no size depends on what was chosen.
    block, order = torch.where(is_chosen, indices + first, total).flatten().sort(stable=True)
    offsets = torch.searchsorted(block, torch.arange(total + 1, device=indices.device), out_int32=True)
    return (order // width % rows).to(torch.int32), offsets
