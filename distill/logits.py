"""Logit distillation: the converted model learns the teacher's distribution over the next token."""

import torch

from ..errors import TrainingError
from ..recipes.stages.logits import LogitsStage
from .batches import Batch
from .gates import Balance, refuse_ties
from .head import TrainedHead
from .lora import core_group, router_group
from .losses import distillation_loss
from .objective import Figures, Objective, ParameterGroup
from .trainee import Trainee


class LogitDistillation(Objective):
    """KL(teacher || student) of the next-token distributions, mean over the real tokens.

    The teacher is the same model with softmax attention and without adapters, so no second copy of the weights is
    held, unless a rewrite has changed what the model computes: then it is the model that was rewritten. Its last hidden
    states are kept, its logits made again piece by piece beside the student's.

    Args:
        trainee: the converted model.
        stage: the recipe's stage.
        adapter: name of the adapter that this stage trains; None trains the cores alone.

    Raises:
        TrainingError: the stage trains the cores alone and they have no parameters.

    Paper: https://arxiv.org/abs/1503.02531
    """

    def __init__(self, trainee: Trainee, stage: LogitsStage, adapter: str | None) -> None:
        self.trainee = trainee
        self.temperature = stage.temperature
        self.head = TrainedHead(trainee.model, stage.kind)
        # Adapters sit on the layers and not on the head, so the head of a model that teaches itself is the same.
        self.teaching_head = TrainedHead(trainee.teacher, stage.kind)
        self.groups: list[ParameterGroup] = []
        if adapter is not None:
            self.groups.append(ParameterGroup(trainee.adapter_parameters(adapter), stage.learning_rate))
        if stage.train_cores:
            self.groups += core_group(trainee, stage.core_learning_rate or stage.learning_rate)
        if stage.trains_routers:
            self.groups += router_group(trainee, stage.core_learning_rate or stage.learning_rate)
        refuse_ties(trainee, stage.kind)
        self.balance = Balance(trainee, stage.balance, stage.kind, z=stage.z, routers=stage.trains_routers)
        if not self.groups:
            raise TrainingError(
                "The stage logits has nothing to train: no adapter, no routers, and no converted layer has parameters."
            )

    def parameter_groups(self) -> list[ParameterGroup]:
        """The adapter and the cores, as far as they train."""
        return self.groups

    def count(self, batch: Batch) -> int:
        """Real tokens: each has a distribution to match, the last of a sequence too."""
        return batch.num_tokens

    def backward(self, batch: Batch, total: int) -> Figures:
        """One pass of the teacher, one of the student, then the head of both in pieces."""
        with torch.no_grad(), self.trainee.as_teacher():
            taught = self.teaching_head.run(batch)
        with self.balance.watching(self.trainee):
            hidden = self.head.run(batch)
        valid = batch.padding_mask

        def loss(logits: torch.Tensor, positions: slice) -> torch.Tensor:
            with torch.no_grad():
                target = self.teaching_head.logits(taught[:, positions])
            chosen = None if valid is None else valid[:, positions]
            return distillation_loss(logits, target, chosen, temperature=self.temperature) / total

        term = self.balance.term(self.count(batch) / total, valid)
        return Figures(self.head.backward(hidden, loss, term), loads=self.balance.watch.loads(valid))
