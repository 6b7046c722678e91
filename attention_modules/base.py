"""How attention methods are run: padding, dtypes, states and the choice of implementation, the same for all."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from .bf16_products import bf16_products
from .calls import check_shapes, exact_tokens, layer_input, new_tokens
from .contract import AttentionContract, Memory
from .counting import current_counter
from .padding import restore_tokens, right_align_order, take_tokens
from .projecting import reproject
from .state import AttentionState, Mixed
from .tokens import Call, Surroundings, Tokens
from .weights import response_weights

NOTHING = Surroundings()


class AttentionModule(AttentionContract):
    """A method with what runs it; every method derives from this class."""

    @property
    def chooser(self) -> "AttentionModule | None":
        """What chooses for this module in a layer before it, as one of its own; None where it needs nobody."""
        return None

    def new_state(self) -> AttentionState:
        """An empty state, which makes calls incremental."""
        return AttentionState(grows=self.tail_tokens is None)

    def state_bytes(self, batch: int, length: int, dtype: torch.dtype) -> int:
        """Bytes of keys, values and accumulators after `length` tokens with keys and values in `dtype`."""
        geometry = self.geometry
        tail = length if self.tail_tokens is None else min(length, self.tail_tokens)
        exact = tail * geometry.num_kv_heads * (geometry.head_dim + geometry.value_dim) * dtype.itemsize
        folded = sum(4 * int(torch.Size(shape).numel()) for shape in self.memory_shapes().values())
        return batch * (exact + folded + self._projection_bytes(length, dtype))

    def _projection_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Of a row's newest projections, where a method works on those: queries and keys are turned back in fp32."""
        geometry, held = self.geometry, min(length, self.projected_tokens)
        turned = 4 * (geometry.num_heads + geometry.num_kv_heads) * geometry.head_dim
        return held * (turned + dtype.itemsize * geometry.num_kv_heads * geometry.value_dim)

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
        around: Surroundings = NOTHING,
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
            around: what other methods read.

        Returns:
            `[batch, num_heads, T, value_dim]` in the dtype of `value`; rows of padding are zero.

        Raises:
            ValueError: shapes do not fit the geometry, or something that the method reads is missing.
        """
        counter = current_counter()
        places = None if counter is None else counter.places(self, query, key, padding_mask, state)
        counted = () if places is None else self.parts or (self,)
        for core in counted:
            core.counts_tokens = True
        out = self._run(query, key, value, scaling, padding_mask, state, hidden_states, around, finish=True)
        if counter is not None and places is not None:
            counter.add(self, places, state, hidden_states)
        for core in counted:
            core.counts_tokens, core.tokens_counted = False, None
        return out

    def _run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        padding_mask: Tensor | None,
        state: AttentionState | None,
        hidden_states: Tensor | None,
        around: Surroundings = NOTHING,
        *,
        finish: bool,
    ) -> Tensor:
        """`forward`, with or without what is done to values before they are mixed and follows their mixing."""
        check_shapes(self.geometry, query, key, value, padding_mask, state)
        if query.shape[2] == 0:
            return query[..., :1].expand(-1, -1, -1, self.geometry.value_dim).to(value.dtype)
        if self.reprojects:
            query, key, own = reproject(self, query, key, value, padding_mask, state, around)
            value = own if finish else value
        query_valid = None if padding_mask is None else padding_mask[:, -query.shape[2] :]
        unrotated = around.unrotated[0] if self.reads_unrotated and around.unrotated is not None else None
        queries = self._known_queries(query if unrotated is None else unrotated, key, query_valid, state)
        order = None if query_valid is None or query.shape[2] == 1 else right_align_order(query_valid)
        if order is not None:
            query = take_tokens(query, order)
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        # The maths stays in fp32 under autocast: bf16 sums of thousands of terms drift.
        with torch.autocast(query.device.type, enabled=False):
            hidden = self._layer_input(query, key, hidden_states, query_valid, dtype)
            new = new_tokens(self, Tokens(key, value, padding_mask), hidden, around)
            if order is not None and unrotated is not None:
                unrotated = take_tokens(unrotated, order)
            board = around.board if self.reads_board else None
            seen = hidden if order is None or hidden is None else take_tokens(hidden.unsqueeze(1), order).squeeze(1)
            call = Call(query, new, scaling, seen, unrotated, board, queries)
            out = None if state is None else self._decode(call, state, dtype)
            if out is None:
                call = call.over(query, exact_tokens(new, state))
                mixed = self._mixture(call, {} if state is None else state.memory, dtype)
                if state is not None:
                    self._forget(state, dtype, mixed)
                out = mixed.out
            if order is not None:
                out = restore_tokens(out, order)
                if self.tokens_counted is not None:
                    self.tokens_counted = self.tokens_counted.gather(1, order.argsort(-1))
            if finish:
                out = self.finish(out, hidden)
        if query_valid is not None:
            out = out.masked_fill(~query_valid[:, None, :, None], 0.0)
        return out.to(value.dtype)

    def _known_queries(
        self, query: Tensor, key: Tensor, valid: Tensor | None, state: AttentionState | None
    ) -> Tensor | None:
        """The newest queries, those of the call last, out of a state beside the method's own; None without a state.

        They go into it as they came, padding wherever it stood, so that it knows which of them are taken back.

        Raises:
            ValueError: the method reads queries that are not there.
        """
        if not self.earlier_queries:
            return None
        if state is None:
            if key.shape[2] > query.shape[2]:
                raise ValueError(f"{self.name!r} reads the queries of earlier tokens: give those of all, or a state")
            return None
        held = state.queries.append(Tokens(query, query[..., :0], valid)).keys
        # One by one they may stay for a while, so that not all are copied each time.
        if query.shape[2] > 1 or held.shape[2] > 2 * self.earlier_queries:
            state.queries.evict(self.earlier_queries)
        return held

    def _decode(self, call: Call, state: AttentionState, dtype: torch.dtype) -> Tensor | None:
        """One token in place, where method and call allow it."""
        is_plain = call.length == 1 and not (torch.is_grad_enabled() or state.record_past or self.left_out)
        if not is_plain or self.implementation == "naive":
            return None
        # What was recorded before.
        self._forget(state, dtype)
        out = None
        if self.implementation != "torch":
            out = self.decode_triton(call, state)
        if out is None and self.implementation != "triton":
            out = self.decode_torch(call.over(call.query.to(dtype), call.tokens), state)
        return out

    def _mixture(self, call: Call, memory: Memory, dtype: torch.dtype) -> Mixed:
        """The fastest form that the implementation allows."""
        mixed: Tensor | Mixed | None = None
        if self.implementation in ("auto", "triton"):
            mixed = self.attend_triton(call, memory)
        if mixed is None:
            attend: Callable[[Call, Memory], Tensor | Mixed]
            attend = self.attend_naive if self.implementation == "naive" else self.attend_torch
            may_round = self.rounds_products and self.implementation != "naive"
            with bf16_products(call.query.dtype, call.query.device) if may_round else nullcontext():
                mixed = attend(call.to(dtype), memory)
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
        around: Surroundings = NOTHING,
    ) -> Tensor:
        """What each key weighs in what each query mixes of the values, before `finish`.

        Args:
            query: `[batch, num_heads, T, head_dim]`.
            key: `[batch, num_kv_heads, S, head_dim]`.
            scaling: factor on query-key products.
            padding_mask: `[batch, S]` bool, True = real token; None when all are.
            hidden_states: `[batch, T, hidden]`, for methods that route on the layer's input.
            value: `[batch, num_kv_heads, S, value_dim]`, for methods whose weights depend on the values too.
            around: what other methods read.

        Returns:
            `[batch, num_heads, T, S]`, fp32 or fp64; rows and columns of padding are zero.
        """
        dtype = torch.promote_types(key.dtype, torch.float32)
        values = key.new_empty(*key.shape[:3], self.geometry.value_dim, dtype=dtype)

        def attend(units: Tensor) -> Tensor:
            return self._run(query, key, units, scaling, padding_mask, None, hidden_states, around, finish=False)

        return response_weights(attend, values)

    def weights_by_row(
        self, query: Tensor, key: Tensor, *, scaling: float, padding_mask: Tensor | None = None
    ) -> Iterator[Tensor]:
        """The weights of each row of the batch as if it were alone: `[num_heads, T, T]`, T its real tokens."""
        for row in range(query.shape[0]):
            keep = slice(None) if padding_mask is None else padding_mask[row]
            part = query[row : row + 1, :, keep], key[row : row + 1, :, keep]
            yield self.attention_weights(*part, scaling=scaling)[0]

    def _forget(self, state: AttentionState, dtype: torch.dtype, mixed: Mixed | None = None) -> None:
        """Fold what is too old for the tail; after a call, only what that did not fold itself."""
        evicted = None if self.tail_tokens is None else state.evict(self.tail_tokens)
        if evicted is None:
            return
        start = 0
        # The oldest keys of the call are also those that leave, but fewer leave while they are recorded.
        if mixed is not None and mixed.folded <= evicted.length:
            state.memory, start = mixed.memory, mixed.folded
        if start < evicted.length:
            state.memory = self.absorb(evicted.part(start).to(dtype), state.memory)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.options!r}, implementation={self.implementation!r}"
