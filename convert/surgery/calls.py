"""One call of a converted module: what was noted before its own forward, and the proof that no token was lost.

transformers hands a cache to its attention modules under names that change between releases, and a state that misses
tokens gives wrong text without an error. So nothing here goes by names. The cache is found by its type among all
arguments; what the model's code stores in any cache while the module runs is compared with it; and afterwards the
attention must have run in the core, which must have taken over all tokens that the cache layer handed out.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache

from ...errors import PlanError
from .cache_layer import AttnConvCacheLayer, layer_of, self_attention_cache
from .surroundings import embeddings_among

_PLAIN = (Tensor, str, int, float, tuple, list, type(None))
# What `update` is in a mapping that is no more than one; a cache has another.
_MAPPING_UPDATES = (dict.update, OrderedDict.update, MutableMapping.update)
_RUNNING = threading.local()


@dataclass
class CallContext:
    """What a converted module notes before its own forward runs.

    Attributes:
        hidden_states: the module's input `[batch, T, hidden]`.
        layer: its cache layer, None without a cache.
        name: the module's name in the model, for errors.
        attended: whether the call's attention has run in the core.
        embeddings: cosines and sines of the rotary embedding among its arguments, if the method asks for them.
        has_cache: whether there was a cache among the arguments of a module whose model keeps it.
        keeps_cache: whether the model's own cache layer holds keys and values, and its own attention reads them.
        came_as_argument: whether the context reached the attention function through the model's own arguments.
    """

    hidden_states: Tensor | None = None
    layer: AttnConvCacheLayer | None = None
    name: str = "a converted module"
    attended: bool = False
    came_as_argument: bool = False
    embeddings: Any = None
    has_cache: bool = False
    keeps_cache: bool = False

    def check_update(self, cache: Cache, layer_idx: int) -> None:
        """Refuse a cache that the model's own code fills during the call, but that was not found before it.

        Raises:
            PlanError: it is another one than that whose state the core continues.
        """
        if self.keeps_cache:
            return
        layers = self_attention_cache(cache).layers
        if self.layer is None:
            raise foreign_call(
                self.name, f"stores its keys in a {type(cache).__name__} that was not among its arguments"
            )
        if layer_idx >= len(layers) or layers[layer_idx] is not self.layer:
            raise foreign_call(self.name, f"stores its keys in layer {layer_idx} of another cache than its own")

    def check_end(self) -> None:
        """Refuse what the call came to if its attention ran elsewhere, or tokens were lost on the way.

        Raises:
            PlanError: either happened.
        """
        if not self.attended:
            raise foreign_call(self.name, "computed its attention without the converted core")
        if self.layer is not None and self.layer.handed_out:
            raise foreign_call(
                self.name, f"got {self.layer.handed_out} tokens from its cache that its state did not take over"
            )


def foreign_call(name: str, what: str) -> PlanError:
    """The error for a call that this version of transformers makes in a way unknown here."""
    return PlanError(
        f"{name} {what}: transformers {transformers.__version__} calls this model in a way that attnconv does not "
        "know, and going on would give wrong text; update attnconv, or use a version of transformers that "
        "`attnconv doctor` passes"
    )


def note_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallContext:
    """Read a converted module's arguments, whatever they are called.

    Raises:
        PlanError: a cache among them is of no kind that a state can be kept in.
    """
    place, argument = type(module)._attnconv_input
    hidden_states = args[place] if place < len(args) else kwargs.get(argument)
    if not isinstance(hidden_states, Tensor):
        hidden_states = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 3), None)
    context = CallContext(hidden_states, name=module.__dict__["_attnconv_name"])
    if module.attnconv.reads_unrotated or module.attnconv.reprojects:
        context.embeddings = embeddings_among(module, args, kwargs)
    if module.attnconv.keeps_softmax:
        context.keeps_cache = True
        context.has_cache = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        return context
    cache = _cache_among(args, kwargs, context.name)
    if cache is not None and module.attnconv.geometry.causal:
        layer_idx = kwargs.get("layer_idx", getattr(module, "layer_idx", None))
        if not isinstance(layer_idx, int):
            raise foreign_call(context.name, "receives a cache, but does not say which of its layers is its own")
        context.layer = layer_of(cache, layer_idx)
    return context


def _cache_among(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Cache | None:
    found = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, Cache):
            found = value
        elif isinstance(value, (tuple, list)) and any(isinstance(part, Cache) for part in value):
            raise foreign_call(name, f"receives its cache inside a {type(value).__name__}")
        elif not isinstance(value, _PLAIN) and _may_be_cache(value):
            raise PlanError(
                f"{name} receives a {type(value).__name__}, but converted layers keep a state, which paged caches "
                "(continuous batching) and other caches that are not transformers' own Cache cannot hold; "
                f"use `generate` (transformers {transformers.__version__})"
            )
    return found


def _may_be_cache(value: Any) -> bool:
    update = getattr(type(value), "update", None)
    return callable(update) and not (isinstance(value, Mapping) and update in _MAPPING_UPDATES)


@contextmanager
def running(context: CallContext) -> Iterator[None]:
    """Inside, whatever cache the model's code fills is compared with that of the call; a compiler sees none of it."""
    before = getattr(_RUNNING, "context", None)
    _RUNNING.context = context
    try:
        yield
    finally:
        _RUNNING.context = before


def watch_updates() -> None:
    """Let every cache say when it is filled while a converted module runs, so that none goes unnoticed."""
    original: Callable[..., tuple[Tensor, Tensor]] = Cache.update

    @wraps(original)
    def update(
        self: Cache, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():
            context = getattr(_RUNNING, "context", None)
            if context is not None:
                context.check_update(self, layer_idx)
        return original(self, key_states, value_states, layer_idx, *args, **kwargs)

    setattr(Cache, "update", update)  # noqa: B010
