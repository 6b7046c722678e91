"""Exact tokens in slots that are written over in turn, so that a new token moves no other."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .growing import is_writable
from .padding import take_tokens
from .tokens import Tokens


@dataclass
class Ring:
    """The newest tokens of every row: its token number p stands in slot `p % slots`, and padding in none.

    Attributes:
        keys: `[batch, num_kv_heads, slots, head_dim]`.
        values: `[batch, num_kv_heads, slots, value_dim]`.
        count: `[batch]` int64, real tokens of every row since the ring began, those it began with included.
        held: tokens since then, padding included.
    """

    keys: Tensor
    values: Tensor
    count: Tensor
    held: int

    @classmethod
    def from_tail(cls, tokens: Tokens, slots: int) -> "Ring":
        """A ring that begins with some tokens.

        Args:
            tokens: fewer than `slots`, or none.
            slots: how many there are.
        """
        keys, values, valid = tokens.keys, tokens.values, tokens.valid
        batch, _, tail, _ = keys.shape
        count = torch.full((batch,), tail, device=keys.device) if valid is None else valid.sum(-1)
        at = torch.arange(tail, device=keys.device) - (tail - count)[:, None]
        # Padding goes to slots that are not read before they are written over.
        at = torch.where(at < 0, at + slots, at)[:, None, :, None]

        def spread(tensor: Tensor) -> Tensor:
            empty = tensor.new_zeros(*tensor.shape[:2], slots, tensor.shape[-1])
            return empty.scatter_(2, at.expand(tensor.shape), tensor)

        return cls(spread(keys), spread(values), count, tail)

    def to_tail(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and validity of all tokens but the one that the next takes the place of, oldest first."""
        slots = self.keys.shape[2]
        age = torch.arange(max(min(self.held, slots - 1), 0), 0, -1, device=self.count.device)
        at = (self.count[:, None] - age) % max(slots, 1)
        return take_tokens(self.keys, at), take_tokens(self.values, at), age <= self.count[:, None]

    @property
    def filled(self) -> Tensor:
        """`[batch, slots]` bool: which slots hold a token."""
        return torch.arange(self.keys.shape[2], device=self.count.device) < self.count[:, None]

    def fits(self, tokens: Tokens) -> bool:
        """Whether new tokens can be written, as precise as they are."""
        pairs = ((self.keys, tokens.keys), (self.values, tokens.values))
        return is_writable(self.count) and all(
            torch.promote_types(ours.dtype, new.dtype) == ours.dtype for ours, new in pairs
        )

    def put(self, tokens: Tokens) -> None:
        """Write a new token of every row; where it is not valid, nothing."""
        valid = tokens.valid
        at = (self.count % self.keys.shape[2])[:, None, None, None]
        for ours, new in ((self.keys, tokens.keys), (self.values, tokens.values)):
            index = at.expand(new.shape)
            if valid is not None:
                new = torch.where(valid[..., None, None], new, ours.gather(2, index))
            ours.scatter_(2, index, new.to(ours.dtype))
        self.advance(valid)

    def advance(self, valid: Tensor | None) -> None:
        """Count a new token of every row.

        Args:
            valid: `[batch, 1]` bool, rows whose token is real, or None when all are.
        """
        self.count += 1 if valid is None else valid[:, 0]
        self.held += 1

    def leaving(self, valid: Tensor | None) -> Tokens:
        """The token of every row whose place the next one takes; valid in rows that have such a one since now only.

        Args:
            valid: as for the latest token.
        """
        slots = self.keys.shape[2]
        at = (self.count % slots)[:, None]
        leaves = (self.count >= slots)[:, None]
        leaves = leaves if valid is None else leaves & valid
        return Tokens(take_tokens(self.keys, at), take_tokens(self.values, at), leaves)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Ring":
        """The ring with `function` applied to every tensor."""
        return Ring(function(self.keys), function(self.values), function(self.count), self.held)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that is held."""
        return self.keys, self.values, self.count
