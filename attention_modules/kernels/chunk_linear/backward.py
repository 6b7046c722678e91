"""The gradients of causal linear attention: three Triton passes as one operator."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launching import launch, state_dtype
from .layout import Layout, chunk_weights, contiguous, owners, run_states, summed_gates


@torch.library.custom_op("attnconv::chunk_linear_gradients", mutates_args=())
def chunk_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor | None,
    start: Tensor | None,
    first_sums: Tensor | None,
    first_norm: Tensor | None,
    d_out: Tensor,
    d_mass: Tensor,
    d_last_sums: Tensor | None,
    d_last_norm: Tensor | None,
    shift: int,
    chunk: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value (the last two per state head) and of the sums at the start.

    Args:
        query: `[batch, num_heads, T, feature_dim]`.
        key: `[batch, key_heads, S, feature_dim]`.
        value: `[batch, num_kv_heads, S, value_dim]`.
        gates: log decays `[batch, state_heads, T]` or `[..., feature_dim]`, or None.
        start: `[batch]` int32 or None.
        first_sums: sums over earlier tokens or None.
        first_norm: the same of the keys alone.
        d_out: gradient of the numerator.
        d_mass: gradient of the denominator.
        d_last_sums: gradient of the sums at the end or None.
        d_last_norm: the same of the keys alone.
        shift: query `t` sees keys up to `t + shift`.
        chunk: tokens whose weights are written out.
        cu_seqlens: where packed sequences start, or None.
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    d_out, d_mass = d_out.to(state_dtype(query.dtype)).contiguous(), d_mass.float().contiguous()
    layout = Layout(query, key, value, gates, start, chunk, cu_seqlens)
    shared_gates = summed_gates(gates, layout)
    keys = {"k": key, "v": value, "gates": shared_gates, "start": start}
    sizes = {"length": layout.length, "num_keys": layout.num_keys, "shift": shift}
    (sums, norms), _ = run_states(layout, {**keys, **sizes}, contiguous(first_sums), contiguous(first_norm))
    later, first = _state_gradients(layout, query, shared_gates, d_out, d_mass, d_last_sums, d_last_norm)
    d_query, d_key, d_value = rooms(layout, query)
    feature_gradients(
        layout,
        {"q": query, **keys, "sums": sums, "norms": norms, "d_out": d_out, "d_mass": d_mass, **later, **sizes},
        d_query,
        d_key,
    )
    value_gradients(
        layout,
        {
            "q": query,
            "k": key,
            "gates": shared_gates,
            "start": start,
            "weights": chunk_weights(layout, query, keys),
            "d_out": d_out,
            "d_sums": later["d_sums"],
            **sizes,
        },
        d_value,
    )
    return d_query, d_key, d_value, *first


@chunk_gradients.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gates: Tensor | None,
    start: Tensor | None,
    first_sums: Tensor | None,
    first_norm: Tensor | None,
    d_out: Tensor,
    d_mass: Tensor,
    d_last_sums: Tensor | None,
    d_last_norm: Tensor | None,
    shift: int,
    chunk: int,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads = max(key.shape[1], 0 if gates is None else gates.shape[1])
    batch, _, num_keys, features = key.shape
    dtype = torch.float32 if gates is not None else query.dtype
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sums = query.new_empty((rows, heads, features, value.shape[-1]), dtype=torch.float32)
    d_key = query.new_empty((batch, heads, num_keys, features), dtype=dtype)
    d_value = query.new_empty((batch, heads, num_keys, value.shape[-1]), dtype=query.dtype)
    return query.new_empty(query.shape, dtype=dtype), d_key, d_value, sums, torch.empty_like(sums[..., 0])


def rooms(layout: Layout, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For the gradients of queries, keys and values, the last two per state head."""
    # Gradients of gates are small differences of these products, which bf16 would drown.
    dtype = torch.float32 if layout.shared["HAS_GATES"] else like.dtype
    keys = layout.batch, layout.state_heads, layout.num_keys
    d_key = like.new_zeros((*keys, layout.features), dtype=dtype)
    return like.new_empty(like.shape, dtype=dtype), d_key, like.new_zeros((*keys, layout.width))


