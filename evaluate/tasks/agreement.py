"""How far a model's predictions are from those of its base, position by position on a text."""

from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from ..engine.items import Item, Metric
from .base import EvaluatedModel, Outcome, Scope, Task, Unit, register_task
from .perplexity import LOGITS_AT_ONCE, logit_slices
from .textdata import TextSettings, TwoOrMore, Windows, comparable_base, cut_blocks, window_units

# Tensors of the size of a slice of logits that exist at the same time: two of logits, and what comes of them.
TENSORS = 8


class AgreementSettings(TextSettings):
    """Agreement with the base on a text."""

    kind: Literal["agreement"] = "agreement"
    tokens: TwoOrMore = 4096


@register_task(AgreementSettings)
class AgreementTask(Task[AgreementSettings]):
    """Compares the next-token distributions of both models after every token of a text."""

    headline = 5
    report_words = "agreement with the base's predictions"
    needs_base = True
    metrics = (
        Metric("KL divergence", "kl", "tokens", meaning="nats lost by predicting with the model in place of the base"),
        Metric(
            "top-1 agreement",
            "same",
            "tokens",
            better="higher",
            style="percent",
            meaning="how often both find the same next token most likely",
        ),
    )

    def units(self, evaluated: EvaluatedModel, scope: Scope) -> Sequence[Unit]:
        """Batches of windows."""
        if evaluated.base is not None:
            comparable_base(evaluated, 0)
        return window_units(evaluated, scope, self.settings)

    def measure(self, evaluated: EvaluatedModel, unit: Unit) -> Outcome:
        """Score the blocks of one batch of windows."""
        windows: Windows = unit.content
        base = comparable_base(evaluated, windows.ids.shape[1])
        divergence, same = compare_predictions(base.model, evaluated.model, windows.ids)
        items = []
        for block in cut_blocks(windows, start=0):
            at = (block.row, slice(block.start, block.stop))
            values = {"kl": float(divergence[at].sum()), "same": float(same[at].sum())}
            items.append(Item(block.id, {**values, "tokens": block.stop - block.start}))
        return Outcome(items)


def compare_predictions(
    base: PreTrainedModel, model: PreTrainedModel, input_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare two models' next-token distributions over the vocabulary that both have.

    Args:
        base: the model that the other is measured by, in eval mode.
        model: the other, in eval mode; its vocabulary may be padded to another size.
        input_ids: `[batch, T]`.

    Returns:
        KL(base || model) at each position, `[batch, T]` float64 in nats, and whether the most likely token is the
        same, `[batch, T]` bool; both on the CPU.
    """
    vocabulary = max(int(each.config.get_text_config().vocab_size) for each in (base, model))
    size = max(1, LOGITS_AT_ONCE // (TENSORS * vocabulary * input_ids.shape[0]))
    pairs = zip(
        logit_slices(base, input_ids.to(base.device), size=size),
        logit_slices(model, input_ids.to(model.device), size=size),
        strict=True,
    )
    divergences, same = [], []
    for base_logits, logits in pairs:
        shared = min(base_logits.shape[-1], logits.shape[-1])
        base_logits, logits = base_logits[..., :shared], logits[..., :shared].to(base_logits.device)
        teacher, student = base_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
        # Where the base rules a token out, its term is zero whatever the other model says.
        terms = torch.where(teacher.isneginf(), 0.0, teacher.exp() * (teacher - student))
        # Never below zero but for rounding.
        divergences.append(terms.sum(-1).clamp_min(0.0).cpu().double())
        same.append((base_logits.argmax(-1) == logits.argmax(-1)).cpu())
    return torch.cat(divergences, dim=1), torch.cat(same, dim=1)
