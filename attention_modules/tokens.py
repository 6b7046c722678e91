"""What a method is given: tokens with what is known of each, and the queries that look at them.

Letters in shapes: `T` queries, `S` tokens, which are at least as many; query `t` sits at token `S - T + t`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .padding import take_tokens


@dataclass(frozen=True)
class Tokens:
    """Keys, values and what else is known of some tokens of every row, oldest first.

    Attributes:
        keys: `[batch, num_kv_heads, S, head_dim]`.
        values: `[batch, num_kv_heads, S, value_dim]`.
        valid: `[batch, S]` bool, padding before real tokens in every row; None when all are real.
        positions: `[batch, S]` int64, each token's place as the model counts it; None where that is not known.
        signals: what the method derived from each token, `[batch, heads, S, dim]` each, of any heads and dim.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor | None = None
    positions: Tensor | None = None
    signals: dict[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """How many there are in a row, padding included."""
        return self.keys.shape[2]

    @property
    def real(self) -> Tensor:
        """`[batch, S]` bool: `valid`, written out where it is None."""
        return torch.ones_like(self.keys[:, 0, :, 0], dtype=torch.bool) if self.valid is None else self.valid

    def part(self, start: int, stop: int | None = None) -> "Tokens":
        """Those from `start` on, up to `stop`."""
        valid = None if self.valid is None else self.valid[:, start:stop]
        positions = None if self.positions is None else self.positions[:, start:stop]
        signals = {name: t[:, :, start:stop] for name, t in self.signals.items()}
        return Tokens(self.keys[:, :, start:stop], self.values[:, :, start:stop], valid, positions, signals)

    def to(self, dtype: torch.dtype) -> "Tokens":
        """With keys and values in `dtype`; signals are exact as they are."""
        return Tokens(self.keys.to(dtype), self.values.to(dtype), self.valid, self.positions, self.signals)

    def having(self, valid: Tensor | None) -> "Tokens":
        """The same tokens, of which only those in `valid` `[batch, S]` count."""
        return Tokens(self.keys, self.values, valid, self.positions, self.signals)

    def reordered(self, order: Tensor) -> "Tokens":
        """Tokens in the order `[batch, S]` of a row."""
        return Tokens(
            take_tokens(self.keys, order),
            take_tokens(self.values, order),
            None if self.valid is None else self.valid.gather(1, order),
            None if self.positions is None else self.positions.gather(1, order),
            {name: take_tokens(t, order) for name, t in self.signals.items()},
        )


@dataclass(frozen=True)
class Rotation:
    """The model's rotary embedding at some tokens.

    Attributes:
        cos: `[batch, T, ...]`, cosines of each token's angles, in whatever order the model keeps them.
        sin: likewise the sines.
        function: the model's own, `(query, key, cos, sin)` → both rotated.
    """

    cos: Tensor
    sin: Tensor
    function: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Query `[batch, num_heads, T, head_dim]` and keys `[batch, num_kv_heads, T, head_dim]` rotated."""
        return self.function(query, key, self.cos, self.sin)


@dataclass(frozen=True)
class Surroundings:
    """What a method may ask for besides queries, keys, values and the layer's input.

    Attributes:
        positions: `[batch, T]` int64, place of each new token as the model counts it.
        unrotated: query `[batch, num_heads, T, head_dim]` and keys `[batch, num_kv_heads, T, head_dim]` before the
            rotary embedding.
        rotation: that embedding, at the new tokens.
        board: what layers of this forward pass wrote for those behind them; it is gone with the pass.
    """

    positions: Tensor | None = None
    unrotated: tuple[Tensor, Tensor] | None = None
    rotation: Rotation | None = None
    board: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        query: `[batch, num_heads, T, head_dim]`.
        tokens: all that is exactly there, old and new.
        scaling: factor on query-key products.
        hidden_states: `[batch, T, hidden]`, the layer's input, zero where padding stands; None unless the method's
            `reads_hidden_states`.
        unrotated_query: the query before the rotary embedding; None unless the method's `reads_unrotated`. The keys
            stand among the tokens' signals then, as `unrotated_keys`.
        board: see `Surroundings`; None unless the method's `reads_board`.
        queries: `[batch, num_heads, Q, head_dim]`, the newest of earlier calls and those of this one, padding first;
            None without a state, and unless the method's `earlier_queries`; before the rotary embedding for methods
            that read them so.
    """

    query: Tensor
    tokens: Tokens
    scaling: float
    hidden_states: Tensor | None = None
    unrotated_query: Tensor | None = None
    board: dict[str, Tensor] | None = None
    queries: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of queries."""
        return self.query.shape[2]

    @property
    def past(self) -> int:
        """Tokens before the first query's own."""
        return self.tokens.length - self.query.shape[2]

    def to(self, dtype: torch.dtype) -> "Call":
        """With queries, keys and values in `dtype`."""
        return self.over(self.query.to(dtype), self.tokens.to(dtype))

    def in_one_dtype(self) -> "Call":
        """With queries, keys and values in the least dtype that holds them all."""
        both = torch.promote_types(self.tokens.keys.dtype, self.tokens.values.dtype)
        return self.to(torch.promote_types(self.query.dtype, both))

    def since(self, start: int) -> "Call":
        """Without the first `start` tokens, which must be before all queries."""
        return self.over(self.query, self.tokens.part(start))

    def over(self, query: Tensor, tokens: Tokens) -> "Call":
        """The same call of this query over these tokens."""
        return replace(self, query=query, tokens=tokens)
