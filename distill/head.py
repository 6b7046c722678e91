"""Losses on logits in pieces, so that the logits of a whole batch never exist at once."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from ..convert.surgery.head import ModelHead, slices
from ..errors import TrainingError
from .batches import Batch

# Logits held at once, in numbers: 2**23 of them are 32 MiB in fp32, and a loss needs about four times that.
LOGITS_AT_ONCE = 2**23


class TrainedHead(ModelHead):
    """The head of a model in training, through which gradients go back in pieces.

    Args:
        model: a causal language model (`...ForCausalLM`), possibly with adapters injected.
        stage: kind of the stage that needs it.

    Raises:
        TrainingError: the model has no such head, or does something else between its layers and its logits.
    """

    def __init__(self, model: PreTrainedModel, stage: str) -> None:
        super().__init__(model)
        if self.vocabulary is None:
            raise TrainingError(
                f"{type(model).__name__} has no language-model head, which the stage {stage} needs: take a stage "
                "attention_transfer or features in its place, as the recipe hedgehog-encoder does."
            )
        self.positions_at_once = max(1, LOGITS_AT_ONCE // self.vocabulary)
        if not self.takes_slices():
            raise TrainingError(f"The logits of {type(model).__name__} are more than its layers and its head.")

    def run(self, batch: Batch) -> torch.Tensor:
        """The last hidden states `[batch, T, hidden]`; the layers run once."""
        return self.hidden_states(**batch.inputs(self.model.dtype))

    def slices(self, batch: int, length: int) -> Iterator[slice]:
        """Cut `length` positions so that a slice of a batch of `batch` rows stays within the limit on logits."""
        return slices(length, max(1, self.positions_at_once // batch))

    def backward(
        self,
        hidden_states: torch.Tensor,
        loss: Callable[[torch.Tensor, slice], torch.Tensor],
        term: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run a loss on the logits of `[batch, T, hidden]` and its gradient back through head and layers.

        Args:
            hidden_states: what `run` returned, with its graph.
            loss: from the logits of some positions, and which they are, to what these add to the loss.
            term: what the layers themselves add to the loss, with its graph.

        Returns:
            the loss, detached.
        """
        leaf = hidden_states.detach().requires_grad_()
        total = torch.zeros((), device=leaf.device)
        for positions in self.slices(*hidden_states.shape[:2]):
            part = loss(self.logits(leaf[:, positions]), positions)
            part.backward()
            total = total + part.detach()
        if term is None:
            hidden_states.backward(leaf.grad)
            return total
        # The two share the graph of the layers.
        torch.autograd.backward([hidden_states, term], [leaf.grad, torch.ones_like(term)])
        return total + term.detach()


def run_layers(model: PreTrainedModel, batch: Batch) -> Any:
    """Run a model up to its last layer, without its head."""
    return model.base_model(**batch.inputs(model.dtype))
