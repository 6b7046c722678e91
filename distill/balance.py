"""Router warm-up: which expert a token goes through is learned before the experts change."""

import torch

from ..recipes.stages.balance import BalanceStage
from .batches import Batch
from .gates import Balance
from .head import TrainedHead
from .lora import router_group
from .losses import next_token_loss
from .objective import Figures, Objective, ParameterGroup
from .trainee import Trainee


class RouterBalance(Objective):
    """Balance loss, z loss and next-token loss on the routers' own weights.

    Args:
        trainee: a model with mixtures of experts.
        stage: the recipe's stage.

    Raises:
        TrainingError: the model has no experts, or routers that cannot tell tokens apart.

    Paper: https://arxiv.org/abs/2101.03961
    """

    def __init__(self, trainee: Trainee, stage: BalanceStage) -> None:
        self.trainee = trainee
        self.next_token = stage.next_token
        self.head = TrainedHead(trainee.model, stage.kind)
        self.balance = Balance(trainee, stage.balance, stage.kind, z=stage.z, routers=True)
        self.groups = router_group(trainee, stage.learning_rate)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The routers."""
        return self.groups

    def count(self, batch: Batch) -> int:
        """Tokens to predict."""
        return batch.num_targets

    def backward(self, batch: Batch, total: int) -> Figures:
        """One pass through the layers, then the head, as far as its loss weighs anything."""
        targets, valid = batch.targets, batch.padding_mask
        with self.balance.watching(self.trainee):
            hidden = self.head.run(batch)

        def loss(logits: torch.Tensor, positions: slice) -> torch.Tensor:
            return self.next_token * next_token_loss(logits, targets[:, positions]) / total

        term = self.balance.term(self.count(batch) / total, valid)
        loads = self.balance.watch.loads(valid)
        if self.next_token or term is None:
            return Figures(self.head.backward(hidden, loss, term), loads=loads)
        term.backward()
        return Figures(term.detach(), loads=loads)
