"""Losses on logits in pieces, so that the logits of a whole batch never exist at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TrainingError
from ..evaluate.tasks.answering import answering
from .batches import Batch

# Logits held at once, in numbers: 2**23 of them are 32 MiB in fp32, and a loss needs about four times that.
LOGITS_AT_ONCE = 2**23


class ModelHead:
    """A causal language model taken in two steps: its layers, and its own head on slices of what they give.

    The head is the model's own `forward` with the layers' answer put in, so scaling, soft-capping and whatever else
    a model does to its logits stay as they are, with no knowledge of the model here.

    Args:
        model: A causal language model (`...ForCausalLM`), possibly with adapters injected.
        stage: Kind of the stage that needs it.

    Raises:
        TrainingError: The model has no such head, or does something else between its layers and its logits.
    """

    def __init__(self, model: PreTrainedModel, stage: str) -> None:
        self.model = model
        self.layers: nn.Module = model.base_model
        self._output: Any = None
        head = model.get_output_embeddings()
        if self.layers is model or head is None:
            raise TrainingError(
                f"{type(model).__name__} has no language-model head, which the stage {stage} needs: take a stage "
                "attention_transfer or features in its place, as the recipe hedgehog-encoder does."
            )
        self.positions_at_once = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        self._check()

    @torch.no_grad()
    def _check(self) -> None:
        """Compare the two steps with the whole on a few tokens."""
        sample = Batch(torch.arange(4, device=self.model.device)[None])
        with evaluating(self.model):
            whole = self.model(input_ids=sample.input_ids, use_cache=False).logits.float()
            pieces = self.logits(self.hidden_states(sample)[:, 1:]).float()
        if not torch.allclose(pieces, whole[:, 1:], rtol=0.02, atol=0.02 * float(whole.abs().max())):
            raise TrainingError(f"The logits of {type(self.model).__name__} are more than its layers and its head.")

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """The last hidden states `[batch, T, hidden]`; the layers run once."""
        self._output = run_layers(self.model, batch)
        hidden: torch.Tensor = self._output.last_hidden_state
        self._output.last_hidden_state = None
        return hidden

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the model's head makes of `[batch, positions, hidden]`: `[batch, positions, vocabulary]`."""
        self._output.last_hidden_state = hidden_states
        placeholder = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
        try:
            with answering(self.layers, self._output):
                logits: torch.Tensor = self.model(input_ids=placeholder, use_cache=False).logits
        finally:
            self._output.last_hidden_state = None
        return logits

    def slices(self, batch: int, length: int) -> Iterator[slice]:
        """Cut `length` positions so that a slice of a batch of `batch` rows stays within the limit on logits."""
        size = max(1, self.positions_at_once // batch)
        for start in range(0, length, size):
            yield slice(start, min(start + size, length))

    def backward(
        self, hidden_states: torch.Tensor, loss: Callable[[torch.Tensor, slice], torch.Tensor]
    ) -> torch.Tensor:
        """Run a loss on the logits of `[batch, T, hidden]` and its gradient back through head and layers.

        Args:
            hidden_states: What `hidden_states` returned, with its graph.
            loss: From the logits of some positions, and which they are, to what these add to the loss.

        Returns:
            The loss, detached.
        """
        leaf = hidden_states.detach().requires_grad_()
        total = torch.zeros((), device=leaf.device)
        for positions in self.slices(*hidden_states.shape[:2]):
            part = loss(self.logits(leaf[:, positions]), positions)
            part.backward()
            total = total + part.detach()
        hidden_states.backward(leaf.grad)
        return total


def run_layers(model: PreTrainedModel, batch: Batch) -> Any:
    """Run a model up to its last layer, without its head."""
    return model.base_model(**batch.inputs(model.dtype))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
