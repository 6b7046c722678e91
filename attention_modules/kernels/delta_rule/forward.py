"""The gated delta rule in chunks, in Triton, as one operator."""

from typing import Any

import torch
from torch import Tensor

from ..chunk_linear.backward import gate_gradient, pair_products, shared
from ..chunk_linear.forward import check_tensors, token_gates
from ..chunk_linear.layout import Layout, packed_sequences, summed_gates
from ..launching import default_chunk, launch, state_dtype
from ..selection import problem_with
from .backward import delta_gradients, forward_states


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_gates: Tensor,
    beta: Tensor,
    *,
    start: Tensor | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`S_t = e^{g_t} S_{t-1} + β_t k_t (v_t - k_t e^{g_t} S_{t-1})ᵀ`, `y_t = q_t S_t`.

    Args:
        query: `[batch, num_heads, T, key_dim]`.
        key: `[batch, key_heads, T, key_dim]`, of length at most 1; `key_heads` divides `num_heads`.
        value: `[batch, num_kv_heads, T, value_dim]`; `num_kv_heads` divides `key_heads`.
        log_gates: `[batch, state_heads, T]`, log of the factor on the state at every token, at most 0; `state_heads`
            divides `num_heads` and is a multiple of `key_heads`.
        beta: `[batch, state_heads, T]` in [0, 1], how much of what a key stood for is replaced.
        start: `[batch]` int32, tokens of padding that every row begins with; they leave the state as it is.
        state: before the first token, `[batch, state_heads, key_dim, value_dim]`.
        cu_seqlens: `[num_seqs + 1]` int32, where each of several sequences in one row starts, from 0 to T; every one
            has a state of its own then, `[num_seqs, state_heads, ...]`.
        chunk: tokens handled at a time, a power of two, at least 16; None chooses by the dtype.

    Returns:
        `[batch, num_heads, T, value_dim]`, and the state after the last token, fp32.

    Raises:
        ValueError: head counts that do not divide each other, packed sequences in several rows or behind padding, or
            the kernels do not take such tensors.
    """
    check_tensors(query, key, value, start, cu_seqlens)
    dims = query.shape[-1], value.shape[-1]
    problem = problem_with(query, key, value, dims=dims, sequences=packed_sequences(cu_seqlens))
    if problem is not None:
        raise ValueError(f"the kernels cannot follow the delta rule: {problem}")
    gates = token_gates(query, None, log_gates, start)
    first = None if state is None else state.float()
    chunk = chunk or default_chunk(query.dtype)
    out, last = _forward(query, key, value, gates, beta.float(), start, first, chunk, cu_seqlens)
    return out, last


@torch.library.custom_op("attnconv::delta_rule", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    beta: Tensor,
    start: Tensor | None,
    first: Tensor | None,
    chunk: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from ..chunk_linear.chunk_kernels import chunk_outputs

    query, key, value, beta = (t.contiguous() for t in (query, key, value, beta))
    layout = Layout(query, key, value, gates, start, chunk, cu_seqlens)
    keys = {"k": key, "gates": summed_gates(gates, layout), "start": start}
    states = forward_states(layout, {**keys, "v": value}, beta, first)
    out = query.new_empty((*query.shape[:3], layout.width), dtype=state_dtype(query.dtype))
    arguments = {**keys, "q": query, "v": states.added, "weights": None, "sums": states.sums, "norms": None}
    sizes = {"length": layout.length, "num_keys": layout.length, "shift": 0}
    heads = {**layout.query_heads, **layout.key_heads, "HV": layout.state_heads}
    launch(
        chunk_outputs,
        (layout.blocks_v, layout.num_chunks, layout.batch * layout.heads),
        {**arguments, **layout.chunks, **sizes, "numerator": out, "denominator": None},
        {**layout.shared, **layout.vector, **layout.starts, **heads},
    )
    return out, states.last


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor,
    beta: Tensor,
    start: Tensor | None,
    first: Tensor | None,
    chunk: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = query.new_empty((rows, gates.shape[1], query.shape[-1], value.shape[-1]), dtype=torch.float32)
    return query.new_empty((*query.shape[:3], value.shape[-1]), dtype=state_dtype(query.dtype)), state


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.chunk, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, output[1])


def _backward(ctx: Any, d_out: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, gates, beta, start, first, cu_seqlens, last = ctx.saved_tensors
    d_out = torch.zeros_like(query[..., :1]).expand(*query.shape[:3], value.shape[-1]) if d_out is None else d_out
    tensors = query, key, value, gates, beta, start, first, d_out, d_last
    d_query, d_asked, d_key, d_errors, errors, d_first = delta_gradients(*tensors, ctx.chunk, cu_seqlens)
    heads = gates.shape[1]
    # A key that asks stands for one more query of its state.
    asking = key.float().repeat_interleave(heads // key.shape[1], 1) * d_asked
    weight = None if d_last is None else (d_last * last).sum(-1)
    d_gates = gate_gradient(pair_products(query, key, d_query, d_key, heads) + asking, weight, cu_seqlens)
    return (
        d_query.to(query.dtype),
        shared(d_asked + d_key, key.shape[1]).to(key.dtype),
        shared(d_errors.float() * beta[..., None], value.shape[1]).to(value.dtype),
        d_gates.to(gates.dtype),
        (d_errors.float() * errors.float()).sum(-1),
        None,
        None if first is None else d_first,
        None,
        None,
    )


_forward.register_autograd(_backward, setup_context=_remember)
