"""Running tokens through a model with its attention watched, a layer's weights at a time."""

import inspect
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ...convert.surgery.recording import Watcher, watching


@torch.no_grad()
def watch_tokens(model: PreTrainedModel, input_ids: Tensor, watcher: Watcher, names: Collection[str]) -> None:
    """Run a model's layers, without its head, and show the attention calls of some of them.

    Args:
        model: a model that takes token ids, in eval mode, converted or not.
        input_ids: `[batch, T]`.
        watcher: called with each call in turn; what it does not keep is gone before the next layer runs.
        names: modules of `attention_layers`.
    """
    layers = model.base_model
    takes_cache = "use_cache" in inspect.signature(layers.forward).parameters
    with watching(model, watcher, names):
        layers(input_ids=input_ids.to(model.device), **({"use_cache": False} if takes_cache else {}))


def shrink_map(weights: Tensor, size: int) -> Tensor:
    """A map small enough to draw: the largest weight in each cell of a `[size, size]` grid.

    The largest and not the mean, so that a single key that gets everything stays visible.

    Args:
        weights: `[..., T, T]`.
        size: rows and columns at most; a smaller map stays as it is.
    """
    if weights.shape[-1] <= size:
        return weights
    flat = weights.reshape(1, -1, *weights.shape[-2:])
    return F.adaptive_max_pool2d(flat, size).reshape(*weights.shape[:-2], size, size)
