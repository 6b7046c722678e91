"""Heads that a method left out, taken out of a layer's projections: weights, memory and work are those of the rest."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...attention_modules.base import AttentionModule
from ...attention_modules.geometry import Geometry
from ...attention_modules.registry import get_method
from ...errors import PlanError
from ..planning.plan import Plan, PlanEntry
from .attention_function import core_of
from .swap import build_core, converted_modules, note_plan, put_core

# What the projections to heads, and from them, are called in transformers.
INSIDE_ATTENTION = {
    "query": ("q_proj", "query", "q_lin"),
    "key": ("k_proj", "key", "k_lin"),
    "value": ("v_proj", "value", "v_lin"),
    "output": ("o_proj", "out_proj", "out_lin"),
}
# Of the module around it, where attention gives heads and that module puts them together.
OUTSIDE_ATTENTION = "output.dense"


ProjectionPlace = tuple[nn.Module, str, nn.Linear]


def prune_plan(plan: Plan) -> Plan:
    """A plan for layers without the KV heads that their methods leave out."""
    return replace(plan, entries=tuple(_pruned_entry(entry) for entry in plan.entries))


def _pruned_entry(entry: PlanEntry) -> PlanEntry:
    if not entry.converted:
        return entry
    info, geometry = get_method(entry.method), entry.geometry
    kept = info.module_class.num_kept(geometry, info.options_class.model_validate(entry.options))
    narrow = replace(geometry, num_heads=kept * geometry.num_groups, num_kv_heads=kept)
    return replace(entry, geometry=narrow)


def check_prunable(model: PreTrainedModel, plan: Plan) -> None:
    """Insist that heads can be taken out of a converted model's projections, as far as its methods leave some out.

    Args:
        model: the converted model.
        plan: the pruned plan, see `prune_plan`.

    Raises:
        PlanError: a layer has no projections that could be made narrower.
    """
    for name, (core, narrow) in _narrower(model, plan).items():
        _fitting_projections(model, name, core.geometry, narrow.geometry)


@torch.no_grad()
def take_heads_out(model: PreTrainedModel, plan: Plan) -> None:
    """Make the projections of a converted model as narrow as a pruned plan has them, in place.

    Args:
        model: the converted model.
        plan: the pruned plan.

    Raises:
        PlanError: a layer has no projections that could be made narrower.
    """
    for name, (core, narrow) in _narrower(model, plan).items():
        kept, wide = core.kept_heads, core.geometry
        for what, place in _fitting_projections(model, name, wide, narrow.geometry).items():
            each = _projection_width(what, wide) // wide.num_kv_heads
            _replace_linear(place, what, torch.cat([torch.arange(head * each, (head + 1) * each) for head in kept]))
        with torch.device(next(core.parameters()).device):
            new = build_core(narrow)
        _take_core_over(new, core, kept)
        put_core(model.get_submodule(name), new.train(core.training))
    note_plan(model, plan)


def narrow_to(model: PreTrainedModel, plan: Plan) -> None:
    """Make the projections of a model that was just built as narrow as its plan says, for weights that are to come.

    Args:
        model: a model that was converted by the plan, on any device.
        plan: of a saved conversion.
    """
    for entry in plan.converted:
        if not get_method(entry.method).module_class.prunes_heads:
            continue
        for what, place in _found_projections(model, entry.name).items():
            width = _projection_width(what, entry.geometry)
            if _projection_size(what, place) > width:
                _replace_linear(place, what, torch.arange(width))


def _narrower(model: PreTrainedModel, plan: Plan) -> dict[str, tuple[AttentionModule, PlanEntry]]:
    """The layers that have fewer heads in a plan than in a model."""
    modules = converted_modules(model)
    cores = [(core_of(modules[entry.name]), entry) for entry in plan.converted]
    return {entry.name: (core, entry) for core, entry in cores if core.geometry != entry.geometry}


def _found_projections(model: nn.Module, name: str) -> dict[str, ProjectionPlace]:
    """A layer's projections by what they are: the module that has each, its name there, and itself."""
    module = model.get_submodule(name)
    path, _, last = OUTSIDE_ATTENTION.rpartition(".")
    around = getattr(model.get_submodule(name.rpartition(".")[0]), path, None)
    candidates: list[tuple[str, nn.Module | None, str]]
    candidates = [(what, module, attribute) for what, names in INSIDE_ATTENTION.items() for attribute in names]
    candidates.append(("output", around, last))
    found: dict[str, ProjectionPlace] = {}
    for what, owner, attribute in candidates:
        linear = getattr(owner, attribute, None)
        if isinstance(owner, nn.Module) and isinstance(linear, nn.Linear):
            found.setdefault(what, (owner, attribute, linear))
    return found


def _projection_width(what: str, geometry: Geometry) -> int:
    heads = geometry.num_heads if what in ("query", "output") else geometry.num_kv_heads
    return heads * (geometry.head_dim if what in ("query", "key") else geometry.value_dim)


def _projection_size(what: str, place: ProjectionPlace) -> int:
    return place[2].in_features if what == "output" else place[2].out_features


def _fitting_projections(model: nn.Module, name: str, wide: Geometry, narrow: Geometry) -> dict[str, ProjectionPlace]:
    """The projections of a layer, each with as many heads as it has.

    Raises:
        PlanError: they are not four linear modules of its heads and nothing else.
    """
    found, module = _found_projections(model, name), model.get_submodule(name)
    fitting = {what for what, place in found.items() if _projection_size(what, place) == _projection_width(what, wide)}
    known = {id(parameter) for _, _, linear in found.values() for parameter in linear.parameters()}
    known |= {id(parameter) for parameter in core_of(module).parameters()}
    others = [other for other, parameter in module.named_parameters() if id(parameter) not in known]
    others = [other for other in others if _projection_width("query", wide) in module.get_parameter(other).shape]
    if fitting == INSIDE_ATTENTION.keys() and not others:
        return found
    why = f"its {others[0]} is of all heads" if others else "it has no linear layers of its own for each of q, k, v, o"
    raise PlanError(
        f"{name} ({type(module).__name__}) cannot be left with {narrow.num_kv_heads} of {wide.num_kv_heads} KV heads: "
        f"{why}; leave keep out"
    )


def _replace_linear(place: ProjectionPlace, what: str, rows: Tensor) -> None:
    """Put a linear module of some outputs, or inputs, of another in its place."""
    owner, attribute, linear = place
    axis, rows = int(what == "output"), rows.to(linear.weight.device)
    weight, bias = linear.weight.detach().index_select(axis, rows), linear.bias
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if bias is not None:
        own = bias.detach() if axis else bias.detach().index_select(0, rows)
        made.bias = nn.Parameter(own, requires_grad=bias.requires_grad)
    setattr(owner, attribute, made.train(linear.training))


def _take_core_over(new: AttentionModule, old: AttentionModule, kept: list[int]) -> None:
    """Give a core what another has of the heads that it serves."""
    theirs = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        whole = theirs[name]
        parameter.copy_(whole if whole.shape == parameter.shape else whole[kept])
        parameter.requires_grad_(whole.requires_grad)
