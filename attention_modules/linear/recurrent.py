"""What methods with a decaying state share: inputs free of padding, the state as memory, norm and gate behind it."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..base import AttentionModule
from ..contract import AttentionOptions, Memory
from ..geometry import Geometry
from ..kernels.selection import needs_package, problem_with, use_chunks
from ..padding import padding_before
from ..state import Mixed
from ..tokens import Call, Tokens
from ..weights import Statistic
from .chunked import SEGMENT
from .output import HeadNorm, LowRankLinear
from .recurrence import MIN_LOG_DECAY, decayed_chunks, decayed_steps, decayed_sums
from .recurrence_kernels import decayed_kernels

# From queries, keys, values, signals and a state to outputs and the next state; see `recurrence.py` for the shapes.
Mixing = Callable[[Tensor, Tensor, Tensor, Memory, Tensor | None], tuple[Tensor, Tensor]]


class RecurrentOptions(AttentionOptions):
    """Options of a method with a decaying state.

    Attributes:
        state_per: `query_head` keeps a state (and learns a decay) per query head, `kv_head` one per key/value head,
            which divides the state by the number of heads that share one.
        norm_start: start of the weights of the output norm, where there is one; best about as large as the teacher's
            outputs, since attention transfer has to go the rest of the way.
        output_gate: multiply the output by a sigmoid of a learned projection of the layer's input; it starts at ½.
        output_gate_rank: dimensions that this projection goes through; None = straight from hidden_size.
    """

    state_per: Literal["query_head", "kv_head"] = "query_head"
    norm_start: float = Field(1.0, gt=0, le=1e6)
    output_gate: bool = True
    output_gate_rank: int | None = Field(None, ge=1)


class RecurrentModule(AttentionModule):
    """Base of the methods whose state decays: `lightning`, `gated` and `gated_delta`.

    A method gives the logarithm of its decay, the activation of queries and keys and, if it is no plain sum, the
    recurrence itself.

    Args:
        geometry: head counts and sizes, `hidden_size` too where something is learned from the layer's input.
        options: the method's own options.
        implementation: see `AttentionModule`.
        normed: whether an RMS norm per head follows.
    """

    options: RecurrentOptions
    implementations = ("auto", "naive", "torch", "triton")

    def __init__(
        self, geometry: Geometry, options: RecurrentOptions, implementation: str = "auto", *, normed: bool = True
    ) -> None:
        super().__init__(geometry, options, implementation)
        self.key_heads = geometry.num_heads if options.state_per == "query_head" else geometry.num_kv_heads
        self.norm = HeadNorm(geometry.num_heads, geometry.value_dim, options.norm_start) if normed else None
        self.output_gate = None
        if options.output_gate and geometry.hidden_size is not None:
            sizes = geometry.hidden_size, geometry.num_heads, geometry.value_dim
            self.output_gate = LowRankLinear(*sizes, options.output_gate_rank)

    @classmethod
    def why_unsupported(cls, geometry: Geometry, options: Any) -> str | None:
        """A layer that looks both ways, or one whose input has an unknown size."""
        if not geometry.causal:
            return f"{cls.name} runs from left to right, but this layer is bidirectional; `linear` can serve it"
        if geometry.hidden_size is None and cls.needs_hidden_size(options):
            return f"{cls.name} with these options learns from the layer's input, but its hidden_size is not known"
        return None

    @classmethod
    def needs_hidden_size(cls, options: Any) -> bool:
        """Whether something is learned from the layer's input."""
        needed: bool = options.output_gate
        return needed

    @property
    def reads_hidden_states(self) -> bool:
        """As the options say."""
        return self.needs_hidden_size(self.options)

    @property
    def is_normalized(self) -> bool:
        """Weights fade with the distance, whatever they add up to."""
        return False

    @property
    def tail_tokens(self) -> int:
        """Nothing is kept exactly."""
        return 0

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """The state of one sequence."""
        return {"state": (self.key_heads, self.geometry.head_dim, self.geometry.value_dim)}

    @abstractmethod
    def log_decay(self, key: Tensor, hidden_states: Tensor | None) -> Tensor:
        """`[batch or 1, key_heads, T, 1 or head_dim]` logarithm of what is left of the state after each token."""

    @abstractmethod
    def activate(self, x: Tensor) -> Tensor:
        """What queries and keys go through."""

    def query_scaling(self, scaling: float) -> float:
        """Factor on activated queries, given that of the model."""
        return scaling

    def prepare_values(self, values: Tensor) -> Tensor:
        """What is mixed in their place."""
        return values

    def combine(self, out: Tensor) -> Tensor:
        """What becomes of the mixture `[batch, num_heads, T, dim]`."""
        return out

    def signals(self, key: Tensor, hidden_states: Tensor | None) -> Memory:
        """The gates of each token."""
        decay = self.log_decay(key, hidden_states).clamp(MIN_LOG_DECAY, 0.0)
        return {"log_decay": decay.expand(key.shape[0], -1, -1, -1)}

    def steps(
        self, queries: Tensor, keys: Tensor, values: Tensor, signals: Memory, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The recurrence as it is defined."""
        return decayed_steps(queries, keys, values, signals["log_decay"], state)

    def chunks(
        self, queries: Tensor, keys: Tensor, values: Tensor, signals: Memory, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The same, sub-quadratic and without a step for each token."""
        return decayed_chunks(queries, keys, values, signals["log_decay"], state)

    def update(self, keys: Tensor, values: Tensor, signals: Memory, state: Tensor | None) -> Tensor:
        """The state after some tokens, without their outputs."""
        return decayed_sums(keys, values, signals["log_decay"], state)

    def attend_naive(self, call: Call, memory: Memory) -> Tensor:
        return self._attend(self.steps, call, memory).out

    def attend_torch(self, call: Call, memory: Memory) -> Mixed:
        return self._attend(self.chunks, call, memory)

    @needs_package
    def attend_triton(self, call: Call, memory: Memory) -> Mixed | None:
        """In chunks; queries, keys and values keep their dtype, gates and the state are exact."""
        call = call.in_one_dtype()
        query, tokens = call.query, call.tokens
        problem = problem_with(query, tokens.keys, tokens.values, dims=(query.shape[-1], tokens.values.shape[-1]))
        if not use_chunks(self.implementation, problem, query):
            return None
        exact, folded = torch.promote_types(query.dtype, torch.float32), tokens.length
        if call.past:
            memory = self.absorb(tokens.part(0, call.past).to(exact), memory)
        tokens = tokens.part(call.past)
        keys, signals = self._keys(tokens.to(exact))
        queries = (self.activate(query.to(exact)) * self.query_scaling(call.scaling)).to(query.dtype)
        start, state = padding_before(tokens.valid), memory.get("state")
        out, state = self.run_kernels(queries, keys.to(query.dtype), tokens.values, signals, start, state)
        return Mixed(self.combine(out), {"state": state}, folded)

    @needs_package
    def run_kernels(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        signals: Memory,
        start: Tensor | None,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The mixture of prepared values, and the next state; see `recurrence_kernels.py` for the shapes."""
        ones = self.memory_shapes()["state"][-1] > values.shape[-1]
        return decayed_kernels(queries, keys, values, signals["log_decay"], start, state, ones=ones)

    def absorb(self, tokens: Tokens, memory: Memory) -> Memory:
        return {"state": self.update(*self._inputs(tokens), memory.get("state"))}

    def _attend(self, run: Mixing, call: Call, memory: Memory) -> Mixed:
        keys, values, signals = self._inputs(call.tokens)
        state = memory.get("state")
        past, length = call.past, call.tokens.length
        if past:
            before = {name: t[:, :, :past] for name, t in signals.items()}
            state = self.update(keys[:, :, :past], values[:, :, :past], before, state)
        queries = (self.activate(call.query) * self.query_scaling(call.scaling)).unflatten(1, (self.key_heads, -1))
        outs = []
        for start in range(past, length, SEGMENT):
            now = slice(start, start + SEGMENT)
            part = queries[:, :, :, start - past : start - past + SEGMENT]
            gates = {name: t[:, :, now] for name, t in signals.items()}
            out, state = run(part, keys[:, :, now], values[:, :, now], gates, state)
            memory = {"state": state}
            outs.append(out)
        return Mixed(self.combine(torch.cat(outs, 3).flatten(1, 2)), memory, length)

    def _inputs(self, tokens: Tokens) -> tuple[Tensor, Tensor, Memory]:
        """Activated keys and prepared values for each state, and signals."""
        keys, signals = self._keys(tokens)
        values = self.prepare_values(tokens.values)
        repeats = self.key_heads // self.geometry.num_kv_heads
        if repeats > 1:
            keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        return keys, values, signals

    def _keys(self, tokens: Tokens) -> tuple[Tensor, Memory]:
        """Activated keys, and signals; padding neither enters the state nor lets it fade."""
        if tokens.valid is None:
            return self.activate(tokens.keys), tokens.signals
        padding = ~tokens.valid[:, None, :, None]
        # Once before the activation, which may overflow on padding, and once after, which may not keep zeros.
        keys = self.activate(tokens.keys.masked_fill(padding, 0.0)).masked_fill(padding, 0.0)
        return keys, {name: t.masked_fill(padding, 0.0) for name, t in tokens.signals.items()}

    def finish(self, out: Tensor, hidden_states: Tensor | None) -> Tensor:
        """Norm and gate."""
        normed: Tensor = out if self.norm is None else self.norm(out)
        return normed if self.output_gate is None else normed * self.output_gate(hidden_states).sigmoid()

    def reset_parameters(self) -> None:
        """Start norm and gate again."""
        for part in (self.norm, self.output_gate):
            if part is not None:
                part.reset_parameters()

    def tokens_attended(self, rank: Tensor, total: Tensor) -> Tensor:
        return torch.zeros_like(rank)

    def state_multiply_adds(self) -> int:
        return math.prod(self.memory_shapes()["state"][1:]) * (self.geometry.num_heads + self.key_heads)

    def statistics(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scaling: float,
        padding_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
    ) -> Mapping[str, Statistic]:
        """How far the heads look back."""
        dtype = torch.promote_types(key.dtype, torch.float32)
        hidden = self._layer_input(query, key, hidden_states, padding_mask, dtype)
        decay = self.signals(key.to(dtype), hidden)["log_decay"].mean(-1)
        real = torch.ones_like(decay[:, 0], dtype=torch.bool) if padding_mask is None else padding_mask
        mean = decay.masked_fill(~real[:, None], 0.0).sum((0, 2)) / real.sum().clamp_min(1)
        tokens = (-math.log(2) / mean.clamp_max(-1e-9)).repeat_interleave(self.geometry.num_heads // self.key_heads)
        meaning = "tokens after which the state has faded to a half, by the mean decay"
        return {"half-life": Statistic("half-life", meaning, "head", "number", tokens)}


def decay_slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """`[heads]` the rates at which heads forget, `2 ** (-8 h / heads)` for h = 1 to heads, as in ALiBi.

    The same formula serves head counts that are no power of two: the slopes go from almost one to 1/256.
    """
    return torch.exp2(-8.0 * torch.arange(1, heads + 1, dtype=torch.float64, device=device) / heads)
