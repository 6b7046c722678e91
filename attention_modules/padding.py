"""Keeping padding out: every row's real tokens are moved to the right end before any method looks at positions.

After that a window of the last `w` tokens holds real tokens only, wherever the padding stood (left, right, or between
the turns of a batched conversation), so that a padded row gives exactly the outputs of the row alone.
"""

import torch
from torch import Tensor


def right_align_order(valid: Tensor) -> Tensor:
    """Indices that put a row's padding first and its real tokens last, in their order.

    Args:
        valid: `[batch, seq]` bool, True = real token.

    Returns:
        `[batch, seq]` int64, usable with `take_tokens`.
    """
    return torch.argsort(valid.to(torch.uint8), dim=-1, stable=True)


def take_tokens(tensor: Tensor, order: Tensor) -> Tensor:
    """Reorder the sequence axis of `tensor` `[batch, heads, seq, dim]` by `order` `[batch, seq]`."""
    if len(order) == 1:
        # Whole vectors at a time, which is many times as fast.
        return tensor.index_select(2, order[0])
    index = order[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[-1])
    return tensor.gather(2, index)


def restore_tokens(tensor: Tensor, order: Tensor) -> Tensor:
    """Undo `take_tokens`: `tensor` `[batch, heads, seq, dim]` goes back to the order of before."""
    return take_tokens(tensor, torch.argsort(order, dim=-1))


def padding_before(valid: Tensor | None) -> Tensor | None:
    """Tokens of padding that each row begins with, `[batch]` int32, where all padding stands before real tokens."""
    return None if valid is None else (~valid).sum(-1, dtype=torch.int32)
