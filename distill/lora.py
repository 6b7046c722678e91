"""Low-rank adaptation: the model's own projections learn to live with the new attention."""

import torch

from ..recipes.stages.lora import LoraStage
from .batches import Batch
from .gates import Balance, refuse_ties
from .head import TrainedHead
from .losses import next_token_loss
from .objective import Figures, Objective, ParameterGroup
from .trainee import Trainee


class LoraTuning(Objective):
    """Next-token loss on low-rank updates of the model's own weights, and on the cores if the recipe says so.

    Args:
        trainee: the converted model.
        stage: the recipe's stage.
        adapter: name of the adapter that this stage trains.

    Paper: https://arxiv.org/abs/2106.09685
    """

    def __init__(self, trainee: Trainee, stage: LoraStage, adapter: str) -> None:
        self.trainee = trainee
        self.head = TrainedHead(trainee.model, stage.kind)
        refuse_ties(trainee, stage.kind)
        self.balance = Balance(trainee, stage.balance, stage.kind, z=stage.z, routers=stage.trains_routers)
        self.groups = [ParameterGroup(trainee.adapter_parameters(adapter), stage.learning_rate)]
        if stage.train_cores:
            self.groups += core_group(trainee, stage.core_learning_rate or stage.learning_rate)
        if stage.trains_routers:
            self.groups += router_group(trainee, stage.core_learning_rate or stage.learning_rate)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The adapter, and the cores if they train."""
        return self.groups

    def count(self, batch: Batch) -> int:
        """Tokens to predict."""
        return batch.num_targets

    def backward(self, batch: Batch, total: int) -> Figures:
        """One pass through the layers, then the head and its loss in pieces."""
        targets = batch.targets
        with self.balance.watching(self.trainee):
            hidden = self.head.run(batch)

        def loss(logits: torch.Tensor, positions: slice) -> torch.Tensor:
            return next_token_loss(logits, targets[:, positions]) / total

        term = self.balance.term(self.count(batch) / total, batch.padding_mask)
        return Figures(self.head.backward(hidden, loss, term), loads=self.balance.watch.loads(batch.padding_mask))


def core_group(trainee: Trainee, learning_rate: float) -> list[ParameterGroup]:
    """The cores' parameters as a group of their own; none if they have none."""
    parameters = trainee.core_parameters()
    return [ParameterGroup(parameters, learning_rate)] if parameters else []


def router_group(trainee: Trainee, learning_rate: float) -> list[ParameterGroup]:
    """The weights of a mixture's routers as a group of their own; none if it has none."""
    trainee.open_routers()
    return [ParameterGroup(trainee.own.trained, learning_rate)] if trainee.own.trained else []
