"""Tiny configs of (nearly) every model type that transformers knows, made by looking at the config class's fields."""

import dataclasses
from typing import Any

import tiny_sizes as sizes
from transformers import CONFIG_MAPPING, PreTrainedConfig


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """Return a tiny config of `model_type`; raises whatever the config class raises where there can be none."""
    return shrunk(CONFIG_MAPPING[model_type](), **overrides)


def shrunk(config: PreTrainedConfig, **overrides: Any) -> PreTrainedConfig:
    """Return a small config of the class of `config`, its sub-configs small too."""
    return type(config)(**_fields(config) | sizes.OVERRIDES.get(type(config).__name__, {}) | overrides)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    values = _stored(config)
    depth = next((values[name] for name in sizes.NUM_LAYERS if isinstance(values.get(name), int)), None)
    # One layer of each kind, and never fewer than two; layers that reuse the keys and values of others come on top.
    num_layers = max([2, *(len(_kinds(value)) for value in values.values() if _is_per_layer(value, depth))])
    num_shared = num_layers if values.get("num_kv_shared_layers") else 0
    special_ids = iter(range(sizes.VOCAB - 1, 0, -1))
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = shrunk(value)
        elif _is_per_layer(value, depth):
            kinds = [_size(name, kind) for kind in _kinds(value)]
            fields[name] = [kinds[index % len(kinds)] for index in range(num_layers + num_shared)]
        elif name == "num_kv_shared_layers":
            fields[name] = num_shared
        elif sizes.LAYERS.match(name) and isinstance(value, int):
            fields[name] = min(value, num_layers + num_shared)
        elif sizes.TOKEN_ID.search(name) and _is_int(value) and value >= 100:
            fields[name] = next(special_ids)
        elif (size := _size(name, value)) != value:
            fields[name] = size
    names = {field.name for field in dataclasses.fields(config)}
    fields |= {name: sizes.SIZES[name] for name in sizes.OPTIONAL if name in names}
    fields |= {name: value for name, value in sizes.TOKEN_IDS.items() if name in names}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = sizes.SIZES["num_attention_heads"]
    return fields


def _stored(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields that are set, read from the instance's dictionary: some may differ from layer to layer."""
    stored = vars(config)
    names = [field.name for field in dataclasses.fields(config) if field.init]
    values = {name: stored.get(config.attribute_map.get(name, name), stored.get(name)) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _size(name: str, value: Any) -> Any:
    if _is_int(value) and name in sizes.SIZES:
        return sizes.SIZES[name]
    if sizes.HEADS.search(name):
        return min(value, 4) if _is_int(value) else type(value)([2] * len(value))
    return _capped(value) if sizes.WIDTH.search(name) else value


def _capped(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_capped(entry) for entry in value])
    return sizes.HIDDEN if _is_int(value) and value > sizes.CAP else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_per_layer(value: Any, depth: int | None) -> bool:
    return isinstance(value, list | tuple) and depth is not None and len(value) == depth > 1


def _kinds(values: list[Any]) -> list[Any]:
    """Return the different entries of a per-layer list in the order in which they appear; of numbers, two at most."""
    kinds: list[Any] = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    return kinds if isinstance(kinds[0], str) else kinds[:2]
