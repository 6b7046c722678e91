"""What a layer remembers whose heads are served by several modules: a state for each of them."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ..state import AttentionState


class JointState(AttentionState):
    """One state for each part of the heads; whatever happens to this one happens to all of them.

    Args:
        parts: the states, empty.
    """

    def __init__(self, parts: Sequence[AttentionState]) -> None:
        super().__init__()
        self.parts = tuple(parts)

    @property
    def tail_length(self) -> int:
        """Tokens held exactly, those of each part counted."""
        return sum(part.tail_length for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def recoverable(self) -> int:
        return min(part.recoverable for part in self.parts)

    def begin(self, *, is_padded: bool) -> None:
        """Before a call: let the parts know what the caller asked of the whole.

        Args:
            is_padded: whether the call has a padding mask.
        """
        self._padded = self._padded or is_padded
        for part in self.parts:
            part.record_past = self.record_past

    def end(self) -> None:
        """After a call, in which the parts have taken the new tokens."""
        self.seen = self.parts[0].seen

    def crop(self, num_tokens: int) -> None:
        # The one that can take back least refuses before any other has taken back something.
        for part in sorted(self.parts, key=lambda part: part.recoverable):
            part.crop(num_tokens)
        self.seen -= max(num_tokens, 0)
        self._real = None if self._real is None else self._real[:, : self.seen]

    def reset(self) -> None:
        super().reset()
        for part in self.parts:
            part.reset()

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        super().map(function)
        for part in self.parts:
            part.map(function)
