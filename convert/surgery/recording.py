"""Watching a model's attention while it computes what it always does, whether a layer was converted or not."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...attention_modules.base import AttentionModule
from ...attention_modules.weights import Statistic, response_weights
from ...errors import PlanError
from ..planning.plan import make_plan
from ..planning.probe import ProbedModule, probe
from .attention_function import AttentionCall, is_converted, original_function
from .in_memory import _EveryLayer

_WATCHING = "attnconv_watching"


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention module of a model.

    Attributes:
        index: its place among them, as recipes count layers.
        module: what is known about it.
        refused: why it cannot be converted or watched, or None.
    """

    index: int
    module: ProbedModule
    refused: str | None

    @property
    def name(self) -> str:
        """Its name in the model."""
        return self.module.name


@dataclass
class WatchedCall:
    """One attention call of a model that runs as it always does.

    Attributes:
        name: the module's name in the model.
        core: its attention module, None for a layer that was not converted.
        output: `[batch, num_heads, T, value_dim]`, before the output projection.
    """

    name: str
    core: AttentionModule | None
    output: Tensor
    _weights: Callable[[], Tensor] = field(repr=False)
    _statistics: Callable[[], Mapping[str, Statistic]] = field(repr=False, default=dict)

    @torch.no_grad()
    def weights(self) -> Tensor:
        """What each key weighs in the output: `[batch, num_heads, T, T]`, soft caps, sinks and biases included."""
        return self._weights()

    @torch.no_grad()
    def statistics(self) -> Mapping[str, Statistic]:
        """What the method tells about itself; nothing for a layer that was not converted."""
        return self._statistics()


Watcher = Callable[[WatchedCall], None]


def attention_layers(model: PreTrainedModel) -> tuple[AttentionLayer, ...]:
    """The self-attention modules of a model, converted or not, in the order in which it calls them.

    Raises:
        PlanError: the model's attention cannot be found.
    """
    probed = [module for module in probe(model.config, type(model)) if module.self_attention]
    plan = make_plan([_EveryLayer("lolcats")], probed, check=False)
    return tuple(
        AttentionLayer(index, module, entry.refused)
        for index, (module, entry) in enumerate(zip(probed, plan.entries, strict=True))
    )


@contextmanager
def watching(model: nn.Module, watcher: Watcher, names: Collection[str]) -> Iterator[None]:
    """Inside, `watcher(call)` sees every attention call of the named modules; the model computes what it always does.

    No cache must be in use. Afterwards the model is as it was.

    Args:
        model: a model, converted or not.
        watcher: what to call.
        names: modules of `attention_layers`.

    Raises:
        PlanError: the model has no such module, or it cannot be watched.
    """
    modules = dict(model.named_modules())
    missing = [name for name in names if name not in modules]
    if missing:
        raise PlanError(f"{type(model).__name__} has no attention module {missing[0]}")
    with ExitStack() as stack:
        for name in names:
            module = modules[name]
            watched = _converted(module, name, watcher) if is_converted(module) else _original(module, name, watcher)
            stack.enter_context(watched)
        yield


@contextmanager
def _converted(module: nn.Module, name: str, watcher: Watcher) -> Iterator[None]:
    # The name in this very model: a loaded one knows its modules by their names in the part without the head.
    def hook(call: AttentionCall) -> Tensor:
        output = call.converted()
        watcher(WatchedCall(name, call.core, output, call.student_weights, call.statistics))
        return output

    module.__dict__["_attnconv_hook"] = hook
    try:
        yield
    finally:
        module.__dict__.pop("_attnconv_hook", None)


@contextmanager
def _original(module: nn.Module, name: str, watcher: Watcher) -> Iterator[None]:
    """The module dispatches to us by a configuration of its own; the masks that the model makes stay the same."""
    config: Any = getattr(module, "config", None)
    if config is None:
        raise PlanError(f"{name} ({type(module).__name__}) has no config, so its attention cannot be watched")
    ALL_ATTENTION_FUNCTIONS.register(_WATCHING, _watched_attention)
    ours = copy.copy(config)
    ours._attn_implementation_internal = _WATCHING
    # In a tuple, so that nothing that walks over configs finds it.
    module.__dict__["_attnconv_watched"] = (config, name, watcher)
    module.config = ours
    try:
        yield
    finally:
        module.config = config
        module.__dict__.pop("_attnconv_watched", None)


def _watched_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, Any]:
    config, name, watcher = module.__dict__["_attnconv_watched"]
    function = original_function(module, config)

    def attend(values: Tensor) -> Tensor:
        return function(module, query, key, values, attention_mask, **kwargs)[0].transpose(1, 2)

    result = function(module, query, key, value, attention_mask, **kwargs)
    watcher(WatchedCall(name, None, result[0].transpose(1, 2), lambda: response_weights(attend, value)))
    return result
