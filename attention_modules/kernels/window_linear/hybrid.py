"""The hybrid of LoLCATs as one operator: softmax in a sliding window, linear attention before it, one normaliser."""

import math
from typing import Any

import torch
from torch import Tensor

from ...window import LOG2E, absolute_factors
from ..chunk_linear.backward import chunk_gradients, shared
from ..chunk_linear.layout import Layout, contiguous, run_states
from ..launching import default_chunk, launch, power_of_two, state_dtype

Terms = tuple[Tensor, Tensor]


def hybrid_window_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gamma: Tensor,
    *,
    scaling: float,
    window: int,
    start: Tensor | None = None,
    memory: Terms | None = None,
    chunk: int | None = None,
    absolute: bool = False,
) -> Tensor:
    """`[γ Σ_W e^{s q·k - c} v + Σ_P φ(q)·φ(k) v]` over the same with 1 for v; W = the last `window` tokens, P = before.

    Query `t` of T stands at key `S - T + t`. Rows that see nothing are zero.

    Args:
        query: `[batch, num_heads, T, head_dim]`.
        key: `[batch, num_kv_heads, S, head_dim]`, with `S - T` at most `window`.
        value: `[batch, num_kv_heads, S, value_dim]`.
        query_features: φ(q) `[batch, num_heads, T, feature_dim]`.
        key_features: φ(k) `[batch, key_heads, S, feature_dim]`.
        gamma: `[num_heads]`, factor on the softmax terms; if these are absolute, its logarithm to base 2.
        scaling: factor on query-key products.
        window: tokens attended exactly, the query's own included.
        start: `[batch]` int32, tokens of padding that the keys of every row begin with.
        memory: sums `[batch, key_heads, feature_dim, value_dim]` and `[batch, key_heads, feature_dim]` over all tokens
            before `key`.
        chunk: tokens handled at a time, a power of two, at least 16; None chooses by dtype and size.
        absolute: take `c = 0`, instead of the largest logit of each query's window.

    Returns:
        `[batch, num_heads, T, value_dim]` in the dtype of `value`.

    Raises:
        ValueError: there are keys before the first query's window; they belong into `memory`.
    """
    before = key.shape[2] - query.shape[2]
    if not 0 <= before <= window:
        raise ValueError(f"{key.shape[2]} keys do not fit {query.shape[2]} queries with a window of {window}")
    chunk = chunk or hybrid_chunk(query, value)
    sums, norm = (None, None) if memory is None else (memory[0].float(), memory[1].float())
    tensors = query, key, value, query_features.to(query.dtype), key_features.to(query.dtype), gamma.float()
    out: Tensor = _forward(*tensors, start, sums, norm, scaling, window, chunk, wants_rest(query), absolute)[0]
    return out


def wants_rest(query: Tensor) -> bool:
    """Whether what outputs lose by rounding is to be kept: gradients take small differences of them."""
    return query.dtype != torch.float32 and torch.is_grad_enabled()


def hybrid_chunk(query: Tensor, value: Tensor) -> int:
    """Tokens handled at a time: fewer where rows are wide, for whole rows are held."""
    widest = max(query.shape[-1], value.shape[-1])
    return default_chunk(query.dtype) // (2 if widest > (128 if query.dtype == torch.bfloat16 else 64) else 1)


def _sizes(query: Tensor, key: Tensor, scaling: float, window: int) -> dict[str, Any]:
    length, num_keys = query.shape[2], key.shape[2]
    sizes = {"length": length, "num_keys": num_keys, "offset": num_keys - length, "window": window}
    return {"scale": scaling * LOG2E, **sizes}


def _blocks(query: Tensor, value: Tensor) -> dict[str, int]:
    return {"D": query.shape[-1], "BD": power_of_two(query.shape[-1]), "BV": min(128, power_of_two(value.shape[-1]))}


