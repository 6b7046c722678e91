"""Gates on heads and routers of experts while they heal: what cannot train them, and what keeps them balanced."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..attention_modules.heads.gate import HeadGate
from ..convert.surgery.attention_function import AttentionCall
from ..errors import TrainingError
from .mixtures import RouterWatch
from .trainee import Trainee


def gates_of(trainee: Trainee) -> dict[str, HeadGate]:
    """The converted layers that weigh heads, by the names of the modules they serve."""
    return {name: core for name, core in trainee.cores().items() if isinstance(core, HeadGate)}


def refuse_gates(trainee: Trainee, kind: str) -> None:
    """Refuse a stage that compares heads, which gates change on purpose.

    Args:
        trainee: the converted model.
        kind: the stage.

    Raises:
        TrainingError: a layer weighs its heads.
    """
    found = next(iter(gates_of(trainee).values()), None)
    if found is not None:
        raise TrainingError(
            f"The stage {kind} compares heads before they are put together, and {found.name!r} weighs them on purpose: "
            "take a stage logits or lora with train_cores: true, or features, in its place"
        )


def refuse_ties(trainee: Trainee, kind: str) -> None:
    """Refuse to train gates that cannot tell tokens apart.

    Args:
        trainee: the converted model.
        kind: the stage.

    Raises:
        TrainingError: a router of theirs gives all its choices the same score.
    """
    for name, gate in gates_of(trainee).items():
        tie = gate.tie
        if tie is not None:
            raise TrainingError(
                f"The stage {kind} cannot start from {name} ({gate.name!r}): {tie}. Put a stage calibrate before it, "
                "or let all be active"
            )


class Balance:
    """What keeps gates and routers from using the same heads and experts for all tokens, as terms of a stage's loss.

    For gates it is the mean over layers of each gate's balance loss, a function of one call's tokens alone, so that
    nothing has to be kept between calls and layers may be computed again; for routers see `RouterWatch`.

    Args:
        trainee: the converted model.
        weight: of the balance losses; 0 leaves them out.
        kind: the stage.
        z: weight of the routers' z loss.
        routers: whether the stage trains the routers of experts.

    Raises:
        TrainingError: there is a weight and nothing to balance, or there are no routers to train, or none that could
            learn.
    """

    def __init__(self, trainee: Trainee, weight: float, kind: str, *, z: float = 0.0, routers: bool = False) -> None:
        self.weight = weight
        self.losses: list[torch.Tensor] = []
        self.watch = RouterWatch(trainee.model, balance=weight, z=z)
        if weight and not (gates_of(trainee) or self.watch.routers):
            raise TrainingError(
                f"The stage {kind} has a balance of {weight:g}, but no converted layer weighs its heads, and there are "
                "no experts: set it to 0"
            )
        if z and not self.watch.routers:
            raise TrainingError(f"The stage {kind} has a z loss, and the model has no experts: set z to 0")
        if routers and not self.watch.routers:
            raise TrainingError(f"The stage {kind} is to train routers of experts, and the model has none")
        if routers:
            self.watch.refuse_ties(kind)

    def look(self, call: AttentionCall) -> None:
        """Take the loss of a layer's call on, outside of what is computed again for its gradients."""
        if self.weight and isinstance(call.core, HeadGate):
            self.losses.append(call.core.balance_loss(call.query, call.hidden_states, call.padding_mask))

    @contextmanager
    def watching(self, trainee: Trainee) -> Iterator[None]:
        """Within the context the model is in training mode, and one pass of it is watched."""
        with trainee.as_student(self.look), self.watch.watching():
            yield

    def term(self, share: float, valid: torch.Tensor | None) -> torch.Tensor | None:
        """The terms of the pass that has just been made, with their graph; None if there are none.

        Args:
            share: of the pass in the step.
            valid: `[batch, T]` bool, True = real token; None means all.
        """
        losses, self.losses = self.losses, []
        terms = [self.weight * torch.stack(losses).mean()] if losses else []
        routed = self.watch.term(valid)
        terms += [] if routed is None else [routed]
        return share * torch.stack(terms).sum() if terms else None
