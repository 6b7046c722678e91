"""How far the converted attention is from the softmax attention it stands for."""

import torch

from ..convert.surgery.attention_function import AttentionCall, attention_hook
from ..convert.surgery.head import evaluating
from .batches import Batch
from .head import run_layers
from .losses import output_errors
from .trainee import Trainee


@torch.no_grad()
def output_distance(trainee: Trainee, batch: Batch) -> dict[str, float]:
    """Each layer's squared output error relative to the teacher's power, every layer fed with the teacher's input.

    Args:
        trainee: the converted model.
        batch: what to measure on.

    Returns:
        by module name: 0 = equal to softmax attention, 1 = no better than an output of zeros.
    """
    errors: dict[str, float] = {}

    def compare(call: AttentionCall) -> torch.Tensor:
        teacher = call.teacher()
        errors[call.name] = float(output_errors(call.student(), teacher, call.padding_mask)[1])
        return teacher

    with evaluating(trainee.model), attention_hook(trainee.model, compare):
        run_layers(trainee.model, batch)
    return errors
