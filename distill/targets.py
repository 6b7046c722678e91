"""Which layers of a model low-rank updates go onto."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import TrainingError

# Adapters go onto the model's own projections, never into the converted attention.
CORES = r".*\.attnconv(\..*)?"
ALL_LINEAR = "all-linear"
# Stands for the weights of all experts of a mixture, which transformers keep in one tensor for each projection.
EXPERTS = "experts"


class LoraSettings(Protocol):
    """What a recipe says about adapters, whatever the kind of its stage."""

    rank: int
    alpha: float
    dropout: float
    targets: list[str]


@dataclass(frozen=True)
class Targets:
    """What low-rank updates go onto, as peft wants it named.

    Attributes:
        modules: names of modules.
        parameters: names of tensors that hold the weights of many experts, `[experts, out, in]` or the like.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...] = ()


def find_targets(model: PreTrainedModel, settings: LoraSettings) -> Targets:
    """What adapters go onto.

    Args:
        model: the converted model, perhaps with adapters on it.
        settings: rank, dropout and targets: last parts of module names, such as `q_proj`; `all-linear` stands for all
            linear modules outside the converted attention but the output head, `experts` for the weights of all experts
            that transformers keeps in one tensor.

    Raises:
        TrainingError: a name fits no module outside the converted attention, and the message says which there are; it
            would leave out experts; the rank is beyond that of every layer; or experts are to have dropout.
    """
    modules, fused = _own_matrices(model), _fused_experts(model)
    chosen: dict[str, nn.Module] = {}
    for target in settings.targets:
        if target == EXPERTS and fused:
            continue
        found = {name: module for name, module in modules.items() if _is_meant(target, name, module)}
        _refuse_half(target, found, fused)
        if not found:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in modules} | ({EXPERTS} if fused else set())))
            raise TrainingError(f'The model has no module "{target}" for LoRA to update; it has: {known}.')
        chosen |= found
    parameters = fused if EXPERTS in settings.targets else {}
    if parameters and settings.dropout:
        raise TrainingError(
            f"LoRA on experts adds to their weights and never sees their inputs, of which dropout {settings.dropout:g} "
            "could drop some: set dropout to 0"
        )
    sides = [min(_weight(module).shape) for module in chosen.values()]
    sides += [min(parameter.shape[-2:]) for parameter in parameters.values()]
    rank, targets, largest = settings.rank, settings.targets, max(sides, default=settings.rank)
    if rank > largest:
        raise TrainingError(
            f"LoRA's rank {rank} is more than the {largest} that its largest layer in {', '.join(targets)} can have: "
            "set a smaller rank."
        )
    return Targets(tuple(sorted(chosen)), tuple(sorted(parameters)))


def _fused_experts(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Tensors that hold the weights of many experts, by name, without what an adapter put around them.

    They belong to a module called `experts`, or to one whose class says so (`GraniteMoeParallelExperts`).
    """
    named = {name for name, module in model.named_modules() if "Experts" in type(module).__name__}
    found = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if parameter.ndim == 3 and ".lora_" not in name and (owner in named or EXPERTS in owner.split(".")):
            found[name.replace(".base_layer", "")] = parameter
    return found


def _refuse_half(target: str, found: Mapping[str, nn.Module], fused: Iterable[str]) -> None:
    """Refuse a name of projections that experts have too, but in one tensor, where peft would miss them in silence."""
    stems = {name.rsplit(".", 1)[-1] for name in fused}
    # gate_up_proj holds gate_proj and up_proj side by side.
    held = stems | ({"gate_proj", "up_proj"} if "gate_up_proj" in stems else set())
    if target in held or (target == ALL_LINEAR and fused):
        others = f" and would update {len(found)} other modules alone" if found else ""
        raise TrainingError(
            f'"{target}" does not reach the experts, whose weights are one tensor for each projection{others}: '
            f'name "{EXPERTS}" for them, and every other module by its own name'
        )


def _is_meant(target: str, name: str, module: nn.Module) -> bool:
    if target == ALL_LINEAR:
        return isinstance(module, nn.Linear | Conv1D)
    return name == target or name.endswith(f".{target}")


def _own_matrices(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The model's own modules with a matrix, without the head; one that an adapter wraps, as it was."""
    outside, head = re.compile(CORES), model.get_output_embeddings()
    found: dict[str, nn.Module] = {}
    wrapped: list[str] = []
    # A module comes before what it holds.
    for name, module in model.named_modules():
        if outside.fullmatch(name) or any(name.startswith(prefix) for prefix in wrapped):
            continue
        base = getattr(module, "base_layer", None)
        if base is not None:
            wrapped.append(f"{name}.")
        own = module if base is None else base
        if own is not head and getattr(_weight(own), "ndim", 0) == 2:
            found[name] = own
    return found


def _weight(module: nn.Module) -> Any:
    return getattr(module, "weight", None)
