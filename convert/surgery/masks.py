"""What a call's mask, positions and lengths say of its tokens: which are real, and which documents they belong to."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...attention_modules.packing import Documents
from ...errors import PlanError

_LENGTHS = ("cu_seq_lens_q", "cu_seqlens", "cu_seq_lens_k")
# On a tensor that all layers of a forward pass receive: what it was found to say, so that it is read once.
_FOUND = "_attnconv_documents"


def new_token_mask(mask: Any, batch: int, length: int, seen: int) -> Tensor | None:
    """Which of the new tokens are real, read from whatever mask the model built.

    Args:
        mask: None, `[batch, seq]`, or 4-D bool or additive; wider than needed for static caches.
        batch: rows.
        length: new tokens.
        seen: tokens before them.

    Returns:
        `[batch, length]` bool or None.

    Raises:
        PlanError: a mask object that cannot be read.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise PlanError(
            f"a mask of type {type(mask).__name__} cannot be read; load the model with attn_implementation='sdpa'"
        )
    if mask.ndim == 2:
        return _is_visible(mask[:, -length:]) if mask.dtype.is_floating_point else mask[:, -length:].bool()
    block = _of_new_tokens(mask, length, seen)
    # A bidirectional mask may have one row for all queries.
    row = block[:, 0] if block.shape[1] == 1 else block[:, -length:].diagonal(dim1=-2, dim2=-1)
    return _is_visible(row).expand(batch, -1)


def tokens_seen(mask: Any, batch: int, length: int, num_keys: int, causal: bool) -> Tensor:
    """How many tokens each query sees, as far as the mask tells.

    Args:
        mask: as for `new_token_mask`; one that cannot be read counts as none.
        batch: rows.
        length: queries.
        num_keys: keys they meet.
        causal: whether keys after a query are hidden where there is no mask.

    Returns:
        `[batch, length]` int64, 0 for queries that are padding.
    """
    device = mask.device if isinstance(mask, Tensor) else None
    order = torch.arange(num_keys - length, num_keys, device=device) + 1
    everything = (order if causal else torch.full_like(order, num_keys)).expand(batch, -1)
    if not isinstance(mask, Tensor):
        return everything
    if mask.ndim == 2:
        real = _is_visible(mask) if mask.dtype.is_floating_point else mask.bool()
        counts = real.cumsum(1) if causal else real.sum(1, keepdim=True).expand_as(real)
        return counts[:, -length:] * real[:, -length:]
    visible = _is_visible(mask[:, 0])
    counts = visible.sum(-1).expand(batch, length)
    if not causal or visible.shape[1] != length:
        return counts
    # Padding behind a text sees that, but not itself; where a query stands among the keys, the last one it sees tells.
    places = torch.arange(visible.shape[-1], device=device)
    last = (visible * places).amax(-1)
    start = (last - places[:length]).amax().clamp_min(0)
    own = (places[:length] + start).clamp_max(visible.shape[-1] - 1)
    return counts * visible.gather(2, own.expand(visible.shape[0], -1)[..., None])[..., 0]


def packed_documents(
    kwargs: Mapping[str, Any], mask: Any, valid: Tensor | None, batch: int, length: int, seen: int
) -> Documents | None:
    """The documents of packed rows, None where every row is one.

    They are known by `cu_seq_lens`, by `position_ids` that restart, or by a mask in which a token does not see the one
    before it.

    Args:
        kwargs: what came with the call.
        mask: as for `new_token_mask`.
        valid: `[batch, length]` bool, what that returned.
        batch: rows.
        length: new tokens.
        seen: tokens before them.

    Raises:
        PlanError: more documents than one in a graph, or behind tokens that a cache holds already (a RuntimeError
            where compiled, if it takes reading tensors to see it).
    """
    if length == 1:
        return None
    lengths = next((kwargs[name] for name in _LENGTHS if isinstance(kwargs.get(name), Tensor)), None)
    positions = kwargs.get("position_ids")
    positions = positions if isinstance(positions, Tensor) and positions.ndim == 2 else None
    if torch.compiler.is_compiling():
        _refuse_compiled(lengths, positions, valid)
        return None
    shown = next((t for t in (lengths, positions, mask) if isinstance(t, Tensor)), None)
    found = getattr(shown, _FOUND, None)
    key = (_version(shown), length, id(mask))
    if found is not None and key[0] is not None and found[0] == key:
        documents: Documents | None = found[1]
    else:
        documents = _find(lengths, positions, mask, valid, batch, length, seen)
        if shown is not None:
            setattr(shown, _FOUND, (key, documents))
    if documents is not None and seen:
        raise PlanError("packed documents cannot continue a cache that holds tokens already; start with an empty cache")
    return documents


def _find(
    lengths: Tensor | None,
    positions: Tensor | None,
    mask: Any,
    valid: Tensor | None,
    batch: int,
    length: int,
    seen: int,
) -> Documents | None:
    if lengths is not None:
        starts = torch.zeros(batch * length, dtype=torch.bool, device=lengths.device)
        starts[lengths.long()[lengths < batch * length]] = True
        return Documents.from_starts(starts.view(batch, length), valid)
    if positions is not None:
        restarts = positions[:, 1:] <= positions[:, :-1]
        if bool(restarts.any()):
            starts = torch.nn.functional.pad(restarts, (1, 0), value=True).expand(batch, -1)
            documents = Documents.from_starts(starts, valid)
            if documents is not None:
                return documents
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] >= length:
        visible = _is_visible(_of_new_tokens(mask, length, seen)[:, -length:])
        unseen = ~visible.diagonal(-1, dim1=-2, dim2=-1)
        starts = torch.nn.functional.pad(unseen, (1, 0), value=True).expand(batch, -1)
        return Documents.from_starts(starts, valid)
    return None


def _refuse_compiled(lengths: Tensor | None, positions: Tensor | None, valid: Tensor | None) -> None:
    message = "packed sequences cannot run through a converted layer in a compiled graph; run the model uncompiled"
    if lengths is not None:
        raise PlanError(message)
    if positions is None:
        return
    restart = positions[:, 1:] <= positions[:, :-1]
    if valid is not None and positions.shape == valid.shape:
        restart = restart & valid[:, 1:] & valid[:, :-1]
    # A graph cannot branch on what it computes: it fails when it runs.
    torch._assert_async(~restart.any(), message)


def _version(tensor: Tensor | None) -> int | None:
    """Changes with the tensor's content; None where that cannot be told."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _of_new_tokens(mask: Tensor, length: int, seen: int) -> Tensor:
    """`[batch, queries, length]`: a static cache's mask spans slots not filled yet, others end with the new tokens."""
    start = seen if mask.shape[-1] > seen + length else mask.shape[-1] - length
    return mask[:, 0, :, start : start + length]


def _is_visible(mask: Tensor) -> Tensor:
    return mask > torch.finfo(mask.dtype).min / 2 if mask.dtype.is_floating_point else mask.bool()
