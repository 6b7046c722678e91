"""A causal language model taken in two steps, its layers and its head, so that logits need never exist all at once."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class ModelHead:
    """The head of a model, on whatever slices of what its layers give.

    The head is the model's own `forward` with the layers' answer put in, so scaling, soft-capping and whatever else
    a model does to its logits stay as they are, with no knowledge of the model here.

    Args:
        model: a causal language model (`...ForCausalLM`), possibly with adapters injected
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers: nn.Module = model.base_model
        self._output: Any = None

    @property
    def vocabulary(self) -> int | None:
        """Logits of one position; None without a head of its own."""
        head = self.model.get_output_embeddings()
        weight = None if self.layers is self.model else getattr(head, "weight", None)
        return None if weight is None else int(weight.shape[0])

    def hidden_states(self, **inputs: Any) -> torch.Tensor:
        """The last hidden states `[batch, T, hidden]` of what the model takes; the layers run once."""
        self._output = self.layers(**inputs)
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

    @torch.no_grad()
    def takes_slices(self) -> bool:
        """Whether slices give what the whole model gives, tried on a few tokens in eval mode."""
        if self.vocabulary is None:
            return False
        sample = torch.arange(4, device=self.model.device)[None]
        with evaluating(self.model):
            whole = self.model(input_ids=sample, use_cache=False).logits.float()
            try:
                hidden = self.hidden_states(input_ids=sample, use_cache=False)
                sliced = torch.cat([self.logits(hidden[:, part]) for part in slices(4, 3)], dim=1).float()
            # A model whose head wants more than the last hidden states can fail in any way.
            except Exception:
                logger.debug("the head of %s takes no slices", type(self.model).__name__, exc_info=True)
                return False
        scale = whole.nan_to_num().abs().max().item()
        if sliced.shape != whole.shape:
            return False
        return torch.allclose(sliced, whole, rtol=0.02, atol=0.02 * scale, equal_nan=True)


def slices(length: int, size: int) -> Iterator[slice]:
    """Cut `length` positions into pieces of `size`, the last of which may be shorter."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


@contextmanager
def answering(module: nn.Module, output: object) -> Iterator[None]:
    """Within the context the module answers every call with `output`, untouched by its hooks' arguments."""
    own = module.__dict__.get("forward")

    def answer(*_: Any, **__: Any) -> object:
        return output

    module.forward = answer
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in eval mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
