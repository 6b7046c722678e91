"""Methods that stand between a module's projections and its rotary embedding: what they read, and what becomes of it.

A convolution over tokens, say, needs what was projected of the tokens before, without their rotation and without
padding in between. So the projections of the newest tokens live in a state beside the method's own, and the model's own
rotary embedding is applied to whatever the method makes of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import exact_tokens
from .contract import AttentionContract
from .geometry import Geometry
from .padding import restore_tokens, right_align_order
from .state import AttentionState
from .tokens import Surroundings, Tokens


def why_no_convolution(geometry: Geometry) -> str | None:
    """Why a method that convolves projections over the tokens before cannot serve a layer, None if it can."""
    if geometry.causal:
        return None
    return "its convolutions run from left to right, which a bidirectional layer does not"


def reproject(
    core: AttentionContract,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    state: AttentionState | None,
    around: Surroundings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as a method wants them, rotated as the model does.

    Args:
        core: the method, which `reprojects`.
        query: `[batch, num_heads, T, head_dim]`, rotated; only its dtype matters.
        key: `[batch, num_kv_heads, T, head_dim]`, likewise.
        value: `[batch, num_kv_heads, T, any]`.
        valid: `[batch, T]` bool, True = real token; None when all are.
        state: the layer's memory, whose `projections` go on from earlier calls; None without one.
        around: with query and key before their rotation, and the rotation.

    Returns:
        tensors shaped like those given, in their dtypes, the value with the layer's `value_dim`; anything where padding
        stands.

    Raises:
        ValueError: something that the method needs is missing.
    """
    if around.unrotated is None or around.rotation is None or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{core.name!r} needs query and key of all tokens before their rotary embedding: give them as "
            "`Surroundings(unrotated=..., rotation=...)`"
        )
    length, heads, earlier = query.shape[2], query.shape[1], core.projected_tokens
    if value.shape[-1] != core.geometry.value_dim:
        value = value.new_zeros(*value.shape[:3], core.geometry.value_dim)
    # Queries and keys side by side: a state keeps both of a token for as long as one of them.
    both = torch.cat(around.unrotated, 1)
    given = Tokens(both, value, valid)
    order = None if valid is None else right_align_order(valid)
    held = exact_tokens(given, None if state is None else state.projections)
    newest = held.part(max(held.length - earlier - length, 0))
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        # Where a text begins there is nothing before, which is what a convolution is padded with.
        absent = (earlier + length - newest.length, 0)
        keep = None if newest.valid is None else newest.valid[:, None, :, None]
        tensors = [t.to(dtype) if keep is None else t.to(dtype) * keep for t in (newest.keys, newest.values)]
        both, values = (F.pad(t, (0, 0, *absent)) for t in tensors)
        made = core.project(both[:, :heads], both[:, heads:], values)
        own_query, own_key, own_value = (t if order is None else restore_tokens(t, order) for t in made)
        rotated = around.rotation(own_query, own_key)
    if state is not None:
        state.projections.evict(earlier)
    return rotated[0].to(query.dtype), rotated[1].to(key.dtype), own_value.to(value.dtype)
