"""The hybrid of LoLCATs with its hedgehog maps inside the kernels: features are written out for gradients only."""

from typing import Any

import torch
from torch import Tensor

from ...window import LOG2E
from ..chunk_linear.layout import contiguous
from ..launching import block, launch, power_of_two, precision, state_dtype
from .hybrid import hybrid_chunk, hybrid_gradients, outputs, wants_rest

Terms = tuple[Tensor, Tensor]
# What fits into registers beside the maps' matrices, by compiling for GPUs: see benchmarks/kernels_static.py.
MAX_FUSED_DIM = {torch.bfloat16: 256, torch.float16: 128, torch.float32: 64}


def hedgehog_window_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    gamma: Tensor,
    *,
    scaling: float,
    window: int,
    start: Tensor | None = None,
    memory: Terms | None = None,
    chunk: int | None = None,
    absolute: bool = False,
) -> Tensor:
    """What `hybrid_window_linear` gives for `φ(x) = [softmax(xW), softmax(-xW)]`.

    Args:
        query: `[batch, num_heads, T, head_dim]`, head_dim at most `MAX_FUSED_DIM`.
        key: `[batch, num_kv_heads, S, head_dim]`, with `S - T` at most `window`.
        value: `[batch, num_kv_heads, S, value_dim]`.
        query_weight: `[num_heads, head_dim, feature_dim]`, feature_dim likewise.
        key_weight: `[state_heads, head_dim, feature_dim]`.
        gamma: `[num_heads]`, factor on the softmax terms; if these are absolute, its logarithm to base 2.
        scaling: factor on query-key products.
        window: tokens attended exactly, the query's own included.
        start: `[batch]` int32, tokens of padding that the keys of every row begin with.
        memory: sums over all tokens before `key`, as for `hybrid_window_linear`.
        chunk: tokens handled at a time; None chooses by dtype and size.
        absolute: take the softmax terms as they are.

    Returns:
        `[batch, num_heads, T, value_dim]` in the dtype of `value`.

    Raises:
        ValueError: sizes are too large, or keys stand before the first query's window.
    """
    before = key.shape[2] - query.shape[2]
    if not 0 <= before <= window:
        raise ValueError(f"{key.shape[2]} keys do not fit {query.shape[2]} queries with a window of {window}")
    problem = fused_problem(query, value, query_weight)
    if problem is not None:
        raise ValueError(f"the maps cannot be inside the kernels: {problem}")
    chunk = chunk or fused_chunk(query, value)
    sums, norm = (None, None) if memory is None else (memory[0].float(), memory[1].float())
    weights = query_weight.to(query.dtype), key_weight.to(query.dtype)
    tensors = query, key, value, *weights, gamma.float()
    out: Tensor = _forward(*tensors, start, sums, norm, scaling, window, chunk, wants_rest(query), absolute)[0]
    return out


def fused_problem(query: Tensor, value: Tensor, weight: Tensor) -> str | None:
    """Why the maps cannot be inside the kernels, or None."""
    widest, most = max(query.shape[-1], value.shape[-1], weight.shape[-1]), MAX_FUSED_DIM.get(query.dtype, 0)
    return f"a vector of {query.dtype} has {widest} numbers, and there is room for {most}" if widest > most else None


def fused_chunk(query: Tensor, value: Tensor, major: int | None = None) -> int:
    """Tokens handled at a time; GPUs before compute capability 9.0 hold half as many.

    Args:
        query: `[..., head_dim]`.
        value: `[..., value_dim]`.
        major: first number of the compute capability; None asks the device.
    """
    if query.dtype != torch.bfloat16 or max(query.shape[-1], value.shape[-1]) > 128:
        return 16
    if major is None:
        major = torch.cuda.get_device_capability(query.device)[0] if query.device.type == "cuda" else 9
    return hybrid_chunk(query, value) // (2 if major < 9 else 1)


