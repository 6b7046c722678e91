"""From what heads look at to what their layers could become: a method, its options and the reason, as a recipe."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import yaml

from ...formats import percent
from ...recipes import load_recipe, recipe_text
from .measures import NUM_SINKS
from .profiles import Diagnosis, LayerProfile

# Layers at most that keep softmax for their retrieval heads, which are few and the ones that a fixed-size state cannot
# stand in for (https://arxiv.org/abs/2410.10819): one in four, as in published hybrids.
KEPT_SHARE = 0.25
# Part of the context within which windows must lie: beyond, a window is not told apart from seeing everything.
WINDOW_PART = 4
# Windows are powers of two from this on, so that layers with about the same need share a rule.
SMALLEST_WINDOW = 16
LINEAR_METHODS = ("lolcats", "hedgehog")
# What becomes linear takes options and healing from a shipped recipe: from the second where some layers keep softmax,
# for distillation on short texts costs what those find far back.
LINEAR_RECIPE, HYBRID_RECIPE = "lolcats-plus", "hybrid"
LINE = 110

_Options = Mapping[str, Any]


@dataclass(frozen=True)
class LayerAdvice:
    """What a layer could become.

    Attributes:
        layer: its number, as recipes count layers.
        name: its name in the model.
        method: a registered method; `softmax` means to keep it.
        options: options of the method.
        reason: why, in one clause.
    """

    layer: int
    name: str
    method: str
    options: _Options = field(default_factory=dict)
    reason: str = ""


def recommend(diagnosis: Diagnosis) -> list[LayerAdvice]:
    """Advise on every self-attention layer.

    A layer keeps softmax where it is among the quarter of the layers that retrieve best, where it is narrow by itself
    and where it cannot be converted; becomes a sliding window where a narrow one holds what each of its heads looks at;
    and LoLCATs otherwise.
    """
    best = sorted(diagnosis.layers, key=_retrieval, reverse=True)
    most = max(1, math.floor(KEPT_SHARE * (len(diagnosis.layers) + len(diagnosis.skipped))))
    kept = {layer.name for layer in best[:most] if _retrieval(layer) > 0}
    widest = diagnosis.context // WINDOW_PART
    softmax = bool(kept or diagnosis.skipped or any(layer.native_window is not None for layer in diagnosis.layers))
    linear = load_recipe(HYBRID_RECIPE if softmax else LINEAR_RECIPE).attention[-1].options
    advice = [_advise(layer, widest, linear, keep=layer.name in kept) for layer in diagnosis.layers]
    advice += [LayerAdvice(layer.index, layer.name, "softmax", reason=layer.reason) for layer in diagnosis.skipped]
    return sorted(advice, key=lambda one: one.layer)


def _retrieval(layer: LayerProfile) -> float:
    """How much of the attention of a layer's retrieval heads is on what they look for, in all."""
    return sum(head.induction or 0.0 for head in layer.heads if head.role == "retrieval")


def _advise(layer: LayerProfile, widest: int, linear: _Options, *, keep: bool) -> LayerAdvice:
    count = len(layer.heads)
    retrieval = layer.role_counts["retrieval"]
    if layer.native_window is not None:
        reason = f"it sees no more than {layer.native_window} tokens by itself"
        return LayerAdvice(layer.index, layer.name, "softmax", reason=reason)
    if keep:
        best = percent(max(head.induction or 0.0 for head in layer.heads), 0)
        reason = f"{retrieval} of {count} heads retrieve, the best with {best} of its attention on what it looks for"
        return LayerAdvice(layer.index, layer.name, "softmax", reason=reason)
    needed = math.ceil(max(head.window_90 for head in layer.heads))
    if needed <= widest and not retrieval:
        reason = f"the first {NUM_SINKS} tokens and the {needed} newest hold 90 % of every head's attention"
        window = max(SMALLEST_WINDOW, 1 << (needed - 1).bit_length())
        options: _Options = {"window": window, "num_sinks": NUM_SINKS}
        return LayerAdvice(layer.index, layer.name, "sliding_window", options, reason)
    wide = sum(head.window_90 > widest for head in layer.heads)
    reasons = [f"{wide} of {count} heads need more than {widest} tokens for 90 % of their attention"] if wide else []
    if retrieval:
        reasons.append(f"{retrieval} of {count} heads retrieve, which a window would end")
    return LayerAdvice(layer.index, layer.name, "lolcats", dict(linear), "; ".join(reasons))


def advice_yaml(advice: Sequence[LayerAdvice], *, name: str = "advised", source: str | None = None) -> str:
    """Write advice as a recipe, reasons as comments, healed as `lolcats-plus` or, where layers keep softmax, `hybrid`.

    Args:
        advice: what `recommend` returned.
        name: the recipe's name.
        source: the model that it is for, to be named in the description.
    """
    softmax = any(one.method == "softmax" for one in advice)
    healed = HYBRID_RECIPE if softmax else LINEAR_RECIPE
    linear = any(one.method in LINEAR_METHODS for one in advice)
    methods = [method for method in dict.fromkeys(one.method for one in advice) if method != "softmax"]
    purpose = f"Advice from a diagnosis{f' of {source}' if source else ''}: {', '.join(methods) or 'softmax kept'}."
    head = yaml.safe_dump({"name": name, "description": purpose}, sort_keys=False, allow_unicode=True, width=10_000)
    rules = ["# Rules: the first that matches a layer wins; a layer without a match keeps its softmax.", "attention:"]
    for _, same in groupby(advice, key=lambda one: (one.method, sorted(one.options.items()))):
        rules += _rule(list(same))
    blocks = _blocks(recipe_text(healed if linear else "sliding-window"))
    rest = [blocks[key] for key in ("data", "stages", "evaluate", "output") if key in blocks]
    return "\n\n".join([head.strip(), "\n".join(rules), *rest]) + "\n"


def _rule(members: Sequence[LayerAdvice]) -> list[str]:
    first, last = members[0].layer, members[-1].layer
    lines = [
        f"  {line}"
        for one in members
        for line in textwrap.wrap(
            f"{one.layer}: {one.reason}.", LINE, initial_indent="# ", subsequent_indent="#    ", break_on_hyphens=False
        )
    ]
    rule: dict[str, Any] = {"layers": str(first) if first == last else f"{first}-{last}", "method": members[0].method}
    if members[0].options:
        rule["options"] = dict(members[0].options)
    text = yaml.safe_dump([rule], sort_keys=False)
    return [*lines, *(f"  {line}" for line in text.splitlines())]


def _blocks(text: str) -> dict[str, str]:
    """The top-level keys of a shipped recipe with what belongs to them, comments above included."""
    blocks: dict[str, str] = {}
    key = ""
    for paragraph in text.strip().split("\n\n"):
        heads = [line.partition(":")[0] for line in paragraph.splitlines() if line[:1].isalpha()]
        if heads:
            key = heads[0]
            blocks[key] = paragraph
        elif key:
            blocks[key] = f"{blocks[key]}\n\n{paragraph}"
    return blocks
