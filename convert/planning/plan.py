"""What will be done to each attention module, decided before anything is touched."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ...attention_modules.geometry import Geometry
from ...attention_modules.registry import create, get_method
from ...errors import PlanError
from .probe import ProbedModule
from .section import SECTION_VERSION, core_problem, read_section, sealed

logger = logging.getLogger(__name__)

# What a softmax layer may add to its logits and a replacement leaves out.
_LOSSY = {
    "softcap": "a soft cap on attention logits",
    "s_aux": "learned attention sinks",
    "position_bias": "an additive position bias",
    "indices": "the model's own sparse selection of keys",
}


class Rule(Protocol):
    """What a recipe says about layers; `recipes.AttentionRule` is one."""

    @property
    def method(self) -> str:
        """A registered method."""

    @property
    def options(self) -> dict[str, Any]:
        """Its options."""

    def matches(self, index: int, num_layers: int, module_name: str) -> bool:
        """Whether this rule takes the attention layer at `index` of `num_layers`."""


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
    def converted(self) -> bool:
        """Whether its attention is replaced."""
        return self.method != "softmax" and self.refused is None


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
    chosen = {module.name: rules[positions[0]] for module, positions in zip(layers, matching, strict=True) if positions}
    plan = Plan(tuple(_entry(module, chosen.get(module.name)) for module in probed))
    if check:
        for sentence in unmatched_rules(rules, probed):
            raise PlanError(sentence)
        for position, rule in enumerate(rules):
            if not any(positions and positions[0] == position for positions in matching):
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


def _called(position: int, rule: Rule) -> str:
    return f"attention rule {position + 1} (layers: {getattr(rule, 'layers', 'all')}, method: {rule.method})"


def _entry(module: ProbedModule, rule: Rule | None) -> PlanEntry:
    if rule is None or rule.method == "softmax":
        return PlanEntry(module.name, module.layer_idx, "softmax", {}, module.geometry)
    info = get_method(rule.method)
    parsed = info.options_class(**rule.options)
    options = parsed.model_dump(mode="json")
    keeps = info.module_class.keeps_softmax
    lossy = () if keeps else tuple(_LOSSY[name] for name in module.extras if name in _LOSSY)
    refused = info.module_class.why_unsupported(module.geometry, parsed)
    refused = refused or info.module_class.why_unsupported_tokens(parsed, module.image_tokens)
    if (info.module_class.reprojects or info.module_class.reads_unrotated) and not module.shows_rotation:
        refused = f"{rule.method!r} works before the rotary embedding, which {module.class_name} does not show"
    if keeps:
        # The model's own attention goes on as it is, whatever it does.
        pass
    elif "mask" in module.extras:
        refused = "it weighs keys through an attention mask of its own, which has no place in another attention"
    elif module.calls > 1 and module.geometry.causal:
        refused = f"it runs {module.calls} times in one forward, so one state cannot serve it"
    refused = refused or core_problem(rule.method, options, module.geometry)
    return PlanEntry(module.name, module.layer_idx, rule.method, options, module.geometry, lossy, refused)
