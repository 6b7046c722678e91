"""Causal linear attention on mapped features: two Triton passes (sums before each chunk, outputs) as one operator."""

from typing import Any

import torch
from torch import Tensor

from ..launching import default_chunk, launch, state_dtype
from ..selection import problem_with, use_triton
from .backward import chunk_gradients, gate_gradient, pair_products, shared
from .layout import VECTOR_CHUNK, Layout, chunk_weights, contiguous, packed_sequences, run_states, summed_gates
from .reference import chunk_linear_torch, packed_linear_torch

Terms = tuple[Tensor, Tensor]


def chunk_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    log_decay: Tensor | None = None,
    log_gates: Tensor | None = None,
    start: Tensor | None = None,
    memory: Terms | None = None,
    cu_seqlens: Tensor | None = None,
    implementation: str = "auto",
    chunk: int | None = None,
) -> tuple[Terms, Terms]:
    """Causal linear attention: `S_t = e^{g_t} S_{t-1} + k_t v_tᵀ`, numerator `q_t S_t`; the denominator has 1 for v.

    Args:
        query: `[batch, num_heads, T, feature_dim]`, mapped.
        key: `[batch, key_heads, T, feature_dim]`, mapped; `key_heads` divides `num_heads`.
        value: `[batch, num_kv_heads, T, value_dim]`; `num_kv_heads` divides `key_heads`.
        log_decay: `[num_heads]` or `[key_heads]`, log of the factor on the sums at every token, at most 0.
        log_gates: `[batch, num_heads, T]` or `[batch, key_heads, T]`, the same per token, or `[..., feature_dim]` for
            each channel of the features; both add up.
        start: `[batch]` int32, tokens of padding that every row begins with; they neither add nor decay.
        memory: sums over earlier tokens, `[batch, state_heads, feature_dim, value_dim]` and
            `[batch, state_heads, feature_dim]`; `state_heads` is that of the gates, else `key_heads`.
        cu_seqlens: `[num_seqs + 1]` int32, where each of several sequences in one row starts, from 0 to T; every one
            has sums of its own then, `[num_seqs, state_heads, ...]`.
        implementation: `"auto"`, `"torch"` or `"triton"`.
        chunk: tokens whose weights are written out, a power of two, at least 16; None chooses by dtype and gates.

    Returns:
        numerator `[batch, num_heads, T, value_dim]` and denominator `[batch, num_heads, T]`; and the sums over all
        tokens, fp32, in the shapes of `memory`.

    Raises:
        ValueError: head counts that do not divide each other, packed sequences in several rows or behind padding, or
            Triton was demanded and cannot be had.
    """
    check_tensors(query, key, value, start, cu_seqlens)
    gates = token_gates(query, log_decay, log_gates, start)
    if chunk is None:
        chunk = default_chunk(query.dtype) if gates is None or gates.ndim == 3 else VECTOR_CHUNK
    sizes = {"features": query.shape[-1], "sequences": packed_sequences(cu_seqlens)}
    problem = problem_with(query, key, value, dims=(value.shape[-1],), **sizes)
    if not use_triton(implementation, problem, query.device):
        if cu_seqlens is not None:
            return packed_linear_torch(query, key, value, gates, memory, cu_seqlens, chunk)
        return chunk_linear_torch(query, key, value, gates, start, memory, chunk)
    sums, norm = (None, None) if memory is None else (memory[0].float(), memory[1].float())
    tensors = query, key, value, gates, start, sums, norm
    numerator, denominator, last_sums, last_norm = _forward(*tensors, chunk, cu_seqlens)
    return (numerator, denominator), (last_sums, last_norm)


def token_gates(
    query: Tensor, log_decay: Tensor | None, log_gates: Tensor | None, start: Tensor | None
) -> Tensor | None:
    """Log decay of every token `[batch, heads, T]` or `[..., feature_dim]`, 0 at padding; None when nothing decays."""
    if log_decay is None and log_gates is None:
        return None
    batch, _, length, _ = query.shape
    channels = [1] * (0 if log_gates is None else log_gates.ndim - 3)
    gates = query.new_zeros(1, 1, 1, *channels, dtype=torch.promote_types(query.dtype, torch.float32))
    for given in (log_gates, None if log_decay is None else log_decay.view(1, -1, 1, *channels)):
        gates = gates if given is None else gates + given
    gates = gates.expand(batch, -1, length, *gates.shape[3:])
    if start is None:
        return gates
    padding = torch.arange(length, device=query.device) < start[:, None]
    return gates.masked_fill(padding.view(batch, 1, length, *channels), 0.0)


