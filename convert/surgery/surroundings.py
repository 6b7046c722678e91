"""What some methods ask for besides queries, keys and values: positions, keys before the rotary embedding, a board."""

import inspect
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ...attention_modules.base import AttentionModule
from ...attention_modules.tokens import Rotation, Surroundings
from ...errors import PlanError
from ..planning.probe import EMBEDDINGS, rotary_function

_PASS = threading.local()


def surroundings(
    module: nn.Module, core: AttentionModule, query: Tensor, key: Tensor, positions: Any, embeddings: Any
) -> Surroundings:
    """What the core of a converted module asks for.

    Args:
        module: the converted module.
        core: its attention module.
        query: `[batch, num_heads, T, head_dim]`, as the attention function receives it.
        key: `[batch, num_kv_heads, T, head_dim]`, likewise.
        positions: the `position_ids` that came with the call, if any.
        embeddings: cosines and sines of the module's rotary embedding, if any.

    Raises:
        PlanError: the model does not have something that the method needs.
    """
    if not (core.reads_positions or core.reads_unrotated or core.reprojects or core.reads_board):
        return Surroundings()
    name = module.__dict__.get("_attnconv_name")
    if core.reads_positions and not (isinstance(positions, Tensor) and positions.ndim == 2):
        raise PlanError(f"{core.name!r} needs the positions of tokens, but {name} receives no position_ids")
    before, rotation = None, None
    if core.reads_unrotated or core.reprojects:
        (before_query, before_key), rotation = _unrotated(module, core.name, query, key, embeddings)
        # What is kept of a token, beside its key, is as precise as that.
        dtypes = (before_query.dtype, before_key.dtype) if core.reprojects else (query.dtype, key.dtype)
        before = before_query.to(dtypes[0]), before_key.to(dtypes[1])
    board = getattr(_PASS, "board", None)
    if core.reads_board and board is None:
        raise PlanError(
            f"{core.name!r} reads what other layers chose in the same forward pass, but {name} runs outside of one; "
            "turn gradient checkpointing off, and call the whole model"
        )
    return Surroundings(positions if core.reads_positions else None, before, rotation, board)


def embeddings_among(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cosines and sines among a module's arguments, None if there are none."""
    if EMBEDDINGS in kwargs:
        return kwargs[EMBEDDINGS]
    original: Any = type(module).__dict__["_attnconv_original"]
    place = _place_of_embeddings(original)
    return args[place] if place is not None and place < len(args) else None


@cache
def _place_of_embeddings(original: type[nn.Module]) -> int | None:
    """Where they stand among the arguments of a class's forward (`self` not counted), None if it does not name them."""
    names = [name for name in inspect.signature(original.forward).parameters if name != "self"]
    return names.index(EMBEDDINGS) if EMBEDDINGS in names else None


def _unrotated(
    module: nn.Module, method: str, query: Tensor, key: Tensor, embeddings: Any
) -> tuple[tuple[Tensor, Tensor], Rotation]:
    """Query and key before the rotary embedding: turned back by the model's own function, whatever its order of axes.

    A rotation by the negative angle undoes one; where cosines and sines carry a factor, its square is divided away. In
    fp32, so that what is turned back and again is what it was, in whatever dtype the model is.
    """
    original: Any = type(module).__dict__["_attnconv_original"]
    rotate = rotary_function(original)
    name = module.__dict__.get("_attnconv_name")
    refusal = (
        f"{method!r} needs keys before their rotary embedding, which {name} ({original.__name__}) does not show: "
        "choose another method for this layer"
    )
    is_pair = isinstance(embeddings, tuple) and len(embeddings) == 2 and isinstance(embeddings[0], Tensor)
    if rotate is None or not is_pair or getattr(module, "use_rope", True) is False:
        raise PlanError(refusal)
    cos, sin = (t.float() for t in embeddings)
    # Once for each module, since a token must not wait for a comparison.
    checked = torch.compiler.is_compiling() or module.__dict__.get("_attnconv_turns_back", False)
    square = cos.square() + sin.square()
    try:
        before = rotate(query.float(), key.float(), cos / square, -sin / square)
        again = None if checked else rotate(*before, cos, sin)
    except (TypeError, RuntimeError) as error:
        raise PlanError(refusal) from error
    if again is not None:
        largest = float(key.detach().abs().amax())
        if not torch.allclose(again[1], key.float(), atol=1e-4 * largest, rtol=0.0):
            raise PlanError(refusal)
        module.__dict__["_attnconv_turns_back"] = True
    batch = query.shape[0]
    cos, sin = (t.expand(batch, *t.shape[1:]) for t in (cos, sin))
    return before, Rotation(cos, sin, rotate)


def keep_board(model: nn.Module) -> None:
    """Give every forward pass of a model a board of its own; passes of its parts write on that of the whole."""
    if "_attnconv_board" in vars(model):
        return
    first = model.register_forward_pre_hook(_enter)
    last = model.register_forward_hook(_leave, always_call=True)
    model.__dict__["_attnconv_board"] = first, last


def _enter(*_: Any) -> None:
    depth = getattr(_PASS, "depth", 0)
    if depth == 0:
        _PASS.board = {}
    _PASS.depth = depth + 1


def _leave(*_: Any) -> None:
    _PASS.depth -= 1
    if _PASS.depth == 0:
        del _PASS.board
