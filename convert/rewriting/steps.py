"""A rewrite as steps: each says which tensors it takes, what it makes of them, and how the configuration changes.

What a step gives is checked before it is written (`exactness.check_exactness`): the model before and after it, cut to a
few layers, must load in transformers with no tensor missing or left over, and, unless the step says by `inexact` why it
cannot, give the same logits to 2e-6 of the largest. So a new kind of rewrite needs no check of its own, only to say
whether it promises exactness:

    class PoolHeads(Step):
        inexact = "keys and values of several heads pooled into one"

For the cut to find its way, tensors of layers are named `...layers.N....`, and settings with one item for each layer
are lists; what else depends on a layer's place is listed in `cut.py`. The figure goes into receipt, card and terminal.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from ..reading.checkpoint import Checkpoint
from .moments import Moments
from .tensors import Target


class Step(ABC):
    """One rewrite of a checkpoint into another."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """What it does, one clause without a subject: `all weights cast to bfloat16`."""

    @property
    def inexact(self) -> str | None:
        """Why the result does not compute what the model before it did, by the nature of this rewrite.

        A clause such as `weights rounded to bfloat16`, or None for a rewrite that promises to change nothing.
        """
        return None

    @property
    def sources(self) -> Mapping[str, Checkpoint]:
        """Further checkpoints that it reads, by what they are called in public; their digests go into the receipt."""
        return {}

    def begin(self, checkpoint: Checkpoint) -> None:  # noqa: B027
        """Be told of the checkpoint that the rewrite begins with, before anything else; no tensor has been read.

        Raises:
            PlanError: a further checkpoint that it needs does not fit this one.
        """

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

    def settle(self, moments: Moments) -> None:  # noqa: B027
        """Take what was measured on the model as the steps before leave it.

        Called between planning and writing, if the recipe says on which text to measure; what is planned before has the
        same tensors, their shapes included. Steps that need no such thing ignore it.

        Args:
            moments: of each attention layer.
        """

    def compared(self, tensors: Mapping[str, Target]) -> Mapping[str, Target]:
        """What is compared in place of the tensors of the result, where a method of attention has yet to complete it.

        Args:
            tensors: those of the result, or of a later step's.
        """
        return tensors

    def drops(self, name: str) -> bool:
        """Whether a claimed tensor of this name may be missing from the result."""
        return False

    @abstractmethod
    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of the result."""