def _state_gradients(
    layout: Layout,
    query: Tensor,
    gates: Tensor | None,
    d_out: Tensor,
    d_mass: Tensor,
    d_last_sums: Tensor | None,
    d_last_norm: Tensor | None,
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    from .gradient_kernels import chunk_state_gradients

    (d_sums, d_norms), (d_first_sums, d_first_norm) = layout.sums(query), layout.last(query)
    launch(
        chunk_state_gradients,
        (layout.blocks_k, layout.blocks_v, layout.sequences * layout.state_heads),
        {
            "q": query,
            "gates": gates,
            **layout.walks,
            "d_out": d_out,
            "d_mass": d_mass,
            "d_last_sums": contiguous(d_last_sums),
            "d_last_norm": contiguous(d_last_norm),
            "d_sums": d_sums,
            "d_norms": d_norms,
            "d_first_sums": d_first_sums,
            "d_first_norm": d_first_norm,
            "length": layout.length,
        },
        {**layout.shared, **layout.vector, **layout.query_heads, "HAS_LAST": d_last_sums is not None},
        num_warps=8,
        num_stages=3,
    )
    return {"d_sums": d_sums, "d_norms": d_norms}, (d_first_sums, d_first_norm)


def feature_gradients(
    layout: Layout,
    arguments: dict[str, Any],
    d_query: Tensor,
    d_key: Tensor,
    *,
    value_heads: int | None = None,
) -> None:
    """Write the gradients of queries and keys; `arguments` are the kernel's, and values may have heads of their own."""
    from .gradient_kernels import chunk_feature_gradients
    from .vector_kernels import vector_feature_gradients

    heads = {**layout.query_heads, **layout.key_heads, "HV": value_heads or layout.value_heads["HV"]}
    arguments = {**arguments, **layout.chunks, "d_q": d_query, "d_k": d_key}
    constants = {**layout.shared, **layout.starts, **heads}
    # Half the columns of other kernels or fewer: these hold the most tiles at a time.
    if layout.vector["VECTOR"]:
        kernel, columns, warps = vector_feature_gradients, 16, 4
        del arguments["num_keys"], arguments["shift"], constants["HAS_GATES"]
    else:
        kernel, columns, warps = chunk_feature_gradients, max(16, layout.shared["BK"] // 2), 8
    if layout.width > 128:
        columns, constants["BV"] = 16, min(32, constants["BV"])
    grid = -(-layout.features // columns), layout.num_chunks, layout.states
    launch(kernel, grid, arguments, {**constants, "BK": columns}, num_warps=warps, num_stages=1)


def value_gradients(layout: Layout, arguments: dict[str, Any], d_value: Tensor) -> None:
    """Write the gradients of values; `arguments` are the kernel's."""
    from .gradient_kernels import chunk_value_gradients

    launch(
        chunk_value_gradients,
        (layout.blocks_v, layout.num_chunks, layout.states),
        {**arguments, **layout.chunks, "d_v": d_value},
        {**layout.shared, **layout.vector, **layout.starts, **layout.query_heads, **layout.key_heads},
        num_warps=8,
    )


def pair_products(query: Tensor, key: Tensor, d_query: Tensor, d_key: Tensor, heads: int) -> Tensor:
    """What a token's queries less its keys have to do with the outputs: `[batch, heads, T, feature_dim]`."""
    by_query: Tensor = (query.float() * d_query.float()).unflatten(1, (heads, -1)).sum(2)
    return by_query - key.float().repeat_interleave(heads // key.shape[1], 1) * d_key.float()


def gate_gradient(
    products: Tensor, last: Tensor | None, cu_seqlens: Tensor | None, *, channels: bool = False
) -> Tensor:
    """Gradient of the log decay of every token.

    A factor at token t acts on all pairs of a query at or after t and a key before it, and on the sums at the end.

    Args:
        products: `[batch, heads, T, feature_dim]` from `pair_products`.
        last: `[rows or num_seqs, heads, feature_dim]`, sums at the end times their gradient, or None.
        cu_seqlens: where packed sequences start, or None.
        channels: whether each channel has a gate of its own.
    """
    if not channels:
        products, last = products.sum(-1, keepdim=True), None if last is None else last.sum(-1, keepdim=True)
    later: Tensor = products.flip(2).cumsum(2).flip(2)
    if cu_seqlens is not None:
        owner = owners(cu_seqlens, products.shape[2])
        # What belongs to later sequences is taken off again.
        later = later - F.pad(later, (0, 0, 0, 1))[:, :, cu_seqlens[owner + 1]]
        last = None if last is None else last[owner].transpose(0, 1)
    elif last is not None:
        last = last[:, :, None]
    later = later if last is None else later + last
    return later if channels else later.squeeze(-1)


def shared(gradient: Tensor, heads: int) -> Tensor:
    """Sum over the heads that share a key or value."""
    if gradient.shape[1] == heads:
        return gradient
    total: Tensor = gradient.unflatten(1, (heads, -1)).sum(2)
    return total