@torch.library.custom_op("attnconv::hybrid_window_linear", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gamma: Tensor,
    start: Tensor | None,
    first_sums: Tensor | None,
    first_norm: Tensor | None,
    scaling: float,
    window: int,
    chunk: int,
    keeps_rest: bool,
    absolute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .hybrid_kernels import hybrid_outputs

    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    query_features, key_features = query_features.contiguous(), key_features.contiguous()
    layout = Layout(query_features, key_features, value, None, start, chunk)
    sizes = _sizes(query, key, scaling, window)
    linear = {"length": layout.length, "num_keys": layout.num_keys, "shift": sizes["offset"] - window}
    arguments = {"k": key_features, "v": value, "gates": None, "start": start, **linear}
    (sums, norms), _ = run_states(layout, arguments, contiguous(first_sums), contiguous(first_norm))
    out, rest, mass, peak, best = outputs(query, value, keeps_rest)
    constants = {**layout.shared, **layout.starts, **layout.query_heads, **layout.key_heads, **layout.value_heads}
    constants = {**constants, **_blocks(query, value)}
    # Half the columns of features: queries and outputs are held beside them.
    constants["BK"] = max(16, constants["BK"] // 2)
    if chunk == 32 and query.dtype != torch.bfloat16:
        constants["BV"] = min(32, constants["BV"])
    del constants["HAS_GATES"]
    constants["ABSOLUTE"] = absolute
    launch(
        hybrid_outputs,
        (-(-layout.width // constants["BV"]), layout.num_chunks, layout.batch * layout.heads),
        {
            "q": query,
            "k": key,
            "v": value,
            "query_features": query_features,
            "key_features": key_features,
            "gamma": gamma.contiguous(),
            "start": start,
            "sums": sums,
            "norms": norms,
            "out": out,
            "rest": rest if keeps_rest else None,
            "mass_out": mass,
            "peak_out": peak,
            "best_out": best,
            **sizes,
        },
        constants,
        num_warps=8,
    )
    return out, rest, mass, peak, best


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_features: Tensor,
    key_features: Tensor,
    gamma: Tensor,
    start: Tensor | None,
    first_sums: Tensor | None,
    first_norm: Tensor | None,
    scaling: float,
    window: int,
    chunk: int,
    keeps_rest: bool,
    absolute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return outputs(query, value, keeps_rest)


def outputs(query: Tensor, value: Tensor, keeps_rest: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for outputs, what they lose by rounding, normalisers, largest logits and where those stand."""
    out = value.new_empty((*query.shape[:3], value.shape[-1]))
    rest = torch.empty_like(out) if keeps_rest else out.new_empty(0)
    mass, peak = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
    return out, rest, mass, peak, torch.empty_like(peak, dtype=torch.int32)


@torch.library.custom_op("attnconv::window_gradients", mutates_args=())
def window_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    start: Tensor | None,
    d_out: Tensor,
    d_mass: Tensor,
    peak: Tensor,
    best: Tensor,
    scaling: float,
    window: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value through the softmax terms, and every row's response to a factor on them."""
    from .hybrid_kernels import window_key_gradients, window_query_gradients

    query, key, value, d_out = (t.contiguous() for t in (query, key, value, d_out))
    layout = Layout(query, key, value, None, start, chunk)
    used = ("V", "CHUNK", "COMPUTE", "PRECISION")
    constants = {name: layout.shared[name] for name in used} | _blocks(query, value)
    constants |= {**layout.starts, **layout.query_heads, **layout.value_heads}
    d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    response = torch.empty_like(peak)
    arguments: dict[str, Any] = {"q": query, "k": key, "v": value}
    arguments |= {"gamma": gamma.contiguous(), "start": start, "d_out": d_out}
    arguments |= {"d_mass": d_mass.contiguous(), "peak": peak, "best": best, "response": response}
    arguments |= {"scaling": scaling, **_sizes(query, key, scaling, window)}
    grid = layout.num_chunks, layout.batch * layout.heads
    warps = 4 if chunk == 16 else 8
    launch(window_query_gradients, grid, {**arguments, "d_q": d_query}, constants, num_warps=warps)
    # All columns of two gradients at a time leave room for fewer rows.
    rows = 32 if chunk == 64 and max(query.shape[-1], layout.width) > 64 else chunk
    constants |= {"BV": power_of_two(layout.width), "CHUNK": rows}
    grid = -(-layout.num_keys // rows), layout.batch * value.shape[1]
    arguments |= {"d_k": d_key, "d_v": d_value}
    launch(window_key_gradients, grid, arguments, constants, num_warps=4 if rows == 32 else 8)
    return d_query, d_key, d_value, response


@window_gradients.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: Tensor,
    start: Tensor | None,
    d_out: Tensor,
    d_mass: Tensor,
    peak: Tensor,
    best: Tensor,
    scaling: float,
    window: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (query, key, value, peak))  # type: ignore[return-value]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scaling, ctx.window, ctx.chunk, _, ctx.absolute = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, d_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    sizes = ctx.scaling, ctx.window, ctx.chunk, ctx.absolute
    gradients, d_memory = hybrid_gradients(ctx.saved_tensors, d_out, *sizes)
    return *gradients, None, *d_memory, None, None, None, None, None


def hybrid_gradients(
    saved: tuple[Tensor, ...], d_out: Tensor, scaling: float, window: int, chunk: int, absolute: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, Tensor | None]]:
    """Gradients of query, key, value, both features and gamma; and of both sums.

    Args:
        saved: what the forward pass took and gave: query, key, value, both features, gamma, start, both sums, output,
            what that lost by rounding, normaliser, largest logits and their rows.
        d_out: gradient of the output.
        scaling: factor on query-key products.
        window: tokens attended exactly.
        chunk: tokens handled at a time.
        absolute: whether the softmax terms are.
    """
    query, key, value, query_features, key_features, gamma, start, sums, norm, out, rest, mass, peak, best = saved
    # The fraction's two sides: numerator and normaliser. What all terms of a row get adds up to zero only if the second
    # is made of the first as it is rounded, and of the output before it was.
    inverse = torch.where(mass == 0, 0.0, 1 / mass)[..., None]
    exact = out.float() + rest.float() if rest.numel() else out.float()

    def sides(factor: Tensor | None) -> Terms:
        d_above = d_out.float() * (inverse if factor is None else inverse * factor[..., None])
        d_above = d_above.to(state_dtype(query.dtype))
        return d_above, -(d_above.float() * exact).sum(-1)

    share = gamma
    if absolute:
        window_sides, past_sides = (sides(factor) for factor in absolute_factors(gamma, peak))
        # γ is among the rows' factors, and what no term is relative to gets no gradient.
        share, best = torch.ones_like(gamma), torch.full_like(best, -1)
    else:
        window_sides = past_sides = sides(None)
    d_query, d_key, d_value, response = window_gradients(
        query, key, value, share, start, *window_sides, peak, best, scaling, window, chunk
    )
    d_gamma = response.sum((0, 2)) * (math.log(2) if absolute else 1.0)
    shift = key.shape[2] - query.shape[2] - window
    d_query_features, d_key_features, d_past_value, d_sums, d_norm = chunk_gradients(
        query_features, key_features, value, None, start, sums, norm, *past_sides, None, None, shift, chunk
    )
    d_value = d_value + shared(d_past_value, value.shape[1])
    d_memory = (None, None) if sums is None else (d_sums, d_norm)
    return (d_query, d_key, d_value, d_query_features, d_key_features, d_gamma), d_memory


_forward.register_autograd(_backward, setup_context=_remember)
