"""Two models of the same shape on the same tokens, each by itself: how far apart their attention is, layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...attention_modules.weights import Statistic, density
from ...convert.surgery.recording import AttentionLayer, WatchedCall, attention_layers
from .maps import shrink_map, watch_tokens
from .measures import normalised

# The least that a weight counts as: without it a key that one model cannot see at all would make the divergence
# infinite. A hidden key that the base gave all its attention costs 13.8 nats.
EPSILON = 1e-6
# Numbers of attention weights of the base that are kept until the other model has run: 2**27 of them are 512 MiB.
WEIGHTS_AT_ONCE = 2**27


@dataclass(frozen=True)
class LayerComparison:
    """One layer of both models on one text.

    Attributes:
        layer: the layer.
        kl: `[heads]`, KL(base || model) of the attention weights in nats, mean over queries.
        error: sum of the squared differences of the attention outputs, before the output projection.
        power: sum of the base's squared outputs.
        base_map: `[heads, size, size]`, the base's weights, shrunk if larger.
        model_map: the same of the model; where a method's weights are no distribution, each one's share of all sizes.
        statistics: what the model's method tells about itself, `density` for any.
    """

    layer: AttentionLayer
    kl: Tensor
    error: float
    power: float
    base_map: Tensor
    model_map: Tensor
    statistics: tuple[Statistic, ...]


def attention_divergence(base: Tensor, model: Tensor) -> Tensor:
    """KL(base || model) of attention weights in nats, mean over queries, in fp32 or better.

    Each row counts by its proportions, whatever it adds up to: learned sinks, which take mass away from all keys alike,
    do not show. Both logarithms are of weights of at least `EPSILON`, so that equal weights give zero.

    Args:
        base: `[..., T, S]`.
        model: the same shape.

    Returns:
        `[...]`.
    """
    teacher, student = normalised(base), normalised(model)
    terms = teacher * (teacher.clamp_min(EPSILON).log() - student.clamp_min(EPSILON).log())
    # What rounding and the least weight may leave below zero.
    return terms.sum(-1).mean(-1).clamp_min(0.0)


def comparable_layers(
    base: PreTrainedModel, model: PreTrainedModel
) -> tuple[tuple[AttentionLayer, ...], dict[str, str]]:
    """The layers that both models have in the same shape, and the others with the reason.

    Raises:
        PlanError: a model's attention cannot be found.
    """
    ours, theirs = ({layer.name: layer for layer in attention_layers(each)} for each in (model, base))
    skipped: dict[str, str] = {}
    for name in {**theirs, **ours}:
        if name not in ours or name not in theirs:
            skipped[name] = f"only the {'base' if name in theirs else 'model'} has it"
            continue
        refused = ours[name].refused or theirs[name].refused
        shapes = [_shape(layers[name]) for layers in (ours, theirs)]
        if refused is not None:
            skipped[name] = refused
        elif shapes[0] != shapes[1]:
            skipped[name] = f"it has {shapes[0]}, but {shapes[1]} in the base"
    return tuple(layer for layer in ours.values() if layer.name not in skipped), skipped


def _shape(layer: AttentionLayer) -> str:
    geometry = layer.module.geometry
    return f"{geometry.num_heads} heads of {geometry.value_dim} values"


@torch.no_grad()
def compare_layers(
    base: PreTrainedModel,
    model: PreTrainedModel,
    input_ids: Tensor,
    layers: Sequence[AttentionLayer],
    *,
    map_size: int = 48,
) -> Iterator[LayerComparison]:
    """Run both models on the same tokens, each with its own hidden states, and compare layer by layer.

    Args:
        base: what the other is measured by, in eval mode.
        model: the other, in eval mode.
        input_ids: `[1, T]`.
        layers: what `comparable_layers` found.
        map_size: rows and columns of the maps at most.
    """
    size = max((layer.module.geometry.num_heads for layer in layers), default=1) * input_ids.shape[1] ** 2
    at_once = max(1, WEIGHTS_AT_ONCE // size)
    for start in range(0, len(layers), at_once):
        group = {layer.name: layer for layer in layers[start : start + at_once]}
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        found: dict[str, LayerComparison] = {}
        compare = partial(_add_comparison, found, group, kept, map_size)
        watch_tokens(base, input_ids, partial(_keep, kept), group)
        watch_tokens(model, input_ids, compare, kept.keys() & group.keys())
        yield from (found[name] for name in group if name in found)


def _keep(kept: dict[str, tuple[Tensor, Tensor]], call: WatchedCall) -> None:
    kept[call.name] = call.weights()[0], call.output[0]


def _add_comparison(
    found: dict[str, LayerComparison],
    group: Mapping[str, AttentionLayer],
    kept: dict[str, tuple[Tensor, Tensor]],
    map_size: int,
    call: WatchedCall,
) -> None:
    found[call.name] = _compare(group[call.name], call, *kept.pop(call.name), map_size)


def _compare(
    layer: AttentionLayer, call: WatchedCall, base_weights: Tensor, base_output: Tensor, map_size: int
) -> LayerComparison:
    causal, weights = layer.module.geometry.causal, call.weights()
    own = weights[0].to(base_weights.device)
    if call.core is not None and not call.core.is_normalized:
        # Of either sign and any size: what a key counts among the others is its part of all sizes.
        own = normalised(own.abs())
    teacher, student = base_output.double(), call.output[0].to(base_output.device).double()
    maps = [shrink_map(each.float(), map_size).cpu() for each in (base_weights, own)]
    return LayerComparison(
        layer=layer,
        kl=attention_divergence(base_weights, own).double().cpu(),
        error=float((student - teacher).square().sum()),
        power=float(teacher.square().sum()),
        # Neighbouring cells of a shrunk map overlap.
        base_map=maps[0].tril() if causal else maps[0],
        model_map=maps[1].tril() if causal else maps[1],
        statistics=(density(weights, causal=causal), *call.statistics().values()),
    )
