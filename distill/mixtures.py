"""Mixtures of experts while they are trained: their routers, what keeps those balanced, and where tokens went."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mixtral import modeling_mixtral

from ..errors import TrainingError

LOGITS = "router_logits"


def routers_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The routers of a model's experts by name, as transformers itself finds them; none in a dense model."""
    kinds = _router_classes(model)
    return {name: module for name, module in model.named_modules() if type(module) in kinds}


def router_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The weights of these routers by name."""
    found = {router: _weight(module) for router, module in routers_of(model).items()}
    return {f"{router}.{name}": weight for router, (name, weight) in found.items()}


class RouterWatch:
    """What the routers of a mixture say in a training pass: the terms that it adds to the loss, and each expert's load.

    The balance loss is that of transformers over all layers together, padding left out. The z loss is the mean square
    of the logarithm of what the softmax is divided by (https://arxiv.org/abs/2202.08906). Both read what the pass has
    computed, so nothing runs twice.

    Args:
        model: the model.
        balance: weight of the balance loss.
        z: weight of the z loss.
    """

    def __init__(self, model: PreTrainedModel, *, balance: float = 0.0, z: float = 0.0) -> None:
        self.balance = balance
        self.z = z
        self.routers = routers_of(model)
        module = sys.modules.get(type(model).__module__)
        self._balance_loss: Any = getattr(module, "load_balancing_loss_func", modeling_mixtral.load_balancing_loss_func)
        self._places = _router_classes(model)
        self._logits: dict[str, Tensor] = {}
        self._chosen: dict[str, Tensor] = {}

    def refuse_ties(self, stage: str) -> None:
        """Refuse to train routers that cannot tell tokens apart.

        Args:
            stage: kind of the stage.

        Raises:
            TrainingError: all rows of one are equal, so that all tokens go to the same experts and stay there.
        """
        for name, router in self.routers.items():
            weight = _weight(router)[1]
            if _active(router) < len(weight) and bool((weight == weight[0]).all()):
                raise TrainingError(
                    f"The stage {stage} cannot start from {name}: all its rows are equal, so every token goes through "
                    "the same experts for ever; upcycle with router: random, prompts or centroids"
                )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context one pass of the model is watched."""
        self._logits, self._chosen = {}, {}
        with ExitStack() as hooks:
            for name, router in self.routers.items():
                hooks.enter_context(router.register_forward_hook(self._hook(name)))
            yield

    def _hook(self, name: str) -> Any:
        def note(router: nn.Module, _inputs: object, outputs: Any) -> None:
            logits = outputs[self._places[type(router)]]
            logits = logits.reshape(-1, logits.shape[-1])
            whole = [item for item in outputs if isinstance(item, Tensor) and not item.is_floating_point()]
            shape = len(logits), _active(router)
            chosen = next((item for item in whole if tuple(item.shape) == shape), None)
            self._logits[name] = logits
            self._chosen[name] = logits.detach().topk(shape[1], -1).indices if chosen is None else chosen

        return note

    def term(self, valid: Tensor | None) -> Tensor | None:
        """What the pass adds to the loss, with its graph; None if nothing.

        Args:
            valid: `[batch, T]` bool, True = real token; None means all.
        """
        if not self._logits or not (self.balance or self.z):
            return None
        logits = tuple(self._logits.values())
        total = logits[0].new_zeros((), dtype=torch.float32)
        if self.balance:
            active = self._chosen[next(iter(self._chosen))].shape[-1]
            mask = None if valid is None else valid.long()
            total = total + self.balance * self._balance_loss(logits, logits[0].shape[-1], active, mask)
        if self.z:
            keep = slice(None) if valid is None else valid.flatten()
            squares = [layer.float().logsumexp(-1)[keep].square().mean() for layer in logits]
            total = total + self.z * torch.stack(squares).mean()
        return total

    def loads(self, valid: Tensor | None) -> dict[str, Tensor]:
        """How many tokens of the pass went to each expert, `[experts]` by router.

        Args:
            valid: `[batch, T]` bool, True = real token; None means all.
        """
        keep = slice(None) if valid is None else valid.flatten()
        return {
            name: torch.bincount(chosen[keep].flatten(), minlength=self._logits[name].shape[-1]).float()
            for name, chosen in self._chosen.items()
        }


def _router_classes(model: nn.Module) -> dict[type[nn.Module], int]:
    """The classes of a model's routers, and the place of the logits among what they return."""
    kinds: dict[Any, int] = {}
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            found = (getattr(part, "_can_record_outputs", None) or {}).get(LOGITS)
            recorders = found if isinstance(found, list | tuple) else [] if found is None else [found]
            for item in recorders:
                kinds[getattr(item, "target_class", item)] = getattr(item, "index", 0)
    return kinds


def _weight(router: nn.Module) -> tuple[str, nn.Parameter]:
    """The matrix of a router, `[experts, hidden]`, and its name in the router; corrections of scores are none."""
    return next(item for item in router.named_parameters() if item[0].rpartition(".")[2] == "weight")


def _active(router: nn.Module) -> int:
    return int(getattr(router, "top_k"))  # noqa: B009
