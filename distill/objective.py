"""What every kind of healing stage answers: what it trains, and what one micro-batch adds to the gradients."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from .batches import Batch


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one learning rate.

    Attributes:
        parameters: by their names.
        learning_rate: at the peak of the schedule.
    """

    parameters: dict[str, nn.Parameter]
    learning_rate: float


@dataclass(frozen=True)
class Figures:
    """What was measured on the way, as scalar tensors; those of the micro-batches of a step add up to the step's.

    Attributes:
        loss: what is minimised.
        layers: relative squared error of each layer's attention output, by module name; empty if not measured.
        loads: how many tokens went to each expert, `[experts]` by router; empty without experts.
    """

    loss: torch.Tensor
    layers: dict[str, torch.Tensor] = field(default_factory=dict)
    loads: dict[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def total(parts: Iterable["Figures"]) -> "Figures":
        """The sum of some figures, at least one."""
        parts = list(parts)
        loss = torch.stack([part.loss for part in parts]).sum()
        layers = {name: torch.stack([part.layers[name] for part in parts]).sum() for name in parts[0].layers}
        loads = {name: torch.stack([part.loads[name] for part in parts]).sum(0) for name in parts[0].loads}
        return Figures(loss, layers, loads)


class Objective(ABC):
    """A kind of stage on one model."""

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """What trains, at which learning rate; the same in every call."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """How many items of the batch the loss is a mean over."""

    @abstractmethod
    def backward(self, batch: Batch, total: int) -> Figures:
        """Add the batch's part of the step's gradients to the parameters' `.grad`.

        Args:
            batch: a micro-batch on the model's device.
            total: items in the whole step, over all micro-batches and processes: the loss is the sum over the batch's
                items divided by this.
        """
