"""Which layers of a model low-rank updates go onto."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import TrainingError

# Adapters go onto the model's own projections, never into the converted attention.
CORES = r".*\.attnconv(\..*)?"
ALL_LINEAR = "all-linear"


def find_targets(model: PreTrainedModel, targets: Iterable[str], *, rank: int = 1) -> list[str]:
    """The modules that adapters go onto, as peft wants them named.

    Args:
        model: The converted model, perhaps with adapters on it.
        targets: Last parts of module names, such as `q_proj`; `all-linear` stands for all linear modules outside the
            converted attention but the output head.
        rank: Rank of the updates.

    Raises:
        TrainingError: A name fits no module outside the converted attention, and the message says which there are; or
            the rank is beyond that of every layer.
    """
    modules = _own_matrices(model)
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        found = {name: module for name, module in modules.items() if _is_meant(target, name, module)}
        if not found:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in modules}))
            raise TrainingError(f'The model has no module "{target}" for LoRA to update; it has: {known}.')
        chosen |= found
    largest = max((min(_weight(module).shape) for module in chosen.values()), default=rank)
    if rank > largest:
        raise TrainingError(
            f"LoRA's rank {rank} is more than the {largest} that its largest layer in {', '.join(targets)} can have: "
            "set a smaller rank."
        )
    return sorted(chosen)


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