def check_tensors(query: Tensor, key: Tensor, value: Tensor, start: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Refuse what does not fit together.

    Raises:
        ValueError: as said by `chunk_linear`.
    """
    heads = query.shape[1], key.shape[1], value.shape[1]
    if heads[0] % heads[1] or heads[1] % heads[2]:
        raise ValueError(f"heads of query, key and value must divide each other in this order, got {heads}")
    if not query.shape[2] == key.shape[2] == value.shape[2]:
        raise ValueError(f"query, key and value have {query.shape[2]}, {key.shape[2]} and {value.shape[2]} tokens")
    if cu_seqlens is None:
        return
    if query.shape[0] != 1 or start is not None:
        raise ValueError(
            "packed sequences stand in one row without padding, "
            f"but there are {query.shape[0]} rows{'' if start is None else ' and a start of each'}"
        )
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must be int32 [num_seqs + 1], but it is {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )


@torch.library.custom_op("attnconv::chunk_linear", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor | None,
    start: Tensor | None,
    first_sums: Tensor | None,
    first_norm: Tensor | None,
    chunk: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .chunk_kernels import chunk_outputs

    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    layout = Layout(query, key, value, gates, start, chunk, cu_seqlens)
    common = {"k": key, "v": value, "gates": summed_gates(gates, layout), "start": start}
    sizes = {"length": layout.length, "num_keys": layout.num_keys, "shift": 0}
    first = contiguous(first_sums), contiguous(first_norm)
    (sums, norms), (last_sums, last_norm) = run_states(layout, {**common, **sizes}, *first)
    numerator = query.new_empty((*query.shape[:3], layout.width), dtype=state_dtype(query.dtype))
    denominator = query.new_empty(query.shape[:3], dtype=torch.float32)
    written = {"sums": sums, "norms": norms, "numerator": numerator, "denominator": denominator}
    launch(
        chunk_outputs,
        (layout.blocks_v, layout.num_chunks, layout.batch * layout.heads),
        {"q": query, **common, **layout.chunks, "weights": chunk_weights(layout, query, common), **written, **sizes},
        {
            **layout.shared,
            **layout.vector,
            **layout.starts,
            **layout.query_heads,
            **layout.key_heads,
            **layout.value_heads,
        },
    )
    return numerator, denominator, last_sums, last_norm


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor | None,
    start: Tensor | None,
    first_sums: Tensor | None,
    first_norm: Tensor | None,
    chunk: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = max(key.shape[1], 0 if gates is None else gates.shape[1])
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sums = query.new_empty((rows, heads, query.shape[-1], value.shape[-1]), dtype=torch.float32)
    numerator = query.new_empty((*query.shape[:3], value.shape[-1]), dtype=state_dtype(query.dtype))
    return numerator, query.new_empty(query.shape[:3], dtype=torch.float32), sums, torch.empty_like(sums[..., 0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.chunk, cu_seqlens = inputs
    # With gates, what the last sums weigh is part of every gate's gradient.
    last = output[2:] if inputs[3] is not None else (None, None)
    ctx.save_for_backward(*tensors, cu_seqlens, *last)


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, gates, start, first_sums, first_norm, cu_seqlens, last_sums, last_norm = ctx.saved_tensors
    d_out, d_mass, d_last_sums, d_last_norm = gradients
    d_out = torch.zeros_like(query[..., :1]).expand(*query.shape[:3], value.shape[-1]) if d_out is None else d_out
    d_mass = query.new_zeros(query.shape[:3], dtype=torch.float32) if d_mass is None else d_mass
    if d_last_sums is None and d_last_norm is not None:
        d_last_sums = d_last_norm.new_zeros(*d_last_norm.shape, value.shape[-1])
    if d_last_norm is None and d_last_sums is not None:
        d_last_norm = torch.zeros_like(d_last_sums[..., 0])
    d_query, d_key, d_value, d_first_sums, d_first_norm = chunk_gradients(
        query,
        key,
        value,
        gates,
        start,
        first_sums,
        first_norm,
        d_out,
        d_mass,
        d_last_sums,
        d_last_norm,
        0,
        ctx.chunk,
        cu_seqlens,
    )
    d_gates = None
    if gates is not None:
        weight = None
        if d_last_sums is not None and d_last_norm is not None:
            weight = (d_last_sums * last_sums).sum(-1) + d_last_norm * last_norm
        products = pair_products(query, key, d_query, d_key, gates.shape[1])
        d_gates = gate_gradient(products, weight, cu_seqlens, channels=gates.ndim == 4)
    firsts = (None, None) if first_sums is None else (d_first_sums, d_first_norm)
    d_key, d_value = shared(d_key, key.shape[1]), shared(d_value, value.shape[1])
    return (
        d_query.to(query.dtype),
        d_key.to(key.dtype),
        d_value.to(value.dtype),
        None if d_gates is None else d_gates.to(gates.dtype),
        None,
        *firsts,
        None,
        None,
    )


_forward.register_autograd(_backward, setup_context=_remember)
