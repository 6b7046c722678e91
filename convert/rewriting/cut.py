"""A checkpoint cut to a few layers and the first words of its vocabulary, by names and settings alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .plan import RewritePlan, State, layer_of
from .tensors import Target, rows

# Settings by which a layer's place decides what it is: how many layers come first, and which ones are meant.
FIRST_LAYERS = ("max_window_layers", "first_k_dense_replace", "moe_layer_start_index")
LAST_LAYER = "moe_layer_end_index"
LISTED_LAYERS = ("mlp_only_layers",)
WINDOWS = ("sliding_window", "attention_chunk_size")
# Types of layers that a choice of them should hold at most.
TYPES = 3


@dataclass(frozen=True)
class Cut:
    """What is left of a model.

    Attributes:
        layers: places of the layers that stay, in ascending order.
        words: words of the vocabulary that stay, where it has more.
        window: the longest window.
    """

    layers: tuple[int, ...]
    words: int
    window: int


def choose_layers(plan: RewritePlan) -> tuple[int, ...]:
    """Two layers that a rewrite changes, the first and the last, and one of each further type that the model has."""
    before, after = plan.states[0], plan.states[-1]
    count = before.num_layers or 0
    types: dict[tuple[object, ...], list[int]] = {}
    tails: dict[int, set[str]] = {number: set() for number in range(count)}
    changed = set()
    for state in (before, after):
        for name, tensor in state.tensors.items():
            number, tail = layer_of(name) or (None, "")
            if number in tails:
                tails[number].add(tail)
                if state is after and before.tensors.get(name) != tensor:
                    changed.add(number)
    for number in range(count):
        settings = [_of_layer(state.config, count, number) for state in (before, after)]
        types.setdefault((*sorted(tails[number]), *settings), []).append(number)
    touched = sorted(changed) or list(range(count))
    chosen = {touched[0], touched[-1]} if touched else set()
    chosen |= {numbers[0] for numbers in list(types.values())[:TYPES] if not chosen.intersection(numbers)}
    return tuple(sorted(chosen))


def _of_layer(config: Mapping[str, Any], count: int, number: int) -> str:
    """What the lists of a configuration, one item a layer, say of a layer, and where it stands in those of layers."""
    found = {key: value[number] for key, value in config.items() if isinstance(value, list) and len(value) == count}
    found |= {key: number in config[key] for key in LISTED_LAYERS if isinstance(config.get(key), list)}
    return str(sorted(found.items()))


def cut_config(state: State, cut: Cut) -> dict[str, Any]:
    """The config.json of a cut model."""
    count, words = state.num_layers, state.num_words or 0
    kept: dict[str, Any] = {}
    for key, value in state.config.items():
        if key.endswith("_token_id"):
            value = None
        elif key in LISTED_LAYERS and isinstance(value, list):
            value = [cut.layers.index(number) for number in value if number in cut.layers]
        elif isinstance(value, list) and len(value) == count:
            value = [value[number] for number in cut.layers]
        elif key in FIRST_LAYERS and isinstance(value, int):
            value = sum(number < value for number in cut.layers)
        elif key == LAST_LAYER and isinstance(value, int) and value >= 0:
            value = sum(number <= value for number in cut.layers) - 1
        elif key in WINDOWS and isinstance(value, int):
            value = min(value, cut.window)
        kept[key] = value
    kept[state.key("num_hidden_layers")] = len(cut.layers)
    kept[state.key("vocab_size")] = min(words, cut.words)
    return kept


def cut_tensors(state: State, cut: Cut) -> Iterator[Target]:
    """The tensors of a cut model."""
    words = state.num_words or 0
    for name, tensor in state.tensors.items():
        found = layer_of(name)
        if found is None:
            cuts = words > cut.words and bool(tensor.shape) and tensor.shape[0] == words
            yield rows(tensor, 0, cut.words) if cuts else tensor
        elif found[0] in cut.layers:
            place = f".{found[0]}.{found[1]}"
            yield replace(tensor, name=f"{name.removesuffix(place)}.{cut.layers.index(found[0])}.{found[1]}")
