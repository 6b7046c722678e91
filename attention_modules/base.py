"""The contract every attention method obeys."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from .calls import check_shapes, exact_tokens, layer_input
from .geometry import Geometry
from .padding import restore_tokens, right_align_order, take_tokens
from .state import AttentionState, Mixed, Tail
from .weights import Statistic, response_weights

Memory = dict[str, Tensor]


class AttentionOptions(BaseModel):
    """Options of a method; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AttentionModule(nn.Module, ABC):
    """One layer's attention, between the model's own projections.

    A method implements `attend_naive` (the law: every weight written out, O(L^2), or the recurrence itself, token by
    token) and `attend_torch` (sub-quadratic), and, if it forgets exact tokens, `tail_tokens` and `absorb`; a form that
    has the accumulators behind its last tokens anyway returns them too (`Mixed`), and a state takes them over. What it
    needs of a token besides key and value, such as a gate, comes from `signals`; what it does to the mixed values, such
    as a norm, belongs into `finish`. Padding, dtypes and states are handled here.

    Args:
        geometry: head counts and sizes.
        options: the method's own options.
        implementation: `"auto"`, `"naive"`, `"torch"` or, where a method has kernels, `"triton"`; auto takes the
            fastest that the device has.

    Raises:
        ValueError: no such implementation, or the method cannot serve such a layer.
    """

    name: ClassVar[str] = ""
    implementations: ClassVar[tuple[str, ...]] = ("auto", "naive", "torch")
    # Whether the state stays as it is while the context grows.
    is_recurrent: ClassVar[bool] = True
    # Names of the parts that the numerator and the normaliser are sums of; see `leaving_out`.
    paths: ClassVar[tuple[str, ...]] = ()
    # Those of them that are left out at present.
    left_out: frozenset[str] = frozenset()

    def __init__(self, geometry: Geometry, options: AttentionOptions, implementation: str = "auto") -> None:
        super().__init__()
        if implementation not in self.implementations:
            raise ValueError(
                f"implementation={implementation!r} is not available for {self.name!r}; "
                f"choose one of {', '.join(self.implementations)}"
            )
        misfit = self.misfit(geometry, options)
        if misfit is not None:
            raise ValueError(misfit)
        self.geometry = geometry
        self.options = options
        self.implementation = implementation

    @classmethod
    def misfit(cls, geometry: Geometry, options: Any) -> str | None:
        """Why the method with these options (of its own class) cannot serve such a layer, None if it can."""
        return None

    @classmethod
    def misfit_tokens(cls, options: Any, image_tokens: int | None) -> str | None:
        """Why the method cannot serve the tokens that a model makes of its inputs, None if it can.

        Args:
            options: of its own class.
            image_tokens: how many there are of an image of the model's own size; None if it takes no images.
        """
        return None

    @property
    def reads_hidden_states(self) -> bool:
        """Whether `signals` or `finish` need the layer's input."""
        return False

    @property
    def is_normalized(self) -> bool:
        """Whether a query's attention weights are never negative and add up to one."""
        return True

    def reset_parameters(self) -> None:
        """Set every learnable parameter to its start; methods without parameters have nothing to do."""
        return

    @property
    def tail_tokens(self) -> int | None:
        """Newest tokens the state keeps exactly between calls; None = all of them."""
        return None

    def memory_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the fp32 accumulators of one sequence, without the batch axis."""
        return {}

    def signals(self, key: Tensor, hidden_states: Tensor | None) -> Memory:
        """What the method derives from each new token besides its key and value, such as the logarithm of its gate.

        It stays with keys and values wherever they go: `attend_naive`, `attend_torch` and `absorb` of a method with
        signals take them by name as further arguments.

        Args:
            key: `[batch, num_kv_heads, seq, head_dim]`, fp32 or fp64.
            hidden_states: `[batch, seq, hidden]`, zero where padding stands; None unless `reads_hidden_states`.

        Returns:
            tensors `[batch, heads, seq, dim]` by name, of any heads and dim.
        """
        return {}

    def finish(self, out: Tensor, hidden_states: Tensor | None) -> Tensor:
        """What follows the mixing of values, for each token by itself; the output need not be linear in it.

        Args:
            out: `[batch, num_heads, T, value_dim]`, fp32 or fp64.
            hidden_states: `[batch, T, hidden]`, zero where padding stands; None unless `reads_hidden_states`.
        """
        return out

    def absorb(self, memory: Memory, keys: Tensor, values: Tensor, valid: Tensor | None) -> Memory:
        """Fold tokens that left the tail into the accumulators.

        Args:
            memory: accumulators so far, empty at the start.
            keys: `[batch, num_kv_heads, seq, head_dim]`, fp32 or fp64.
            values: `[batch, num_kv_heads, seq, value_dim]`.
            valid: `[batch, seq]` bool or None when all are real.
        """
        return memory

    @abstractmethod
    def attend_naive(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, memory: Memory
    ) -> Tensor:
        """The oracle, with every attention weight written out.

        Queries stand at the right end of the keys: query `t` sits at key position `S - T + t`.

        Args:
            query: `[batch, num_heads, T, head_dim]`, fp32 or fp64.
            keys: `[batch, num_kv_heads, S, head_dim]`.
            values: `[batch, num_kv_heads, S, value_dim]`.
            valid: `[batch, S]` bool, padding before real tokens in every row, or None.
            scaling: factor on query-key products.
            memory: accumulators of all tokens before `keys`.

        Returns:
            `[batch, num_heads, T, value_dim]`.
        """

    @abstractmethod
    def attend_torch(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, memory: Memory
    ) -> Tensor | Mixed:
        """The same function as `attend_naive`, sub-quadratic in time and memory where the method is.

        Returns:
            the output alone, or beside it what `absorb` would make of the oldest keys, gradients included.
        """

    def attend_triton(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        valid: Tensor | None,
        scaling: float,
        memory: Memory,
        **signals: Tensor,
    ) -> Tensor | Mixed | None:
        """The same in Triton kernels, on tensors in the dtype they came in; None where the torch path is to serve.

        Raises:
            ValueError: `implementation="triton"` was asked for and cannot be had.
        """
        return None

    def decode_torch(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float, state: AttentionState
    ) -> Tensor | None:
        """One new token of every row, with a state that changes in place; None where a call like others is to serve.

        Called where no gradients are wanted and nothing will be taken back.

        Args:
            query: `[batch, num_heads, 1, head_dim]`, fp32 or fp64.
            key: `[batch, num_kv_heads, 1, head_dim]`, in the dtype it came in.
            value: `[batch, num_kv_heads, 1, value_dim]`, likewise.
            valid: `[batch, 1]` bool, rows whose token is real, or None when all are.
            scaling: factor on query-key products.
            state: memory of earlier calls, with no more than `tail_tokens` tokens in its tail.

        Returns:
            `[batch, num_heads, 1, value_dim]`.
        """
        return None

    def decode_triton(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float, state: AttentionState
    ) -> Tensor | None:
        """The same as one kernel, on tensors in the dtype they came in; None where the torch path is to serve."""
        return None

    def new_state(self) -> AttentionState:
        """An empty state, which makes calls incremental."""
        return AttentionState()

    def state_bytes(self, batch: int, length: int, dtype: torch.dtype) -> int:
        """Bytes of keys, values and accumulators after `length` tokens with keys and values in `dtype`."""
        geometry = self.geometry
        tail = length if self.tail_tokens is None else min(length, self.tail_tokens)
        exact = tail * geometry.num_kv_heads * (geometry.head_dim + geometry.value_dim) * dtype.itemsize
        folded = sum(4 * int(torch.Size(shape).numel()) for shape in self.memory_shapes().values())
        return batch * (exact + folded)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        padding_mask: Tensor | None = None,
        state: AttentionState | None = None,
        hidden_states: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[batch, num_heads, T, head_dim]`.
            key: `[batch, num_kv_heads, S, head_dim]`; with a state, the new tokens only (`S = T`).
            value: `[batch, num_kv_heads, S, value_dim]`.
            scaling: factor on query-key products.
            padding_mask: `[batch, S]` bool, True = real token; None when all are.
            state: memory of earlier calls, updated in place.
            hidden_states: `[batch, T, hidden]`, for methods that read the layer's input.

        Returns:
            `[batch, num_heads, T, value_dim]` in the dtype of `value`; rows of padding are zero.

        Raises:
            ValueError: shapes do not fit the geometry, or `hidden_states` are missing.
        """
        return self._run(query, key, value, scaling, padding_mask, state, hidden_states, finish=True)

    def _run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        padding_mask: Tensor | None,
        state: AttentionState | None,
        hidden_states: Tensor | None,
        *,
        finish: bool,
    ) -> Tensor:
        """`forward`, with or without what follows the mixing of values."""
        check_shapes(self.geometry, query, key, value, padding_mask, state)
        if query.shape[2] == 0:
            return query[..., :1].expand(-1, -1, -1, self.geometry.value_dim).to(value.dtype)
        query_valid = None if padding_mask is None else padding_mask[:, -query.shape[2] :]
        order = None if query_valid is None or query.shape[2] == 1 else right_align_order(query_valid)
        if order is not None:
            query = take_tokens(query, order)
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        # The maths stays in fp32 under autocast: bf16 sums of thousands of terms drift.
        with torch.autocast(query.device.type, enabled=False):
            hidden = self._layer_input(query, key, hidden_states, query_valid, dtype)
            out = None if state is None else self._decode(query, key, value, padding_mask, scaling, state, dtype)
            if out is None:
                tail = exact_tokens(key, value, padding_mask, state, self.signals(key.to(dtype), hidden))
                mixed = self._mixture(query, tail, scaling, {} if state is None else state.memory, dtype)
                if state is not None:
                    self._forget(state, dtype, mixed)
                out = mixed.out
            if order is not None:
                out = restore_tokens(out, order)
            if finish:
                out = self.finish(out, hidden)
        if query_valid is not None:
            out = out.masked_fill(~query_valid[:, None, :, None], 0.0)
        return out.to(value.dtype)

    def _decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        scaling: float,
        state: AttentionState,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """One token in place, where method and call allow it."""
        is_plain = query.shape[2] == 1 and not (torch.is_grad_enabled() or state.record_past or self.left_out)
        if not is_plain or self.implementation == "naive":
            return None
        # What was recorded before.
        self._forget(state, dtype)
        out = None
        if self.implementation != "torch":
            out = self.decode_triton(query, key, value, valid, scaling, state)
        if out is None and self.implementation != "triton":
            out = self.decode_torch(query.to(dtype), key, value, valid, scaling, state)
        return out

    def _mixture(self, query: Tensor, tail: Tail, scaling: float, memory: Memory, dtype: torch.dtype) -> Mixed:
        """The fastest form that the implementation allows."""
        keys, values, valid, signals = tail
        mixed: Tensor | Mixed | None = None
        if self.implementation in ("auto", "triton"):
            mixed = self.attend_triton(query, keys, values, valid, scaling, memory, **signals)
        if mixed is None:
            attend: Callable[..., Tensor | Mixed]
            attend = self.attend_naive if self.implementation == "naive" else self.attend_torch
            mixed = attend(query.to(dtype), keys.to(dtype), values.to(dtype), valid, scaling, memory, **signals)
        return mixed if isinstance(mixed, Mixed) else Mixed(mixed, memory, 0)

    def _layer_input(
        self, query: Tensor, key: Tensor, hidden_states: Tensor | None, valid: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """The layer's input as the maths wants it, if the method reads it."""
        if not self.reads_hidden_states:
            return None
        shape = query.shape[0], query.shape[2], self.geometry.hidden_size
        return layer_input(self.name, hidden_states, shape, key.shape[2], valid, dtype)

    def attention_weights(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scaling: float,
        padding_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """What each key weighs in what each query mixes of the values, before `finish`.

        Args:
            query: `[batch, num_heads, T, head_dim]`.
            key: `[batch, num_kv_heads, S, head_dim]`.
            scaling: factor on query-key products.
            padding_mask: `[batch, S]` bool, True = real token; None when all are.
            hidden_states: `[batch, T, hidden]`, for methods that route on the layer's input.
            value: `[batch, num_kv_heads, S, value_dim]`, for methods whose weights depend on the values too.

        Returns:
            `[batch, num_heads, T, S]`, fp32 or fp64; rows and columns of padding are zero.
        """
        dtype = torch.promote_types(key.dtype, torch.float32)
        values = key.new_empty(*key.shape[:3], self.geometry.value_dim, dtype=dtype)

        def attend(units: Tensor) -> Tensor:
            return self._run(query, key, units, scaling, padding_mask, None, hidden_states, finish=False)

        return response_weights(attend, values)

    def weights_by_row(
        self, query: Tensor, key: Tensor, *, scaling: float, padding_mask: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The weights of each row of the batch as if it were alone: `[num_heads, T, T]`, T its real tokens."""
        for row in range(query.shape[0]):
            keep = slice(None) if padding_mask is None else padding_mask[row]
            part = query[row : row + 1, :, keep], key[row : row + 1, :, keep]
            yield self.attention_weights(*part, scaling=scaling)[0]

    def statistics(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scaling: float,
        padding_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
    ) -> Mapping[str, Statistic]:
        """What the method can tell about itself on these tokens, by name; arguments as for `attention_weights`."""
        return {}

    def _forget(self, state: AttentionState, dtype: torch.dtype, mixed: Mixed | None = None) -> None:
        """Fold what is too old for the tail; after a call, only what that did not fold itself."""
        evicted = None if self.tail_tokens is None else state.evict(self.tail_tokens)
        if evicted is None:
            return
        keys, values, valid, signals = evicted
        start = 0
        # The oldest keys of the call are also those that leave, but fewer leave while they are recorded.
        if mixed is not None and mixed.folded <= keys.shape[2]:
            state.memory, start = mixed.memory, mixed.folded
        if start < keys.shape[2]:
            absorb: Callable[..., Memory] = self.absorb
            rest = {name: t[:, :, start:] for name, t in signals.items()}
            keys, values = keys[:, :, start:].to(dtype), values[:, :, start:].to(dtype)
            state.memory = absorb(state.memory, keys, values, None if valid is None else valid[:, start:], **rest)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.options!r}, implementation={self.implementation!r}"
