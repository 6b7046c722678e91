"""How much a text needs some heads of a model: what its loss becomes when they look at everything alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...convert.surgery.attention_function import AttentionCall, attention_hook
from ...errors import PlanError
from ..tasks.perplexity import token_losses
from .importance import RoleModel


@dataclass(frozen=True)
class Influence:
    """One text.

    Attributes:
        loss: of the model, nats per token.
        masked_loss: of the model without what the heads look at.
        tokens: tokens that were predicted.
    """

    loss: float
    masked_loss: float
    tokens: int

    @property
    def score(self) -> float:
        """By what share the loss rises without the heads."""
        return (self.masked_loss - self.loss) / max(self.loss, 1e-12)


@torch.inference_mode()
def influences(roles: RoleModel, heads: Mapping[int, Sequence[int]], texts: Sequence[Tensor]) -> list[Influence | None]:
    """The loss of some texts with and without some KV heads, which without are means over all tokens so far.

    Args:
        roles: the model.
        heads: KV heads by the number of the layer; the query heads that share one go with it.
        texts: `[tokens]` int64 each; they share a forward pass.

    Returns:
        for each text; None for one in which nothing is predicted.

    Raises:
        PlanError: the model does not predict one token after the other.

    Paper: https://arxiv.org/abs/2505.07293
    """
    if not all(module.geometry.causal for module in roles.modules):
        raise PlanError(f"{roles.source} sees both ways, so it has no loss of the next token to score texts by")
    longest = max((len(text) for text in texts), default=0)
    if longest < 2:
        return [None] * len(texts)
    # What is put behind a text changes nothing before it.
    ids = torch.stack([torch.nn.functional.pad(text, (0, longest - len(text))) for text in texts])
    ids = ids.to(roles.model.device)
    named = {roles.modules[layer].name: numbers for layer, numbers in heads.items()}
    with attention_hook(roles.model, AttentionCall.teacher):
        whole = token_losses(roles.model, ids)
    with attention_hook(roles.model, lambda call: levelled(call, named.get(call.name, ()))):
        masked = token_losses(roles.model, ids)
    found: list[Influence | None] = []
    for row, text in enumerate(texts):
        count = len(text) - 1
        losses = [float(losses[row, :count].mean()) for losses in (whole, masked)] if count > 0 else []
        found.append(Influence(losses[0], losses[1], count) if losses else None)
    return found


def levelled(call: AttentionCall, groups: Sequence[int]) -> Tensor:
    """What the model's attention gives, and of some KV heads the mean of all values that a query may see.

    Args:
        call: of a converted module.
        groups: numbers of the KV heads; the query heads that share one go with it.

    Returns:
        `[batch, num_heads, T, value_dim]`.
    """
    out = call.teacher()
    if not groups:
        return out
    size = out.shape[1] // call.value.shape[1]
    chosen = torch.tensor(list(groups), device=out.device)
    values = call.value[:, chosen].float()
    if call.core.geometry.causal:
        seen = torch.arange(1, out.shape[2] + 1, device=out.device, dtype=torch.float32)
        means = values.cumsum(2) / seen[:, None]
    else:
        means = values.mean(2, keepdim=True).expand_as(values)
    grouped = out.unflatten(1, (-1, size)).clone()
    grouped[:, chosen] = means[:, :, None].to(out.dtype)
    changed: Tensor = grouped.flatten(1, 2)
    return changed
