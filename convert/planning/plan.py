"""What will be done to each attention module, decided before anything is touched."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...attention_modules.geometry import Geometry
from ...attention_modules.registry import create, get_method
from ...errors import PlanError
from .head_rules import Rule, choose_rules, resolved_options
from .probe import ProbedModule
from .section import SECTION_VERSION, core_problem, read_section, sealed

logger = logging.getLogger(__name__)

# The method of layers whose KV heads go by different rules.
BY_HEAD = "by_head"

# What a softmax layer may add to its logits and a replacement leaves out.
_LOSSY = {
    "softcap": "a soft cap on attention logits",
    "s_aux": "learned attention sinks",
    "position_bias": "an additive position bias",
    "indices": "the model's own sparse selection of keys",
}


@dataclass(frozen=True)
class PlanEntry:
    """One attention module and what happens to it.

    Attributes:
        name: module name in the model.
        layer_idx: its place in the cache, None without one.
        method: method it gets; `softmax` when it stays.
        options: the method's options, all of them.
        geometry: head counts and sizes.
        lossy: what the original attention does and the method leaves out, one clause each.
        refused: why it cannot be converted, or None.
    """

    name: str
    layer_idx: int | None
    method: str
    options: dict[str, Any]
    geometry: Geometry
    lossy: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """Its method and those of parts of its heads, each once."""
        return methods_of(self.method, self.options)

    @property
    def head_methods(self) -> tuple[str, ...]:
        """The method of each of its KV heads."""
        parts = self.options.get("parts", ()) if self.method == BY_HEAD else ()
        rest = next((part["method"] for part in parts if part.get("groups") is None), self.method)
        found = {group: str(part["method"]) for part in parts for group in part.get("groups") or ()}
        return tuple(found.get(head, rest) for head in range(self.geometry.num_kv_heads))

    @property
    def converted(self) -> bool:
        """Whether its attention is replaced."""
        return self.method != "softmax" and self.refused is None


def methods_of(method: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """A method and those of its parts, each once.

    Args:
        method: its name.
        options: its options as plain data.
    """
    parts = options.get("parts", ()) if method == BY_HEAD else ()
    return tuple(dict.fromkeys([method, *(part["method"] for part in parts if "method" in part)]))


@dataclass(frozen=True)
class Plan:
    """What is done to a model.

    Attributes:
        entries: its attention modules, in the order in which it calls them; empty if none was looked at.
        rewrites: what was done to its weights before that, a clause each.
    """

    entries: tuple[PlanEntry, ...]
    rewrites: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[PlanEntry, ...]:
        """Entries whose attention is replaced."""
        return tuple(entry for entry in self.entries if entry.converted)

    @property
    def is_native(self) -> bool:
        """Whether the result is an ordinary model, which loads without this package."""
        return not self.converted

    def require(self, *, allow_lossy: bool = False) -> None:
        """Insist that the plan can be carried out as asked.

        Raises:
            PlanError: nothing would be converted, a module is refused, or something would be left out without
                `allow_lossy`.
        """
        refused = [entry for entry in self.entries if entry.refused]
        if refused:
            raise PlanError(
                f"{refused[0].name} cannot be converted: {refused[0].refused}"
                + (f" (and {len(refused) - 1} more modules)" if len(refused) > 1 else "")
            )
        if not self.converted:
            raise PlanError("the recipe's attention rules leave every layer as it is")
        lossy = [entry for entry in self.converted if entry.lossy]
        if lossy and not allow_lossy:
            raise PlanError(
                f"{lossy[0].method} would leave out {' and '.join(lossy[0].lossy)} of {lossy[0].name} and "
                f"{len(lossy) - 1} more modules; pass --allow-lossy (allow_lossy=True) if healing shall make up for it"
            )

    def to_config(self) -> dict[str, Any]:
        """The `attnconv` section of config.json."""
        modules = {
            entry.name: {
                "method": entry.method,
                "options": entry.options,
                "geometry": entry.geometry.to_dict(),
                "layer_idx": entry.layer_idx,
            }
            for entry in self.converted
        }
        return sealed({"version": SECTION_VERSION, "modules": modules})

    @classmethod
    def from_config(cls, section: Any) -> "Plan":
        """Read the section of a saved config.

        Raises:
            PlanError: written by a newer version, damaged, or not ours at all.
        """
        return cls(
            tuple(
                PlanEntry(name, entry.layer_idx, entry.method, entry.options, geometry)
                for name, entry, geometry in read_section(section)
            )
        )

    def rename(self, names: dict[str, str]) -> "Plan":
        """The same plan for a model in which modules are called differently."""
        return replace(self, entries=tuple(replace(entry, name=names[entry.name]) for entry in self.entries))

    def new_tensors(self, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
        """Freshly initialised parameters of all cores, `<module>.attnconv.<parameter>`."""
        for entry in self.converted:
            core = create(entry.method, entry.geometry, **entry.options)
            for name, tensor in core.state_dict().items():
                yield f"{entry.name}.attnconv.{name}", tensor.to(dtype)


def make_plan(
    rules: Sequence[Rule], probed: Sequence[ProbedModule], *, allow_lossy: bool = False, check: bool = True
) -> Plan:
    """Decide for every probed module; the first rule that matches a layer wins.

    Layers are counted over the self-attention modules in call order, from 0.

    Args:
        rules: attention rules of a recipe.
        probed: what `probe` found.
        allow_lossy: accept that softcaps, sinks or biases are left out.
        check: insist that the plan can be carried out; turn off to look at it.

    Raises:
        PlanError: see `Plan.require`; or no attention was found.
    """
    layers = [module for module in probed if module.self_attention]
    if check and not layers:
        raise PlanError("no self-attention of this model goes through transformers' attention interface")
    matching = _matching(rules, layers)
    takers = choose_rules(rules, matching, layers)
    chosen = {module.name: own for module, own in zip(layers, takers, strict=True)}
    places = {module.name: index for index, module in enumerate(layers)}
    plan = Plan(
        tuple(
            _entry(module, _for_layer(rules, matching, places.get(module.name), layers), chosen.get(module.name, []))
            for module in probed
        )
    )
    if check:
        for sentence in unmatched_rules(rules, probed):
            raise PlanError(sentence)
        used = {position for own in takers for position in own}
        for position, rule in enumerate(rules):
            if position not in used:
                which = _called(position, rule)
                logger.warning("%s has no effect: earlier rules take all layers that it matches", which)
        plan.require(allow_lossy=allow_lossy)
    return plan


def unmatched_rules(rules: Sequence[Rule], probed: Sequence[ProbedModule]) -> tuple[str, ...]:
    """A sentence for each rule that matches no layer of a model.

    Args:
        rules: attention rules of a recipe.
        probed: what `probe` found.
    """
    layers = [module for module in probed if module.self_attention]
    matched = {position for positions in _matching(rules, layers) for position in positions}
    names = f", which are named like {layers[0].name}" if layers else ""
    return tuple(
        f"{_called(position, rule)} matches none of the {len(layers)} attention layers{names}"
        for position, rule in enumerate(rules)
        if position not in matched
    )


def _matching(rules: Sequence[Rule], layers: Sequence[ProbedModule]) -> list[list[int]]:
    """The places of the rules that match each layer."""
    return [
        [position for position, rule in enumerate(rules) if rule.matches(index, len(layers), module.name)]
        for index, module in enumerate(layers)
    ]


@dataclass(frozen=True)
class _LayerRule:
    """What a rule makes of one layer."""

    method: str
    options: dict[str, Any]


def _for_layer(
    rules: Sequence[Rule], matching: Sequence[Sequence[int]], index: int | None, layers: Sequence[ProbedModule]
) -> list[_LayerRule]:
    """The rules with the options that they have for a layer, as far as they match it."""
    own = () if index is None else matching[index]
    return [
        _LayerRule(
            rule.method,
            rule.options if index is None or position not in own else resolved_options(position, rule, index, layers),
        )
        for position, rule in enumerate(rules)
    ]


def _called(position: int, rule: Rule) -> str:
    heads = getattr(rule, "heads", None)
    which = f"layers: {getattr(rule, 'layers', 'all')}" + ("" if heads is None else f", heads: {heads}")
    return f"attention rule {position + 1} ({which}, method: {rule.method})"


def _entry(module: ProbedModule, rules: Sequence[_LayerRule], takers: Sequence[int | None]) -> PlanEntry:
    """What becomes of a module whose KV heads go by these rules."""
    method, options = _method(rules, takers)
    if method == "softmax":
        return PlanEntry(module.name, module.layer_idx, "softmax", {}, module.geometry)
    info = get_method(method)
    parsed = info.options_class(**options)
    options = parsed.model_dump(mode="json")
    keeps = info.module_class.keeps_softmax
    lossy = () if keeps else tuple(_LOSSY[name] for name in module.extras if name in _LOSSY)
    refused = info.module_class.why_unsupported(module.geometry, parsed)
    refused = refused or info.module_class.why_unsupported_tokens(parsed, module.image_tokens)
    classes = [get_method(name).module_class for name in methods_of(method, options)]
    unrotated = next((one.name for one in classes if one.reprojects or one.reads_unrotated), None)
    if unrotated is not None and not module.shows_rotation:
        refused = f"{unrotated!r} works before the rotary embedding, which {module.class_name} does not show"
    if keeps:
        # The model's own attention goes on as it is, whatever it does.
        pass
    elif "mask" in module.extras:
        refused = "it weighs keys through an attention mask of its own, which has no place in another attention"
    elif module.calls > 1 and module.geometry.causal:
        refused = f"it runs {module.calls} times in one forward, so one state cannot serve it"
    elif "sliding_window" in module.extras and any(one.name == "softmax" for one in classes):
        refused = "it sees no more than a window by itself, and heads that stay softmax would see everything"
    refused = refused or core_problem(method, options, module.geometry)
    return PlanEntry(module.name, module.layer_idx, method, options, module.geometry, lossy, refused)


def _method(rules: Sequence[_LayerRule], takers: Sequence[int | None]) -> tuple[str, dict[str, Any]]:
    """Method and options of a layer: those of its rule, or of parts where its KV heads differ."""
    # What no rule takes stays softmax.
    parts: list[tuple[list[int], str, dict[str, Any]]] = []
    for head, position in enumerate(takers):
        method = "softmax" if position is None else rules[position].method
        options = {} if position is None or method == "softmax" else rules[position].options
        same = next((part for part in parts if part[1:] == (method, options)), None)
        if same is None:
            parts.append(([head], method, options))
        else:
            same[0].append(head)
    if len(parts) <= 1:
        return parts[0][1:] if parts else ("softmax", {})
    written = [
        {"groups": groups, "method": method, "options": _written_out(method, options)}
        for groups, method, options in parts
    ]
    return BY_HEAD, {"parts": written}


def _written_out(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a method."""
    return get_method(method).options_class(**options).model_dump(mode="json")
