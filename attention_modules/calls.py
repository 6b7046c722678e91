"""What an attention module makes of the arguments of a call before its method sees them."""

import torch
from torch import Tensor

from .contract import AttentionContract
from .geometry import Geometry
from .padding import right_align_order
from .state import AttentionState
from .tokens import Surroundings, Tokens


def check_shapes(
    geometry: Geometry,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Tensor | None,
    state: AttentionState | None,
) -> None:
    """Refuse tensors that do not belong to such a layer or to each other.

    Args:
        geometry: the layer's.
        query: `[batch, num_heads, T, head_dim]`.
        key: `[batch, num_kv_heads, S, head_dim]`.
        value: `[batch, num_kv_heads, S, value_dim]`.
        padding_mask: `[batch, S]` bool, or None.
        state: memory of earlier calls, or None.

    Raises:
        ValueError: a shape is not the layer's, the lengths do not fit, or a bidirectional layer is given a state.
    """
    batch, _, length, _ = query.shape
    seq = key.shape[2]
    expected = {
        "query": (query, (batch, geometry.num_heads, length, geometry.head_dim)),
        "key": (key, (batch, geometry.num_kv_heads, seq, geometry.head_dim)),
        "value": (value, (batch, geometry.num_kv_heads, seq, geometry.value_dim)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but this layer needs {shape}")
    if padding_mask is not None and tuple(padding_mask.shape) != (batch, seq):
        raise ValueError(f"padding_mask has shape {tuple(padding_mask.shape)}, but this call needs {(batch, seq)}")
    if seq < length or (seq != length and (state is not None or not geometry.causal)):
        raise ValueError(f"{seq} keys do not fit {length} queries")
    if state is not None and not geometry.causal:
        raise ValueError("a bidirectional layer has no state")


def layer_input(
    method: str,
    hidden_states: Tensor | None,
    shape: tuple[int, int, int | None],
    num_keys: int,
    valid: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The layer's input in the dtype of the maths, zero where padding stands.

    Args:
        method: name of the method that reads it.
        hidden_states: `[batch, T, hidden]`.
        shape: what that has to be.
        num_keys: keys of the call; all must be of the tokens whose input this is.
        valid: `[batch, T]` bool, or None when all are real.
        dtype: of the result.

    Raises:
        ValueError: the input is missing or of another shape.
    """
    given = None if hidden_states is None else tuple(hidden_states.shape)
    if hidden_states is None or given != shape or num_keys != shape[1]:
        raise ValueError(
            f"{method!r} reads the layer's input: hidden_states must have shape {shape} and belong to all "
            f"{num_keys} keys, but it is {given}"
        )
    hidden_states = hidden_states.to(dtype)
    return hidden_states if valid is None else hidden_states.masked_fill(~valid[..., None], 0.0)


def new_tokens(core: AttentionContract, tokens: Tokens, hidden_states: Tensor | None, around: Surroundings) -> Tokens:
    """Tokens of a call with what their method asks to be known of each.

    Args:
        core: the method.
        tokens: keys, values and validity.
        hidden_states: `[batch, S, hidden]` in the dtype of the maths, None unless the method reads them.
        around: what the caller has.

    Raises:
        ValueError: the method asks for something that the caller has not.
    """
    asked = {"positions": core.reads_positions, "unrotated": core.reads_unrotated, "board": core.reads_board}
    for name, is_asked in asked.items():
        if is_asked and getattr(around, name) is None:
            raise ValueError(
                f"{core.name!r} needs `{name}`, but the call has none: give them as `Surroundings({name}=...)`"
            )
    dtype = torch.promote_types(tokens.keys.dtype, torch.float32)
    signals = core.signals(tokens.keys.to(dtype), hidden_states)
    if core.reads_unrotated and around.unrotated is not None:
        signals = {**signals, "unrotated_keys": around.unrotated[1]}
    positions = (
        around.positions.expand(tokens.keys.shape[0], -1)
        if core.reads_positions and around.positions is not None
        else None
    )
    return Tokens(tokens.keys, tokens.values, tokens.valid, positions, signals)


def exact_tokens(tokens: Tokens, state: AttentionState | None) -> Tokens:
    """The tokens that are there exactly, old and new, with padding before the real ones."""
    if state is not None:
        return state.append(tokens)
    return tokens if tokens.valid is None else tokens.reordered(right_align_order(tokens.valid))
