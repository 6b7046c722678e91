"""What a method remembers between calls: a short tail of exact tokens and fixed-size accumulators in fp32."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .padding import right_align_order, take_tokens
from .ring import Ring
from .tokens import Tokens

# What the state knows of a token besides the method's signals.
OWN = ("keys", "values", "valid", "positions", "arrival")


class Mixed(NamedTuple):
    """A mixture of values beside what a method knows by then of its next memory, so that no key is mapped twice.

    Attributes:
        out: `[batch, num_heads, T, value_dim]`.
        memory: accumulators behind the oldest `folded` keys of the call, those given to it included, in fp32 or fp64;
            where kernels ran in bf16 or fp16, what they add up was rounded to it.
        folded: number of these keys, padding and tokens of earlier calls counted.
    """

    out: Tensor
    memory: dict[str, Tensor]
    folded: int


class AttentionState:
    """The memory of one layer for a batch of sequences.

    The tail holds the newest keys and values in the dtype they came in, right-aligned: a row's padding always stands
    before its real tokens. Everything older lives in `memory`, named tensors `[batch, ...]` that the method owns.
    While tokens come one by one, a ring that is written in place stands for the tail; whatever else is asked of the
    state turns it into one again.

    Attributes:
        seen: tokens that went in so far, padding included.
        memory: the method's accumulators; empty until the first token leaves the tail.
        record_past: keep all tokens since the last `crop` in the tail, so that the next one can take them back exactly.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.record_past = False
        self.memory: dict[str, Tensor] = {}
        self._tail: dict[str, Tensor] = {}
        self._ring: Ring | None = None
        self._recorded = 0
        # Newest tokens that can be taken back with the tail staying as long as the method needs it.
        self._recoverable = 0
        self._padded = False

    @property
    def tail_length(self) -> int:
        """Tokens held exactly, padding included."""
        if self._ring is not None:
            return max(min(self._ring.held, self._ring.keys.shape[2] - 1), 0)
        return self._tail["keys"].shape[2] if self._tail else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        ring = () if self._ring is None else self._ring.tensors
        return sum(t.numel() * t.element_size() for t in (*self._tail.values(), *ring, *self.memory.values()))

    def append(self, tokens: Tokens) -> Tokens:
        """Add new tokens behind the tail and return the whole tail.

        Args:
            tokens: the new ones, in any order of padding and real tokens.

        Returns:
            all tokens held, padding before real ones.

        Raises:
            ValueError: they are of another number of sequences than the state.
        """
        self._straighten()
        batch, new = tokens.keys.shape[0], tokens.length
        self._check_batch(batch)
        arrival = torch.arange(self.seen, self.seen + new, device=tokens.keys.device).expand(batch, -1)
        fresh = {"keys": tokens.keys, "values": tokens.values, "valid": tokens.real, "arrival": arrival}
        fresh |= tokens.signals if tokens.positions is None else {**tokens.signals, "positions": tokens.positions}
        if self._tail:
            fresh = {name: torch.cat([self._tail[name], part], _axis(part)) for name, part in fresh.items()}
        self._padded = self._padded or tokens.valid is not None
        self._tail = _aligned(fresh) if self._padded else fresh
        self.seen += new
        self._recorded = self._recorded + new if self.record_past else 0
        self._recoverable += new
        return self._parts(self._tail)

    def ring(self, slots: int, tokens: Tokens) -> Ring:
        """Go over to what one new token of every row changes in place: a ring, and accumulators of the state's own.

        The token counts as seen; putting it into the ring is left to the caller. It cannot be taken back.

        Args:
            slots: tokens that the ring has room for, more than the tail holds; 0 if the method keeps no exact tokens.
            tokens: the new one of every row.
        """
        self._check_batch(tokens.keys.shape[0])
        if self._ring is None or not self._ring.fits(tokens):
            self._straighten()
            old = self._parts(self._tail) if self._tail else tokens.part(0, 0)
            keys, values = (
                t.to(torch.promote_types(t.dtype, new.dtype))
                for t, new in ((old.keys, tokens.keys), (old.values, tokens.values))
            )
            self._ring, self._tail = Ring.from_tail(Tokens(keys, values, old.valid), slots), {}
            self.memory = {name: t.clone(memory_format=torch.contiguous_format) for name, t in self.memory.items()}
        self._padded = self._padded or tokens.valid is not None
        self.seen += 1
        self._recorded = self._recoverable = 0
        return self._ring

    def _straighten(self) -> None:
        """Turn the ring into a tail."""
        if self._ring is None:
            return
        keys, values, valid = self._ring.to_tail()
        # Older than all that can be taken back.
        arrival = torch.full_like(valid, -1, dtype=torch.int64)
        self._tail = {"keys": keys, "values": values, "valid": valid, "arrival": arrival}
        self._ring = None

    def _check_batch(self, batch: int) -> None:
        held = self._tail["keys"] if self._tail else None if self._ring is None else self._ring.keys
        if held is not None and held.shape[0] != batch:
            raise ValueError(f"the state holds {held.shape[0]} sequences, but {batch} came in")

    def _parts(self, tail: dict[str, Tensor]) -> Tokens:
        signals = {name: t for name, t in tail.items() if name not in OWN}
        valid = tail["valid"] if self._padded else None
        return Tokens(tail["keys"], tail["values"], valid, tail.get("positions"), signals)

    def evict(self, keep: int) -> Tokens | None:
        """Take everything but the last `keep` tokens out of the tail.

        With `record_past` the tokens since the last `crop` stay too.

        Returns:
            the tokens that left, oldest first, or None if nothing left.
        """
        needed, keep = keep, keep + (self._recorded if self.record_past else 0)
        leaving = self.tail_length - keep
        if leaving <= 0:
            return None
        self._recoverable = min(self._recoverable, keep - needed)
        self._straighten()
        gone = {name: t.narrow(_axis(t), 0, leaving) for name, t in self._tail.items()}
        # A copy, so that the evicted tokens' storage is really given back.
        self._tail = {name: t.narrow(_axis(t), leaving, keep).clone() for name, t in self._tail.items()}
        return self._parts(gone)

    def crop(self, num_tokens: int) -> None:
        """Forget the newest `num_tokens` tokens.

        Raises:
            ValueError: the state before them cannot be had again, for they or tokens that would be among the newest
                without them went into the accumulators; set `record_past` before the call that adds tokens which may
                be taken back.
        """
        self._recorded = 0
        if num_tokens <= 0:
            return
        if num_tokens > self._recoverable:
            raise ValueError(
                f"cannot take back {num_tokens} tokens: only {self._recoverable} can be taken back exactly; "
                "set record_past before the call that adds them"
            )
        self.seen -= num_tokens
        self._recoverable -= num_tokens
        if self._padded:
            self._tail["valid"] = self._tail["valid"] & (self._tail["arrival"] < self.seen)
            self._tail = _aligned(self._tail)
            # Rows that took back padding still have old tokens in front; what is free in every row leaves with `evict`.
            kept = min(self.tail_length, self.seen)
            start = self.tail_length - kept
        else:
            kept, start = self.tail_length - num_tokens, 0
        self._tail = {name: t.narrow(_axis(t), start, kept) for name, t in self._tail.items()}

    def reset(self) -> None:
        """Forget everything."""
        self.seen = self._recorded = self._recoverable = 0
        self.memory, self._tail, self._ring = {}, {}, None
        self._padded = False

    def reorder(self, index: Tensor) -> None:
        """Make row `b` a copy of row `index[b]`, for beam search or batch selection."""
        self.map(lambda t: t.index_select(0, index.to(t.device)))

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times, neighbours together."""
        self.map(lambda t: t.repeat_interleave(repeats, 0))

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to every tensor held, for moves between devices."""
        self._tail = {name: function(t) for name, t in self._tail.items()}
        self._ring = None if self._ring is None else self._ring.map(function)
        self.memory = {name: function(t) for name, t in self.memory.items()}


def _axis(tensor: Tensor) -> int:
    """Where the tokens are counted: validity and places have neither heads nor channels."""
    return 2 if tensor.ndim == 4 else 1


def _aligned(tail: dict[str, Tensor]) -> dict[str, Tensor]:
    order = right_align_order(tail["valid"])
    return {name: take_tokens(t, order) if _axis(t) == 2 else t.gather(1, order) for name, t in tail.items()}
