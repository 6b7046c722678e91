"""What a method remembers between calls: a short tail of exact tokens and fixed-size accumulators in fp32."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .growing import Room, Summaries, Summarize, token_axis
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
    state turns it into one again. Where nothing ever leaves the tail it stands in buffers with room behind it, which
    new tokens are written into, so that what `append` gives is good until the next call; summaries of its blocks may
    stand beside it.

    Attributes:
        seen: tokens that went in so far, padding included.
        memory: the method's accumulators; empty until the first token leaves the tail.
        record_past: keep all tokens since the last `crop` in the tail, so that the next one can take them back exactly.

    Args:
        grows: whether no token ever leaves the tail.
    """

    def __init__(self, *, grows: bool = False) -> None:
        self.seen = 0
        self.record_past = False
        self.memory: dict[str, Tensor] = {}
        self._tail: dict[str, Tensor] = {}
        self._ring: Ring | None = None
        self._room = Room() if grows else None
        self._summaries: dict[str, Summaries] = {}
        # What the module projected, as far as the method still reads it; see `projections`.
        self._projections: AttentionState | None = None
        # Its newest queries, likewise; see `queries`.
        self._queries: AttentionState | None = None
        self._recorded = 0
        # Newest tokens that can be taken back with the tail staying as long as the method needs it.
        self._recoverable = 0
        self._padded = False
        # `[batch, seen]`: which tokens were real, as far as somebody counts; see `note_real`.
        self._real: Tensor | None = None

    @property
    def tail_length(self) -> int:
        """Tokens held exactly, padding included."""
        if self._ring is not None:
            return max(min(self._ring.held, self._ring.keys.shape[2] - 1), 0)
        return self._tail["keys"].shape[2] if self._tail else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, room for more tokens included."""
        tail = self._room.tensors if self._room is not None and self._room.buffers else tuple(self._tail.values())
        ring = () if self._ring is None else self._ring.tensors
        beside = [t for s in self._summaries.values() for t in (s.blocks, s.count)]
        own: int = sum(t.numel() * t.element_size() for t in (*tail, *ring, *beside, *self.memory.values()))
        return own + sum(other.nbytes for other in self._beside)

    @property
    def _beside(self) -> "list[AttentionState]":
        return [state for state in (self._projections, self._queries) if state is not None]

    @property
    def recoverable(self) -> int:
        """Newest tokens that `crop` can take back."""
        return min([self._recoverable, *(other.recoverable for other in self._beside)])

    @property
    def projections(self) -> "AttentionState":
        """A state beside this one for what the module projected; whatever happens to this one happens to it too."""
        if self._projections is None:
            self._projections = AttentionState()
        self._projections.record_past = self.record_past
        return self._projections

    @property
    def queries(self) -> "AttentionState":
        """A state beside this one for the newest queries, in the place of keys; likewise."""
        if self._queries is None:
            self._queries = AttentionState(grows=True)
        self._queries.record_past = self.record_past
        return self._queries

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
        # Real tokens behind those held are where they belong.
        in_place = tokens.valid is None or _known_full(tokens.valid)
        if self._tail and self._room is not None and not torch.is_grad_enabled():
            self._tail = self._room.extend(self._tail, fresh)
        elif self._tail:
            self._replace({name: torch.cat([self._tail[name], t], token_axis(t)) for name, t in fresh.items()})
        else:
            self._replace(fresh)
        self._padded = self._padded or tokens.valid is not None
        if not in_place:
            self._replace(_aligned(self._tail))
        for summaries in self._summaries.values():
            summaries.pending += new
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

    def summaries(self, name: str, size: int, summarize: Summarize, *, of: str = "keys") -> Tensor:
        """What stands for blocks of each row's real tokens, kept from call to call; only new blocks are computed.

        Args:
            name: of these summaries.
            size: tokens of a block, counted from the row's first real one; the same in every call.
            summarize: `[batch, heads, blocks, size, dim]` → `[batch, heads, blocks, entries]`.
            of: `keys`, `values` or the name of a signal.

        Returns:
            `[batch, heads, tail // size, entries]`; of a row with n real tokens the first `n // size` stand for
            something. Like `append` gives them, good until the next call.
        """
        held = self._tail[of]
        if name not in self._summaries:
            self._summaries[name] = Summaries.empty(held)
        with torch.no_grad():
            return self._summaries[name].update(held.detach(), self._count(), size, summarize)

    def note_real(self, real: Tensor, *, is_padded: bool) -> Tensor:
        """How many real tokens went in so far, and note for the next time which of a call to come are; for `counting`.

        Args:
            real: `[batch, T]` bool, tokens of the call to come.
            is_padded: whether that call has a padding mask.

        Returns:
            `[batch]` int64.

        Raises:
            ValueError: earlier calls had padding, and were not noted.
        """
        batch = len(real)
        self._check_batch(batch)
        if not (self._padded or is_padded):
            return torch.full((batch,), self.seen, device=real.device)
        noted = self._real
        if not self._padded:
            noted = torch.ones(batch, self.seen, dtype=torch.bool, device=real.device)
        if noted is None or noted.shape[1] < self.seen:
            raise ValueError("a state with padding has to be counted from its first call on, but this one was not")
        noted = noted[:, : self.seen]
        self._real = torch.cat([noted, real], 1)
        return noted.sum(-1)

    def _count(self) -> Tensor:
        """`[batch]` real tokens of every row in the tail."""
        return self._tail["valid"].sum(-1)

    def _replace(self, tail: dict[str, Tensor]) -> None:
        """Take other tensors for the tail, outside of all buffers."""
        self._tail = tail
        if self._room is not None:
            self._room.buffers = {}

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
        gone = {name: t.narrow(token_axis(t), 0, leaving) for name, t in self._tail.items()}
        # A copy, so that the evicted tokens' storage is really given back.
        self._replace({name: t.narrow(token_axis(t), leaving, keep).clone() for name, t in self._tail.items()})
        return self._parts(gone)

    def crop(self, num_tokens: int) -> None:
        """Forget the newest `num_tokens` tokens.

        Raises:
            ValueError: the state before them cannot be had again, for they or tokens that would be among the newest
                without them went into the accumulators; set `record_past` before the call that adds tokens which may
                be taken back.
        """
        if num_tokens > self.recoverable:
            raise ValueError(
                f"cannot take back {num_tokens} tokens: only {self.recoverable} can be taken back exactly; "
                "set record_past before the call that adds them"
            )
        for other in self._beside:
            other.crop(num_tokens)
        self._recorded = 0
        if num_tokens <= 0:
            return
        self.seen -= num_tokens
        self._real = None if self._real is None else self._real[:, : self.seen]
        self._recoverable -= num_tokens
        if self._padded:
            valid = self._tail["valid"] & (self._tail["arrival"] < self.seen)
            self._replace(_aligned({**self._tail, "valid": valid}))
            # Rows that took back padding still have old tokens in front; what is free in every row leaves with `evict`.
            kept = min(self.tail_length, self.seen)
            start = self.tail_length - kept
        else:
            kept, start = self.tail_length - num_tokens, 0
        tail = {name: t.narrow(token_axis(t), start, kept) for name, t in self._tail.items()}
        if start:
            self._replace(tail)
        # Else the tokens stay where they are in their buffers.
        self._tail = tail
        for summaries in self._summaries.values():
            summaries.taken_back(self._count())

    def reset(self) -> None:
        """Forget everything."""
        self.seen = self._recorded = self._recoverable = 0
        self.memory, self._ring, self._summaries, self._real = {}, None, {}, None
        self._projections = self._queries = None
        self._replace({})
        self._padded = False

    def reorder(self, index: Tensor) -> None:
        """Make row `b` a copy of row `index[b]`, for beam search or batch selection."""
        self.map(lambda t: t.index_select(0, index.to(t.device)))

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times, neighbours together."""
        self.map(lambda t: t.repeat_interleave(repeats, 0))

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply `function` to every tensor held, for moves between devices."""
        self._replace({name: function(t) for name, t in self._tail.items()})
        self._summaries = {name: s.map(function) for name, s in self._summaries.items()}
        self._ring = None if self._ring is None else self._ring.map(function)
        self._real = None if self._real is None else function(self._real)
        for other in self._beside:
            other.map(function)
        self.memory = {name: function(t) for name, t in self.memory.items()}


def _known_full(valid: Tensor) -> bool:
    """Whether all are real, as far as that can be seen without waiting for a GPU or leaving a compiled graph."""
    return valid.device.type == "cpu" and not torch.compiler.is_compiling() and bool(valid.all())


def _aligned(tail: dict[str, Tensor]) -> dict[str, Tensor]:
    order = right_align_order(tail["valid"])
    return {name: take_tokens(t, order) if token_axis(t) == 2 else t.gather(1, order) for name, t in tail.items()}
