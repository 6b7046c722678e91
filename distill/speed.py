"""The training step whose speed and memory a benchmark measures."""

import torch
from transformers import PreTrainedModel

from ..evaluate.bench import TrainingStep
from ..recipes.stages.attention_transfer import AttentionTransferStage
from .batches import Batch
from .trainee import Trainee
from .transfer import AttentionTransfer


def transfer_cases(model: PreTrainedModel) -> TrainingStep:
    """Prepare a converted model for steps of attention transfer: forward and backward of its cores, no optimizer.

    Args:
        model: a converted model; its cores are turned to fp32, as for training.

    Returns:
        one step on token ids `[batch, T]` without padding. It leaves the weights as they are and no gradients behind.

    Raises:
        TrainingError: None of the converted layers has parameters.
    """
    trainee = Trainee(model)
    # Only the loss matters for what is measured; length and learning rate are those of a run that never happens.
    stage = AttentionTransferStage(steps=1, sequence_length=512, learning_rate=1e-3)
    transfer = AttentionTransfer(trainee, stage)
    parameters = [parameter for group in transfer.parameter_groups() for parameter in group.parameters.values()]
    trainee.train_only(parameters)

    def step(input_ids: torch.Tensor) -> None:
        batch = Batch(input_ids)
        try:
            transfer.backward(batch, batch.num_tokens)
        finally:
            for parameter in parameters:
                parameter.grad = None

    return step
