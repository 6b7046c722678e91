"""Sliding windows in either of their two forms: settings of a class of transformers, or the method of this package."""

from typing import Any, Literal

from ..errors import RecipeError
from .loading import build_recipe
from .schema import AttentionRule, Recipe

Target = Literal["native", "attnconv"]
METHOD, KEPT, REWRITE = "sliding_window", "softmax", "window"


def with_target(recipe: Recipe, target: Target) -> Recipe:
    """The same recipe in another form, where there are two.

    Windows are the one thing that has both: `rewrite: [{kind: window}]` gives a model that transformers loads alone,
    the method `sliding_window` one that also keeps the first tokens in sight and holds a window of any layer of any
    model.

    Args:
        recipe: a recipe with windows and no other attention.
        target: `native` or `attnconv`; a recipe that has this form already stays as it is.

    Raises:
        RecipeError: there is no such form of it.
    """
    data = recipe.model_dump(mode="json")
    found = _as_native(recipe, data) if target == "native" else _as_method(recipe, data)
    return recipe if found is None else build_recipe(found, source=f"recipe {recipe.name!r} with --target {target}")


def _as_native(recipe: Recipe, data: dict[str, Any]) -> dict[str, Any] | None:
    if not recipe.attention:
        return None
    *kept, last = recipe.attention
    options = {"window": 1024, "num_sinks": 4, **last.options}
    if (last.method, last.layers) != (METHOD, "all") or not _keeps_one_choice(kept):
        raise _no_form(recipe, "native", "rules other than layers that stay softmax, then a sliding_window for all")
    if options["num_sinks"]:
        raise _no_form(
            recipe, "native", f"num_sinks {options['num_sinks']}, and no class keeps the first tokens in sight"
        )
    step = {"kind": REWRITE, "window": options["window"], "keep": kept[0].layers if kept else None}
    return {**data, "rewrite": [*data["rewrite"], step], "attention": []}


def _as_method(recipe: Recipe, data: dict[str, Any]) -> dict[str, Any] | None:
    windows = [step for step in data["rewrite"] if step["kind"] == REWRITE]
    if not windows:
        if recipe.attention:
            return None
        raise _no_form(recipe, "attnconv", "neither attention rules nor a rewrite window")
    (window,) = windows[:1]
    if len(windows) > 1 or recipe.attention or window["sinks"] is not None:
        raise _no_form(recipe, "attnconv", "more than one rewrite window without sinks, or attention rules beside it")
    kept = [] if window["keep"] is None else [{"layers": window["keep"], "method": KEPT}]
    rule = {"layers": "all", "method": METHOD, "options": {"window": window["window"], "num_sinks": 0}}
    rewrite = [step for step in data["rewrite"] if step["kind"] != REWRITE]
    return {**data, "rewrite": rewrite, "attention": [*kept, rule]}


def _keeps_one_choice(rules: list[AttentionRule]) -> bool:
    return not rules or (len(rules) == 1 and rules[0].method == KEPT)


def _no_form(recipe: Recipe, target: Target, why: str) -> RecipeError:
    return RecipeError(f"recipe {recipe.name!r} has no form for --target {target}: it has {why}; leave --target out")
