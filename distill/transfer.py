"""Attention transfer: each converted layer learns to give the output of the softmax attention it replaces."""

import torch

from ..attention_modules import Call, Tokens, create
from ..convert.surgery.attention_function import AttentionCall, attention_hook
from ..errors import TrainingError
from ..recipes.stages.attention_transfer import AttentionTransferStage
from .batches import Batch
from .gates import refuse_gates
from .head import run_layers
from .losses import output_errors, weight_cross_entropy
from .objective import Figures, Objective, ParameterGroup
from .trainee import Trainee


class AttentionTransfer(Objective):
    """Teacher-forced and local to each layer.

    The model runs once, with softmax attention, and without a graph. At each converted layer the new attention is
    computed from the very query, key and value that softmax gets, its loss is taken, and its backward pass runs at
    once: what a layer needs for its gradients is gone before the next layer begins.

    The loss of a layer is `output_mse` times the mean squared error of the heads' outputs (divided, with
    `normalize_per_layer`, by the mean square of the teacher's outputs of that layer in the same micro-batch), plus
    `weight_cross_entropy` times the cross-entropy of the attention weights; that of the model is the mean over layers.

    Args:
        trainee: the converted model.
        stage: the recipe's stage.

    Raises:
        TrainingError: None of the converted layers has parameters, or the attention weights of one are no
            distribution, so that `weight_cross_entropy` means nothing for them.

    Paper: https://arxiv.org/abs/2410.10254
    """

    def __init__(self, trainee: Trainee, stage: AttentionTransferStage) -> None:
        self.trainee = trainee
        self.stage = stage
        refuse_gates(trainee, stage.kind)
        parameters = trainee.core_parameters()
        if not parameters:
            raise TrainingError("The stage attention_transfer has nothing to train: no converted layer has parameters.")
        self._check_weights()
        self.learning_layers = len({name.split(".attnconv.")[0] for name in parameters})
        self.group = ParameterGroup(parameters, stage.learning_rate)

    def _check_weights(self) -> None:
        cores = self.trainee.cores().values()
        unnormalized = next((core.name for core in cores if not core.is_normalized), None)
        if self.stage.loss.weight_cross_entropy > 0 and unnormalized is not None:
            raise TrainingError(
                f"The attention weights of {unnormalized!r} are no distribution, so they cannot be compared with those "
                "of softmax: set loss.weight_cross_entropy to 0 and loss.output_mse above it."
            )

    def parameter_groups(self) -> list[ParameterGroup]:
        """The cores' parameters."""
        return [self.group]

    def count(self, batch: Batch) -> int:
        """Real tokens."""
        return batch.num_tokens

    def backward(self, batch: Batch, total: int) -> Figures:
        """Run the model once; every converted layer runs its own backward pass on the way."""
        share = batch.num_tokens / total
        losses: list[torch.Tensor] = []
        errors: dict[str, torch.Tensor] = {}

        def learn(call: AttentionCall) -> torch.Tensor:
            teacher = call.teacher()
            with torch.enable_grad():
                loss, errors[call.name] = self._layer_loss(call, teacher, share)
            losses.append(loss.detach())
            if loss.requires_grad:
                loss.backward()
            return teacher

        self.trainee.model.eval()
        with torch.no_grad(), attention_hook(self.trainee.model, learn):
            run_layers(self.trainee.model, batch)
        return Figures(torch.stack(losses).sum(), errors)

    def _layer_loss(
        self, call: AttentionCall, teacher: torch.Tensor, share: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's part of the step's loss, with its graph, and of its relative error, without."""
        settings = self.stage.loss
        absolute, relative = output_errors(call.student(), teacher, call.padding_mask)
        loss = settings.output_mse * (relative if settings.normalize_per_layer else absolute)
        if settings.weight_cross_entropy > 0:
            loss = loss + settings.weight_cross_entropy * attention_weight_loss(call)
        return loss * (share / self.learning_layers), relative.detach() * share


def attention_weight_loss(call: AttentionCall) -> torch.Tensor:
    """Cross-entropy of the new attention's weights against those of softmax, mean over heads and real queries.

    Weights are what attention makes of unit vectors as values, `[heads, T, T]` for a row; rows are taken one by one
    and without their padding. Softmax is that of the scaled products, without the soft caps or sinks of some models.
    """
    softmax = create("softmax", call.core.geometry)
    losses, lengths = [], []
    for query, key, hidden, _ in call.rows():
        query, key = query.detach().float(), key.detach().float()
        length = key.shape[2]
        units = torch.eye(length, device=key.device).expand(1, key.shape[1], length, length)
        hidden_states = None
        if call.core.reads_hidden_states and hidden is not None:
            hidden_states = hidden.detach().float()
        tokens = Tokens(key, units, signals=call.core.signals(key, hidden_states))
        given = Call(query, tokens, call.scaling, hidden_states)
        student, teacher = (core.attend_naive(given, {}) for core in (call.core, softmax))
        losses.append(weight_cross_entropy(student, teacher, None) * length)
        lengths.append(length)
    return torch.stack(losses).sum() / max(1, sum(lengths))
