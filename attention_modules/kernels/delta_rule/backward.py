"""The gradients of the gated delta rule, and the states that they and the outputs need."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chunk_linear.backward import feature_gradients, rooms, value_gradients
from ..chunk_linear.layout import Layout, contiguous, summed_gates
from ..launching import launch, power_of_two, state_dtype


@dataclass(frozen=True)
class States:
    """What a pass over all chunks gives.

    Attributes:
        corrections: solutions of each chunk's triangular system, `[states, num_chunks, chunk, chunk]`.
        sums: states before every chunk.
        errors: values less what the state before them answers to their keys, `[batch, state_heads, T, value_dim]`.
        added: what the tokens add under their keys, errors times beta.
        last: states at the end, fp32.
    """

    corrections: Tensor
    sums: Tensor
    errors: Tensor
    added: Tensor
    last: Tensor


def _walk_constants(layout: Layout) -> dict[str, Any]:
    """Whole keys are held at a time, so fewer columns of values where keys are wide."""
    width = power_of_two(layout.features)
    columns = min(layout.shared["BV"], 64 if width <= 64 else 32 if width <= 128 else 16)
    names = ("HS", "K", "V", "CHUNK", "COMPUTE", "PRECISION")
    return {**{name: layout.shared[name] for name in names}, "BD": width, "BV": columns, **layout.starts}


def forward_states(layout: Layout, keys: dict[str, Tensor | None], beta: Tensor, first: Tensor | None) -> States:
    """States and errors.

    Args:
        layout: sizes of the call.
        keys: `k`, `v`, `gates` (summed up inside chunks) and `start`.
        beta: `[batch, state_heads, T]` fp32.
        first: states before the first token or None.
    """
    from .kernels import delta_corrections, delta_states

    like, sums_dtype = beta, state_dtype(layout.dtype)
    corrections = like.new_empty((layout.states, layout.num_chunks, layout.chunk, layout.chunk), dtype=sums_dtype)
    sums = like.new_empty((layout.states, layout.num_chunks, layout.features, layout.width), dtype=sums_dtype)
    errors = like.new_empty((layout.batch, layout.state_heads, layout.length, layout.width), dtype=sums_dtype)
    last = like.new_empty((layout.sequences, layout.state_heads, layout.features, layout.width))
    names = ("HS", "K", "CHUNK", "BK", "COMPUTE", "PRECISION")
    without_values = {name: t for name, t in keys.items() if name != "v"}
    launch(
        delta_corrections,
        (layout.num_chunks, layout.states),
        {**without_values, "beta": beta, "corrections": corrections, "length": layout.length, **layout.chunks},
        {**{name: layout.shared[name] for name in names}, **layout.starts, **layout.key_heads},
        num_warps=8,
        num_stages=1,
    )
    constants = _walk_constants(layout)
    written = {"corrections": corrections, "sums": sums, "errors": errors, "last_sums": last}
    launch(
        delta_states,
        (-(-layout.width // constants["BV"]), layout.sequences * layout.state_heads),
        {**keys, "beta": beta, "first_sums": contiguous(first), **written, "length": layout.length, **layout.walks},
        {**constants, **layout.key_heads, **layout.value_heads, "HAS_FIRST": first is not None},
        num_warps=8,
        num_stages=1,
    )
    return States(corrections, sums, errors, (errors.float() * beta[..., None]).to(errors.dtype), last)


@torch.library.custom_op("attnconv::delta_rule_gradients", mutates_args=())
def delta_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    beta: Tensor,
    start: Tensor | None,
    first: Tensor | None,
    d_out: Tensor,
    d_last: Tensor | None,
    chunk: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, of keys that ask and that are asked, of errors, the errors, and the first state's gradient.

    Those of keys and values are per state head. Arguments are those of `delta_rule`, with the gates' padding masked,
    and the gradients of output and last state.
    """
    query, key, value, beta = (t.contiguous() for t in (query, key, value, beta))
    d_out = d_out.to(state_dtype(query.dtype)).contiguous()
    layout = Layout(query, key, value, gates, start, chunk, cu_seqlens)
    keys = {"k": key, "gates": summed_gates(gates, layout), "start": start}
    states = forward_states(layout, {**keys, "v": value}, beta, first)
    outputs = {**keys, "q": query, "d_out": d_out, "length": layout.length, "num_keys": layout.length, "shift": 0}
    d_query, d_key, _ = rooms(layout, query)
    d_added = torch.zeros_like(states.errors)
    value_gradients(layout, {**outputs, "weights": None, "d_sums": None}, d_added)
    d_sums, d_errors, d_first = _walk_back(layout, {**keys, "q": query, "d_out": d_out}, beta, states, d_added, d_last)
    later = {"sums": states.sums, "norms": None, "d_sums": d_sums, "d_norms": None, "d_mass": None}
    feature_gradients(layout, {**outputs, **later, "v": states.added}, d_query, d_key, value_heads=layout.state_heads)
    d_asked = _key_gradients(layout, keys, states, d_errors * beta[..., None].to(d_errors.dtype), d_key)
    return d_query, d_asked, d_key, d_errors, states.errors, d_first


@delta_gradients.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    beta: Tensor,
    start: Tensor | None,
    first: Tensor | None,
    d_out: Tensor,
    d_last: Tensor | None,
    chunk: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length = gates.shape
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_query = query.new_empty(query.shape, dtype=torch.float32)
    d_key = query.new_empty((batch, heads, length, query.shape[-1]), dtype=torch.float32)
    errors = query.new_empty((batch, heads, length, value.shape[-1]), dtype=state_dtype(query.dtype))
    d_first = query.new_empty((rows, heads, query.shape[-1], value.shape[-1]), dtype=torch.float32)
    return d_query, torch.empty_like(d_key), d_key, torch.empty_like(errors), errors, d_first


def _walk_back(
    layout: Layout,
    arguments: dict[str, Tensor | None],
    beta: Tensor,
    states: States,
    d_added: Tensor,
    d_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels import delta_state_gradients

    d_sums, d_errors = torch.empty_like(states.sums), torch.empty_like(states.errors)
    d_first = torch.empty_like(states.last)
    constants = _walk_constants(layout)
    written = {"d_sums": d_sums, "d_errors": d_errors, "d_first_sums": d_first}
    read = {"beta": beta, "corrections": states.corrections, "d_added": d_added, "d_last_sums": contiguous(d_last)}
    launch(
        delta_state_gradients,
        (-(-layout.width // constants["BV"]), layout.sequences * layout.state_heads),
        {**arguments, **read, **written, "length": layout.length, **layout.walks},
        {**constants, **layout.query_heads, **layout.key_heads, "HAS_LAST": d_last is not None},
        num_warps=8,
        num_stages=1,
    )
    return d_sums, d_errors, d_first


def _key_gradients(
    layout: Layout, keys: dict[str, Tensor | None], states: States, d_value: Tensor, d_key: Tensor
) -> Tensor:
    from .kernels import delta_key_gradients

    d_asked = torch.empty_like(d_key)
    constants = {name: t for name, t in layout.shared.items() if name != "HAS_GATES"}
    launch(
        delta_key_gradients,
        (layout.blocks_k, layout.num_chunks, layout.states),
        {
            **keys,
            **layout.chunks,
            "added": states.added,
            "sums": states.sums,
            "d_v": d_value,
            "d_asked": d_asked,
            "d_k": d_key,
            "length": layout.length,
        },
        {**constants, **layout.starts, **layout.key_heads},
        num_warps=8,
        num_stages=1,
    )
    return d_asked
