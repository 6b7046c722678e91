"""Routers that know their experts' subjects: the mean of what the gate sees on texts of each."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from ...errors import PlanError
from ..reading.checkpoint import Checkpoint, load_model, load_tokenizer

MAX_TOKENS = 1024
"""Tokens of one text that go through the model at once."""


class Centroids:
    """What the feed-forwards of a model are given on the texts of each subject, on average.

    The model is loaded when the first mean is asked for, and only then.

    Args:
        checkpoint: the dense model.
        texts: for each subject its texts.
        tokens: of each subject at most.
    """

    def __init__(self, checkpoint: Checkpoint, texts: Sequence[Sequence[str]], *, tokens: int) -> None:
        self.checkpoint = checkpoint
        self.texts = texts
        self.tokens = tokens

    def rows(self, layer: str) -> Tensor:
        """What a router multiplies its input by, `[subjects, hidden]`; the longest row has the length 1.

        An input goes to the subjects whose means have a direction like its own. What all rows have in common says
        nothing, and is left out.

        Args:
            layer: the layer's name, such as `model.layers.0`.
        """
        directions = nn.functional.normalize(self._means[layer], dim=-1)
        apart: Tensor = directions - directions.mean(0)
        longest = apart.norm(dim=-1).max()
        return apart / longest if float(longest) > 0 else apart

    @cached_property
    def _means(self) -> dict[str, Tensor]:
        tokenizer = load_tokenizer(self.checkpoint)
        if tokenizer is None:
            raise PlanError(f"{self.checkpoint.source} has no tokenizer to read the experts' texts with")
        model = load_model(self.checkpoint, dtype=self.checkpoint.dtype)
        sums: dict[str, Tensor] = {}

        counts = torch.zeros(len(self.texts), 1)
        layers = [name.removesuffix(".mlp") for name, _ in model.named_modules() if name.endswith(".mlp")]
        for subject, texts in enumerate(self.texts):
            hooks = [
                model.get_submodule(f"{layer}.mlp").register_forward_pre_hook(
                    _Hook(sums, layer, subject, len(self.texts))
                )
                for layer in layers
            ]
            left = self.tokens
            for text in texts:
                ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : min(left, MAX_TOKENS)]
                if ids.shape[1]:
                    with torch.no_grad():
                        model.base_model(ids, use_cache=False)
                    counts[subject] += ids.shape[1]
                    left -= ids.shape[1]
            for hook in hooks:
                hook.remove()
        if not bool(counts.all()):
            raise PlanError(f"there is no text for expert {int((counts == 0).nonzero()[0, 0])}: give each some")
        return {layer: total / counts for layer, total in sums.items()}


class _Hook:
    """Adds up what a feed-forward is given."""

    def __init__(self, sums: dict[str, Tensor], layer: str, subject: int, subjects: int) -> None:
        self.sums, self.layer, self.subject, self.subjects = sums, layer, subject, subjects

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden = inputs[0].detach().float().flatten(0, -2)
        if self.layer not in self.sums:
            self.sums[self.layer] = torch.zeros(self.subjects, hidden.shape[-1])
        self.sums[self.layer][self.subject] += hidden.sum(0)
