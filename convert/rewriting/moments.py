"""What rewrites want to know of a model's hidden states before they decide: moments, from one pass over a text."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerMoments:
    """Means over tokens of one attention layer.

    Attributes:
        second: `[hidden, hidden]` float64, of x xᵀ for its inputs x, behind the norm before it.
        mean: `[hidden]` float64, of x.
        contributions: `[heads]` float64, of the length of what each head adds to the hidden states.
        first: `[heads]` float64, share of the tokens to which it adds more than every other head.
    """

    second: Tensor
    mean: Tensor
    contributions: Tensor
    first: Tensor

    @property
    def with_one(self) -> Tensor:
        """`[hidden + 1, hidden + 1]`: the second moment of inputs that have a 1 behind them, as biases see them."""
        mean = self.mean[:, None]
        return torch.cat([torch.cat([self.second, mean], 1), torch.cat([mean, torch.ones_like(mean[:1])]).T])


Moments = Mapping[int, LayerMoments]
"""By the layer's index."""


class MomentSums:
    """The sums of one layer, to which tokens are added as they come.

    Args:
        output: `[hidden, heads * head_dim]`, the weight of the output projection.
        heads: query heads.
    """

    def __init__(self, output: Tensor, heads: int) -> None:
        split = output.detach().double().view(output.shape[0], heads, -1)
        # Lengths of W o, without W: o has a head's numbers, and W o as many as a hidden state.
        self.gram = torch.einsum("dha,dhb->hab", split, split)
        hidden = output.shape[0]
        self.second = torch.zeros(hidden, hidden, dtype=torch.float64, device=output.device)
        self.mean = torch.zeros(hidden, dtype=torch.float64, device=output.device)
        self.lengths = torch.zeros(heads, dtype=torch.float64, device=output.device)
        self.first = torch.zeros(heads, dtype=torch.float64, device=output.device)
        self.tokens = 0

    def add_inputs(self, inputs: Tensor) -> None:
        """Take the inputs of tokens, `[..., hidden]`."""
        flat = inputs.detach().flatten(0, -2).double()
        self.second += flat.T @ flat
        self.mean += flat.sum(0)
        self.tokens += flat.shape[0]

    def add_outputs(self, outputs: Tensor) -> None:
        """Take what the heads put out for tokens, `[..., heads * head_dim]`."""
        flat = outputs.detach().flatten(0, -2).double().view(-1, len(self.gram), self.gram.shape[-1])
        lengths = torch.einsum("tha,hab,thb->th", flat, self.gram, flat).clamp_min(0).sqrt()
        self.lengths += lengths.sum(0)
        self.first += torch.bincount(lengths.argmax(-1), minlength=len(self.first))

    def means(self) -> LayerMoments:
        """The means over all tokens so far, on the CPU."""
        sums = (self.second, self.mean, self.lengths, self.first)
        return LayerMoments(*((total / self.tokens).cpu() for total in sums))
