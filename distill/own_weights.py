"""Weights of the model itself that are trained as they are, such as the routers of a mixture."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class OwnWeights:
    """Parameters of a model that healing changes, each with a copy in float32 that an optimizer can train.

    A parameter in float32 is its own copy. Gradients of others go to their copies as they come, and `push` writes what
    the optimizer made of these back.
    """

    def __init__(self) -> None:
        self._parameters: dict[str, nn.Parameter] = {}
        self._starts: dict[str, Tensor] = {}
        self.trained: dict[str, nn.Parameter] = {}
        """What the optimizer trains, by the parameters' names."""

    def add(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Let these be trained too; those that are already stay as they are."""
        for name, parameter in parameters.items():
            if name in self.trained:
                continue
            self._parameters[name] = parameter
            self._starts[name] = parameter.detach().clone()
            if parameter.dtype == torch.float32:
                self.trained[name] = parameter
                continue
            copy = nn.Parameter(parameter.detach().float(), requires_grad=False)
            self.trained[name] = copy
            # Hooks go onto what takes gradients alone.
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(_handing_to(copy))
            parameter.requires_grad_(False)

    def open(self, chosen: Iterable[nn.Parameter]) -> None:
        """Let the model's parameters take gradients whose copies are among those chosen."""
        places = {id(parameter) for parameter in chosen}
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(id(self.trained[name]) in places)

    @torch.no_grad()
    def push(self) -> None:
        """Write the copies into the model."""
        for name, parameter in self._parameters.items():
            if self.trained[name] is not parameter:
                parameter.copy_(self.trained[name])

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Within the context the model has the weights that it had before any training."""
        now = {name: parameter.data for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            parameter.data = self._starts[name]
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = now[name]


def _handing_to(copy: nn.Parameter) -> Callable[[Tensor], None]:
    def hand_over(parameter: Tensor) -> None:
        if parameter.grad is not None:
            gradient = parameter.grad.float()
            copy.grad = gradient if copy.grad is None else copy.grad + gradient
            parameter.grad = None

    return hand_over