@torch.library.custom_op("attnconv::hedgehog_window_linear", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
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
    from .fused_kernels import hedgehog_hybrid_outputs, hedgehog_states

    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    batch, heads, length, head_dim = query.shape
    num_keys, width, features, states = key.shape[2], value.shape[-1], key_weight.shape[-1], batch * key_weight.shape[0]
    num_chunks = -(-length // chunk)
    norms = query.new_empty((states, num_chunks, 2 * features), dtype=torch.float32)
    sums = query.new_empty((*norms.shape, width), dtype=state_dtype(query.dtype))
    constants = {"HS": key_weight.shape[0], "HV": value.shape[1], "D": head_dim, "F": features, "V": width}
    constants |= {"CHUNK": chunk, "STEP": block(head_dim, query.dtype), "BF": power_of_two(features)}
    constants |= {"BV": block(width, query.dtype), "HAS_START": start is not None, **precision(query.dtype)}
    shared = {"k": key, "v": value, "key_weight": key_weight.contiguous(), "start": start, "sums": sums, "norms": norms}
    blocks = -(-width // constants["BV"])
    shift = num_keys - length - window
    launch(
        hedgehog_states,
        (2, blocks, states),
        {
            **shared,
            "first_sums": contiguous(first_sums),
            "first_norm": contiguous(first_norm),
            "length": length,
            "num_keys": num_keys,
            "shift": shift,
        },
        {**constants, "HAS_FIRST": first_sums is not None},
        num_warps=8,
        num_stages=1,
    )
    out, rest, mass, peak, best = outputs(query, value, keeps_rest)
    launch(
        hedgehog_hybrid_outputs,
        (blocks, num_chunks, batch * heads),
        {
            **shared,
            "q": query,
            "query_weight": query_weight.contiguous(),
            "gamma": gamma.contiguous(),
            "out": out,
            "rest": rest if keeps_rest else None,
            "mass_out": mass,
            "peak_out": peak,
            "best_out": best,
            "scale": scaling * LOG2E,
            "length": length,
            "num_keys": num_keys,
            "offset": num_keys - length,
            "window": window,
        },
        {**constants, "H": heads, "BD": power_of_two(head_dim), "ABSOLUTE": absolute},
        num_warps=8,
        num_stages=1 if chunk != 32 else 2,
    )
    return out, rest, mass, peak, best


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
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


def _map(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of φ, of an input with as many heads as the weight or with a divisor of them."""
    y = (x.repeat_interleave(weight.shape[0] // x.shape[1], 1) @ weight).float()
    return y.softmax(-1), (-y).softmax(-1)


def _map_gradients(x: Tensor, weight: Tensor, halves: tuple[Tensor, Tensor], gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of input and weight, given that of the features."""
    first, second = (
        half * (d - (d * half).sum(-1, keepdim=True))
        for half, d in zip(halves, gradient.float().chunk(2, -1), strict=True)
    )
    d_y = (first - second).to(x.dtype)
    repeats = weight.shape[0] // x.shape[1]
    d_weight = torch.einsum("bhtd,bhtf->hdf", x.repeat_interleave(repeats, 1), d_y)
    return (d_y @ weight.transpose(-1, -2)).unflatten(1, (-1, repeats)).sum(2), d_weight


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scaling, ctx.window, ctx.chunk, _, ctx.absolute = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, d_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, query_weight, key_weight, gamma, start, *rest = ctx.saved_tensors
    query_halves, key_halves = _map(query, query_weight), _map(key, key_weight)
    features = [torch.cat(halves, -1).to(query.dtype) for halves in (query_halves, key_halves)]
    # As many tokens at a time as the kernels of the gradients like best.
    chunk = max(ctx.chunk, hybrid_chunk(query, value))
    saved = query, key, value, *features, gamma, start, *rest
    (d_query, d_key, d_value, *d_features, d_gamma), d_memory = hybrid_gradients(
        saved, d_out, ctx.scaling, ctx.window, chunk, ctx.absolute
    )
    more_query, d_query_weight = _map_gradients(query, query_weight, query_halves, d_features[0])
    more_key, d_key_weight = _map_gradients(key, key_weight, key_halves, d_features[1])
    gradients = d_query + more_query, d_key + more_key, d_value, d_query_weight, d_key_weight, d_gamma
    return *gradients, None, *d_memory, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_remember)
