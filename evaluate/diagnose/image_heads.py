"""The heads of a vision model: how far each looks, and what the features lose when it looks at everything alike."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...convert.planning.probe import ProbedModule
from ...convert.surgery.attention_function import AttentionCall, attention_hook
from ..engine.progress import Progress
from .influence import levelled
from .measures import normalised

Rows = list[list[float | None]]


@torch.no_grad()
def image_measures(
    model: PreTrainedModel,
    modules: Sequence[ProbedModule],
    batches: Sequence[Tensor],
    progress: Progress | None = None,
) -> dict[str, Rows]:
    """What is lost without each KV head, and how far it looks, by layer and KV head.

    Args:
        model: a vision model whose layers are converted, by whatever method: what they were is what is measured.
        modules: its self-attention layers in order.
        batches: images as the model takes them, `[batch, channels, height, width]` each.
        progress: called with (heads done, heads in all, what is being done).

    Returns:
        `ablation`: mean squared change of the last hidden states over their mean square; `distance`: mean distance of a
        patch from what its head looks at, in patches, None where tokens are no patches.
    """
    lost: Rows = [[0.0] * module.geometry.num_kv_heads for module in modules]
    far: dict[str, list[Tensor]] = {module.name: [] for module in modules}
    done, total = 0, len(batches) * sum(map(len, lost))
    for pixels in batches:
        grid = patch_grid(model.config, pixels)

        def watch(call: AttentionCall, grid: tuple[int, int] | None = grid) -> Tensor:
            distance = None if grid is None else patch_distance(call.teacher_weights(), grid)
            if distance is not None and call.name in far:
                # Of the query heads that share a KV head the one that looks farthest decides.
                far[call.name].append(distance.unflatten(0, (call.value.shape[1], -1)).amax(1))
            return call.teacher()

        with attention_hook(model, watch):
            base = _features(model, pixels)
        for layer, module in enumerate(modules):
            for head, before in enumerate(lost[layer]):
                with attention_hook(model, lambda call, at=(module.name, head): _without(call, *at)):  # type: ignore[misc]
                    change = (_features(model, pixels) - base).square().mean() / base.square().mean()
                lost[layer][head] = (before or 0.0) + float(change) / len(batches)
                done += 1
                if progress is not None:
                    progress(done, total, "taking heads away")
    distances: Rows = [
        torch.stack(far[module.name]).mean(0).tolist() if far[module.name] else [None] * module.geometry.num_kv_heads
        for module in modules
    ]
    return {"ablation": lost, "distance": distances}


def _without(call: AttentionCall, name: str, head: int) -> Tensor:
    return levelled(call, (head,) if call.name == name else ())


def _features(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    inputs = pixels.to(model.device, model.dtype)
    features: Tensor = model.base_model(**{model.main_input_name: inputs}).last_hidden_state
    return features.float()


def patch_grid(config: Any, pixels: Tensor) -> tuple[int, int] | None:
    """Rows and columns of patches of an image; None if the configuration has no size of a patch."""
    size = getattr(config, "patch_size", None)
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, list | tuple) or len(size) != 2 or pixels.dim() != 4:
        return None
    return pixels.shape[2] // int(size[0]), pixels.shape[3] // int(size[1])


def patch_distance(weights: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """Mean distance between a patch and the patches that a head looks at, weighed by their attention.

    Args:
        weights: `[batch, heads, T, T]`; the last tokens are the patches, row by row, and others, such as that of the
            class, do not count.
        grid: rows and columns of patches.

    Returns:
        `[heads]`, in patches; None if there are fewer tokens than patches.
    """
    rows, columns = grid
    others = weights.shape[-1] - rows * columns
    if others < 0 or rows * columns == 0:
        return None
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(weights.device, torch.float32)
    gaps = torch.cdist(places, places)
    among = normalised(weights[..., others:, others:])
    return (among * gaps).sum(-1).mean((0, 2))
