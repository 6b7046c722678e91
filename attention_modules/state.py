"""What a method remembers between calls: a short tail of exact tokens and fixed-size accumulators in fp32."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .padding import right_align_order, take_tokens
from .ring import Ring

# Keys, values, validity (None: all real) and signals of some tokens.
Tail = tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]


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

    def append(self, key: Tensor, value: Tensor, valid: Tensor | None, signals: Mapping[str, Tensor]) -> Tail:
        """Add new tokens behind the tail and return the whole tail.

        Args:
            key: `[batch, num_kv_heads, new, head_dim]`.
            value: `[batch, num_kv_heads, new, value_dim]`.
            valid: `[batch, new]` bool, True = real token, or None when all are.
            signals: what else the method knows of each token, `[batch, heads, new, dim]` each.

        Returns:
            keys, values `[batch, num_kv_heads, tail + new, ...]`, valid `[batch, tail + new]` or None, and the signals.
        """
        batch, _, new, _ = key.shape
        self._straighten()
        self._check_batch(batch)
        positions = torch.arange(self.seen, self.seen + new, device=key.device).expand(batch, -1)
        ours = torch.ones(batch, new, dtype=torch.bool, device=key.device) if valid is None else valid
        fresh = {"keys": key, "values": value, "valid": ours, "positions": positions, **signals}
        if self._tail:
            fresh = {name: torch.cat([self._tail[name], part], _axis(part)) for name, part in fresh.items()}
        self._padded = self._padded or valid is not None
        self._tail = _aligned(fresh) if self._padded else fresh
        self.seen += new
        self._recorded = self._recorded + new if self.record_past else 0
        self._recoverable += new
        return self._parts(self._tail)

    def ring(self, slots: int, key: Tensor, value: Tensor, valid: Tensor | None) -> Ring:
        """Go over to what one new token of every row changes in place: a ring, and accumulators of the state's own.

        The token counts as seen; putting it into the ring is left to the caller. It cannot be taken back.

        Args:
            slots: tokens that the ring has room for, more than the tail holds; 0 if the method keeps no exact tokens.
            key: `[batch, num_kv_heads, 1, head_dim]`.
            value: `[batch, num_kv_heads, 1, value_dim]`.
            valid: `[batch, 1]` bool, rows whose token is real, or None when all are.
        """
        self._check_batch(key.shape[0])
        if self._ring is None or not self._ring.fits(key, value):
            self._straighten()
            empty = {"keys": key[:, :, :0], "values": value[:, :, :0], "valid": key[:, 0, :0, 0].bool()}
            keys, values, real, _ = self._parts(self._tail or empty)
            keys, values = (t.to(torch.promote_types(t.dtype, new.dtype)) for t, new in ((keys, key), (values, value)))
            self._ring, self._tail = Ring.from_tail(keys, values, real, slots), {}
            self.memory = {name: t.clone(memory_format=torch.contiguous_format) for name, t in self.memory.items()}
        self._padded = self._padded or valid is not None
        self.seen += 1
        self._recorded = self._recoverable = 0
        return self._ring

    def _straighten(self) -> None:
        """Turn the ring into a tail."""
        if self._ring is None:
            return
        keys, values, valid = self._ring.to_tail()
        # Older than all that can be taken back.
        positions = torch.full_like(valid, -1, dtype=torch.int64)
        self._tail = {"keys": keys, "values": values, "valid": valid, "positions": positions}
        self._ring = None

    def _check_batch(self, batch: int) -> None:
        held = self._tail["keys"] if self._tail else None if self._ring is None else self._ring.keys
        if held is not None and held.shape[0] != batch:
            raise ValueError(f"the state holds {held.shape[0]} sequences, but {batch} came in")

    def _parts(self, tail: dict[str, Tensor]) -> Tail:
        signals = {name: t for name, t in tail.items() if name not in ("keys", "values", "valid", "positions")}
        return tail["keys"], tail["values"], tail["valid"] if self._padded else None, signals

    def evict(self, keep: int) -> Tail | None:
        """Take everything but the last `keep` tokens out of the tail.

        With `record_past` the tokens since the last `crop` stay too.

        Returns:
            keys, values, valid and signals of the tokens that left, oldest first, or None if nothing left.
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
            self._tail["valid"] = self._tail["valid"] & (self._tail["positions"] < self.seen)
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
    """Where the tokens are counted: validity and positions have neither heads nor channels."""
    return 2 if tensor.ndim == 4 else 1


def _aligned(tail: dict[str, Tensor]) -> dict[str, Tensor]:
    order = right_align_order(tail["valid"])
    return {name: take_tokens(t, order) if _axis(t) == 2 else t.gather(1, order) for name, t in tail.items()}
