"""Convert a model that is in memory already."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ...errors import PlanError
from ..planning.plan import make_plan
from ..planning.probe import probe
from .swap import apply_plan, converted_modules, undo_plan


@dataclass(frozen=True)
class _EveryLayer:
    method: str
    options: dict[str, Any] = field(default_factory=dict)

    def matches(self, index: int, num_layers: int, module_name: str) -> bool:
        return True


def convert_model(model: PreTrainedModel, recipe: Any, *, allow_lossy: bool = False, **options: Any) -> PreTrainedModel:
    """Swap a loaded model's attention in place, without healing it.

    Args:
        model: any transformers model whose attention goes through the attention interface.
        recipe: a `Recipe`, whose attention rules are applied, or a method's name for all layers.
        allow_lossy: accept that soft caps, sinks or biases are left out.
        options: the method's options, when `recipe` is a name.

    Returns:
        the same model; `save_pretrained` and `from_pretrained` work as before.

    Raises:
        PlanError: the conversion cannot be carried out as asked.
        ValueError: unknown method or option.
    """
    if not isinstance(recipe, str) and recipe.rewrite:
        raise PlanError("a recipe with a rewrite is about files: convert the model's folder by run_conversion")
    rules = [_EveryLayer(recipe, options)] if isinstance(recipe, str) else recipe.attention
    plan = make_plan(rules, probe(model.config, type(model)), allow_lossy=allow_lossy)
    apply_plan(model, plan)
    return model


@contextmanager
def sparse(model: PreTrainedModel, method: str, **options: Any) -> Iterator[PreTrainedModel]:
    """Inside, a loaded model attends by a method that needs no training; after it, as before.

    ::

        with attnconv.sparse(model, "quest", budget=1024):
            model.generate(**prompt)

    Args:
        model: any transformers model whose attention goes through the attention interface.
        method: a method for all its layers, such as `xattention`, `quest` or `sliding_window`.
        options: the method's options.

    Returns:
        the same model. A cache that was filled inside is of no use outside, and the other way round.

    Raises:
        PlanError: the model is converted already, or cannot be.
        ValueError: unknown method or option.
    """
    if converted_modules(model):
        raise PlanError("this model is converted already: load the model that it was made from to try other methods")
    try:
        yield convert_model(model, method, **options)
    finally:
        undo_plan(model)
