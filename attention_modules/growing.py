"""Tensors that tokens are added to in place, so that a new one does not copy all before it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .padding import take_tokens

# Room is doubled up to so many tokens, and grows by a thirty-second from where that is more.
MOST_SPARE, SPARE_PART = 1024, 32

Summarize = Callable[[Tensor], Tensor]


def token_axis(tensor: Tensor) -> int:
    """Where the tokens are counted: validity and places have neither heads nor channels."""
    return 2 if tensor.ndim == 4 else 1


class Room:
    """Buffers with room behind the tokens that stand in them, by name."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held, spare room included."""
        return tuple(self.buffers.values())

    def extend(self, held: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
        """Views of all tokens, old and new.

        Args:
            held: the old ones, which stand at the start of the buffers if there are any.
            fresh: those behind them, as many in each tensor.
        """
        length, new = held["keys"].shape[2], fresh["keys"].shape[2]
        if not self._fits(fresh, length + new):
            spare = min(length + new, max(MOST_SPARE, (length + new) // SPARE_PART))
            self.buffers = {name: _with_room(held[name], part, length + new + spare) for name, part in fresh.items()}
        for name, part in fresh.items():
            self.buffers[name].narrow(token_axis(part), length, new).copy_(part)
        return {name: t.narrow(token_axis(t), 0, length + new) for name, t in self.buffers.items()}

    def _fits(self, fresh: dict[str, Tensor], needed: int) -> bool:
        return self.buffers.keys() == fresh.keys() and all(
            is_writable(ours)
            and ours.shape[token_axis(ours)] >= needed
            and torch.promote_types(ours.dtype, fresh[name].dtype) == ours.dtype
            for name, ours in self.buffers.items()
        )


def is_writable(tensor: Tensor) -> bool:
    """Whether a tensor may change in place: one made in inference mode may not outside of it."""
    # A compiler cannot ask, and marks no tensors.
    is_unmarked = torch.compiler.is_compiling() or not tensor.is_inference()
    return is_unmarked or torch.is_inference_mode_enabled()


def _same(one: Tensor, other: Tensor) -> bool:
    return not torch.compiler.is_compiling() and bool(torch.equal(one, other))


def _with_room(held: Tensor, part: Tensor, capacity: int) -> Tensor:
    axis, dtype = token_axis(held), torch.promote_types(held.dtype, part.dtype)
    shape = list(held.shape)
    shape[axis] = capacity
    buffer = held.new_zeros(shape, dtype=dtype)
    buffer.narrow(axis, 0, held.shape[axis]).copy_(held)
    return buffer


@dataclass
class Summaries:
    """What stands for blocks of a row's real tokens, counted from its first, each computed once its block is whole.

    Attributes:
        blocks: `[batch, heads, capacity, entries]`.
        count: `[batch]` int64, real tokens of every row that were there when it was brought up to date.
        pending: at most so many tokens of a row came since.
    """

    blocks: Tensor
    count: Tensor
    pending: int

    @classmethod
    def empty(cls, keys: Tensor) -> "Summaries":
        """None of the tokens `[batch, heads, S, dim]` are summed up yet."""
        nothing = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
        return cls(keys.new_zeros(*keys.shape[:2], 0, 1), nothing, keys.shape[2])

    def update(self, keys: Tensor, count: Tensor, size: int, summarize: Summarize) -> Tensor:
        """Sum up the blocks that became whole.

        Args:
            keys: `[batch, heads, S, dim]`, padding before real tokens.
            count: `[batch]` int64, how many of them are real.
            size: tokens of a block, the same each time.
            summarize: `[batch, heads, blocks, size, dim]` → `[batch, heads, blocks, entries]`.

        Returns:
            `[batch, heads, S // size, entries]`; of a row with n real tokens the first `n // size` stand for something.
        """
        length = keys.shape[2]
        number, width = length // size, self.pending // size + 1
        is_there = self.blocks.shape[2] > number and self.blocks.shape[3] > 1 and is_writable(self.blocks)
        if width == 1 and is_there and count.device.type == "cpu" and _same(count // size, self.count // size):
            # No block became whole, and nobody waits for the answer.
            return self.blocks[:, :, :number]
        first = self.count // size
        columns = first[:, None] + torch.arange(width, device=keys.device)
        at = (columns * size)[..., None] + torch.arange(size, device=keys.device)
        places = (at.flatten(1) + (length - count)[:, None]).clamp(0, length - 1)
        fresh = summarize(take_tokens(keys, places).unflatten(2, (width, size)))
        self._make_room(fresh, number)
        # What is not whole yet goes behind the last block, where nobody looks.
        slots = torch.where((columns + 1) * size <= count[:, None], columns, self.blocks.shape[2] - 1)
        rows, heads = (torch.arange(n, device=keys.device) for n in fresh.shape[:2])
        self.blocks.index_put_((rows[:, None, None], heads[:, None], slots[:, None]), fresh.to(self.blocks.dtype))
        self.count, self.pending = count.clone(), 0
        return self.blocks[:, :, :number]

    def _make_room(self, fresh: Tensor, number: int) -> None:
        held = self.blocks.shape[2]
        if held > number and is_writable(self.blocks):
            return
        grown = fresh.new_zeros(*fresh.shape[:2], max(number + 1, min(2 * held, held + MOST_SPARE)), fresh.shape[3])
        if held > 1:
            grown[:, :, : held - 1] = self.blocks[:, :, :-1]
        self.blocks = grown

    def taken_back(self, count: Tensor) -> None:
        """Only `count` `[batch]` real tokens are left."""
        self.count = torch.minimum(self.count, count)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Summaries":
        """The same with `function` applied to every tensor."""
        return Summaries(function(self.blocks), function(self.count), self.pending)
