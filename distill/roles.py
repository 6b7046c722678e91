"""Head roles trained: how much of its full attention each KV head needs, on texts that hide something."""

import torch
from transformers import PreTrainedTokenizerBase

from ..attention_modules.heads.head_roles import HeadRolesAttention
from ..errors import TrainingError
from ..evaluate.diagnose.needles import Hidden, Needles, divergences
from ..recipes.stages.roles import RolesStage
from .batches import Batch
from .head import TrainedHead
from .objective import Figures, Objective, ParameterGroup
from .trainee import Trainee


def roles_of(trainee: Trainee) -> dict[str, HeadRolesAttention]:
    """The layers with shares to train, by the names of the modules they serve."""
    return {name: core for name, core in trainee.cores().items() if isinstance(core, HeadRolesAttention)}


class RoleTraining(Objective):
    """KL(teacher || student) where a hidden number is asked for and on other tokens, and a price for full heads.

    Each sequence of the data has a number hidden in it, at a place that depends on the step alone. The model's weights
    stay as they are.

    Args:
        trainee: the converted model, with its tokenizer.
        stage: the recipe's stage.

    Raises:
        TrainingError: no layer is `head_roles`, or the model has no tokenizer.

    Paper: https://arxiv.org/abs/2410.10819
    """

    def __init__(self, trainee: Trainee, stage: RolesStage) -> None:
        self.trainee = trainee
        self.stage = stage
        self.cores = roles_of(trainee)
        if not self.cores:
            raise TrainingError(
                "The stage roles trains the shares of 'head_roles', and no converted layer is one: give a rule "
                "{layers: all, method: head_roles}"
            )
        if not isinstance(trainee.tokenizer, PreTrainedTokenizerBase):
            raise TrainingError("The stage roles hides numbers in texts, for which the model has no tokenizer")
        self.head = TrainedHead(trainee.model, stage.kind)
        self.teaching_head = TrainedHead(trainee.teacher, stage.kind)
        self.needles = Needles(trainee.tokenizer)
        # Part of the price that is asked at present, in [0, 1].
        self.rise = 1.0
        parameters = {f"{name}.attnconv.alpha": core.alpha for name, core in self.cores.items()}
        self.group = ParameterGroup(parameters, stage.learning_rate)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The shares."""
        return [self.group]

    def count(self, batch: Batch) -> int:
        """Sequences."""
        return batch.input_ids.shape[0]

    def price(self) -> torch.Tensor:
        """What the shares come to beyond those that cost nothing, mean over KV heads, with its graph."""
        shares = torch.cat([core.alpha for core in self.cores.values()]).clamp(0, 1)
        return self.rise * self.stage.penalty * (shares.mean() - self.stage.keep).clamp_min(0)

    def backward(self, batch: Batch, total: int) -> Figures:
        """Each sequence by itself: one pass of the teacher, one of the student."""
        with torch.no_grad():
            for core in self.cores.values():
                core.alpha.clamp_(0, 1)
        losses = [self._row(self.needles.hide(row.cpu()), 1 / total) for row in batch.input_ids]
        return Figures(torch.stack(losses).sum())

    def _row(self, hidden: Hidden, share: float) -> torch.Tensor:
        device = self.trainee.model.device
        row = Batch(hidden.ids.to(device))
        places = torch.cat([hidden.answers, hidden.others]).to(device)
        weights = torch.ones(len(places), device=device) / len(hidden.answers)
        weights[len(hidden.answers) :] = self.stage.text_weight / max(1, len(hidden.others))
        with torch.no_grad(), self.trainee.as_teacher():
            taught = self.teaching_head.run(row)[:, places]
        with self.trainee.as_student():
            found = self.head.run(row)[:, places]

        def loss(logits: torch.Tensor, positions: slice) -> torch.Tensor:
            with torch.no_grad():
                target = self.teaching_head.logits(taught[:, positions])
            return (divergences(logits, target) * weights[positions]).sum() * share

        return self.head.backward(found, loss, self.price() * share)
