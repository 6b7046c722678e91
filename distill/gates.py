"""Gates on heads while they heal: what they cannot be trained by, and what keeps them balanced."""

import torch

from ..attention_modules.heads.gate import HeadGate
from ..convert.surgery.attention_function import AttentionCall
from ..errors import TrainingError
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
    """What keeps gates from using the same heads for all tokens, as a term of a stage's loss.

    The term is the mean over layers of each gate's balance loss, a function of one call's tokens alone, so that
    nothing has to be kept between calls and layers may be computed again.

    Args:
        trainee: the converted model.
        weight: of the term in the loss; 0 leaves it out.
        kind: the stage.

    Raises:
        TrainingError: there is a weight, and no gate.
    """

    def __init__(self, trainee: Trainee, weight: float, kind: str) -> None:
        self.weight = weight
        self.losses: list[torch.Tensor] = []
        if weight and not gates_of(trainee):
            raise TrainingError(
                f"The stage {kind} has a balance of {weight:g}, but no converted layer weighs its heads: set it to 0"
            )

    def look(self, call: AttentionCall) -> None:
        """Take the loss of a layer's call on, outside of what is computed again for its gradients."""
        if self.weight and isinstance(call.core, HeadGate):
            self.losses.append(call.core.balance_loss(call.query, call.hidden_states, call.padding_mask))

    def term(self, share: float) -> torch.Tensor | None:
        """The term of the pass that has just been made, with its graph; None if there is none.

        Args:
            share: of the pass in the step.
        """
        losses, self.losses = self.losses, []
        return self.weight * share * torch.stack(losses).mean() if losses else None
