"""A rewrite as steps: each says which tensors it takes, what it makes of them, and how the configuration changes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from .tensors import Target


class Step(ABC):
    """One rewrite of a checkpoint into another."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """What it does, one clause without a subject: `all weights cast to bfloat16`."""

    @abstractmethod
    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse a model that it cannot rewrite, as its config.json says.

        Raises:
            PlanError: says why, and what to do.
        """

    @abstractmethod
    def claims(self, tensor: Target) -> bool:
        """Whether it decides what becomes of a tensor; one that no step claims is copied."""

    @abstractmethod
    def rewrite(self, claimed: Mapping[str, Target]) -> Iterable[Target]:
        """What takes the place of the tensors that it claims.

        Raises:
            PlanError: a tensor cannot be rewritten.
        """

    def drops(self, name: str) -> bool:
        """Whether a claimed tensor of this name may be missing from the result."""
        return False

    @abstractmethod
    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of the result."""
