"""Blocks found by halving: of each stretch of keys one token is looked at, and the best stretches are halved again.

Letters in shapes: those of `canvas`, and `M` queries of a block, `K` stretches that are kept.
"""

import torch
from torch import Tensor


def tree_shares(queries: Tensor, keys: Tensor, number: Tensor, *, kept: int, scaling: float) -> Tensor:
    """Shares of the blocks before the queries' own ones that are left when stretches are single blocks.

    Each block of queries begins with `kept` stretches, as like in length as can be. Each is halved, the middle token of
    each half stands for it by its largest product with any of the queries, and the best `kept` halves go on.

    Args:
        queries: `[B, KV, R, G, M, D]`.
        keys: `[B, KV, N, block, D]`.
        number: `[B, R]` int64, the blocks in which the queries stand; what they choose from lies before them.
        kept: stretches that go on, K.
        scaling: factor on query-key products.

    Returns:
        `[B, KV, R, N]`; zero for blocks that are not left.

    Paper: https://arxiv.org/abs/2406.09827
    """
    blocks = keys.shape[2]
    edge = torch.arange(kept + 1, device=number.device) * number[..., None] // kept
    shape = *keys.shape[:2], number.shape[1], kept
    first, last = (t[:, None].expand(shape) for t in (edge[..., :-1], edge[..., 1:]))
    # Stretches of each size become blocks in as many steps as the longest takes, and are looked at once at least.
    for _ in range(max(1, (-(-blocks // kept) - 1).bit_length())):
        middle = (first + last + 1) // 2
        first, last = torch.cat([first, middle], -1), torch.cat([middle, last], -1)
        scores = _scores(queries, keys, first, last, scaling)
        scores, best = scores.topk(kept, -1)
        first, last = (t.gather(-1, best) for t in (first, last))
    weights = scores.softmax(-1).nan_to_num(0.0).masked_fill(last - first != 1, 0.0)
    shares = weights.new_zeros(*shape[:3], blocks)
    return shares.scatter_add(-1, first.clamp_max(blocks - 1), weights)


def _scores(queries: Tensor, keys: Tensor, first: Tensor, last: Tensor, scaling: float) -> Tensor:
    """`[B, KV, R, any]` of stretches from one block to another; `-inf` for those without any."""
    block, count = keys.shape[3], first.shape[-1]
    flat = keys.flatten(2, 3)
    middle = ((first + last) * block // 2).clamp_max(flat.shape[2] - 1).flatten(2)
    near = flat.gather(2, middle[..., None].expand(-1, -1, -1, flat.shape[-1])).unflatten(2, (-1, count))
    products = queries.flatten(3, 4) @ near.transpose(-1, -2) * scaling
    best: Tensor = products.unflatten(3, queries.shape[3:5]).amax(4).mean(3)
    return best.masked_fill(first >= last, -torch.inf)
