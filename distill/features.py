"""Feature distillation: the converted model learns to end with the teacher's hidden states."""

from typing import Any

import torch

from ..errors import TrainingError
from ..recipes.stages.features import FeaturesStage
from .batches import Batch
from .gates import Balance, refuse_ties
from .head import run_layers
from .lora import core_group
from .losses import TINY_POWER, mean_square, output_errors
from .objective import Figures, Objective, ParameterGroup
from .trainee import Trainee


class FeatureDistillation(Objective):
    """Squared error of the last hidden states over the mean square of the teacher's, plus that of the pooled output.

    For models without a language-model head. Later layers learn to make up for what errors of earlier ones add up to,
    and the pooled output, one vector for hundreds of tokens, counts as much as all of them. The teacher is the same
    model with softmax attention, or the one that was rewritten into it; neither has dropout.

    Args:
        trainee: the converted model.
        stage: the recipe's stage.

    Raises:
        TrainingError: None of the converted layers has parameters.

    Paper: https://arxiv.org/abs/1412.6550
    """

    def __init__(self, trainee: Trainee, stage: FeaturesStage) -> None:
        self.trainee = trainee
        self.groups = core_group(trainee, stage.learning_rate)
        refuse_ties(trainee, stage.kind)
        self.balance = Balance(trainee, stage.balance, stage.kind)
        if not self.groups:
            raise TrainingError("The stage features has nothing to train: no converted layer has parameters.")

    def parameter_groups(self) -> list[ParameterGroup]:
        """The cores' parameters."""
        return self.groups

    def count(self, batch: Batch) -> int:
        """Real tokens, or images."""
        return batch.num_tokens

    def backward(self, batch: Batch, total: int) -> Figures:
        """One pass of the teacher and one of the student."""
        with torch.no_grad(), self.trainee.as_teacher() as teacher:
            taught = run_layers(teacher, batch)
        with self.balance.watching(self.trainee):
            self.trainee.model.eval()
            loss = feature_error(run_layers(self.trainee.model, batch), taught, batch.padding_mask)
            loss = loss * (batch.num_tokens / total)
            term = self.balance.term(batch.num_tokens / total, batch.padding_mask)
            loss = loss if term is None else loss + term
            loss.backward()
        return Figures(loss.detach(), loads=self.balance.watch.loads(batch.padding_mask))


def feature_error(student: Any, teacher: Any, valid: torch.Tensor | None) -> torch.Tensor:
    """Relative squared error of what two base models give: hidden states, and the pooled output if there is one.

    Args:
        student: what a transformers model without its head returns.
        teacher: the same of another.
        valid: `[batch, T]` bool, True = real token; None means all.
    """
    states = [output.last_hidden_state[:, None] for output in (student, teacher)]
    error = output_errors(states[0], states[1], valid)[1]
    pooled = getattr(student, "pooler_output", None)
    if pooled is None:
        return error
    difference = mean_square(pooled - teacher.pooler_output, None)
    return error + difference / (mean_square(teacher.pooler_output, None) + TINY_POWER)
