"""Grouped attention and feed-forwards made experts of both, in the class JetMoe."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ...errors import PlanError
from ..reading.weight_files import FLOAT_TYPES
from .fitting import is_mixture, with_defaults
from .starts import random_rows
from .steps import Step
from .tensors import Target, joined, made, rows

OF_LAYERS = re.compile(r"(model\.layers\.\d+)\.(self_attn|mlp)\.(.+)")
MATRICES = {
    "self_attn": tuple(f"{name}_proj.weight" for name in "qkvo"),
    "mlp": tuple(f"{name}_proj.weight" for name in ("gate", "up", "down")),
}
KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"),
    *("max_position_embeddings", "initializer_range", "attention_dropout", "rope_parameters", "use_cache", "dtype"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


# What transformers' class adds in the norms of its layers.
EPSILON = 1e-6


class JetMoe(Step):
    """Make a Llama with grouped queries a mixture of attention experts and of feed-forwards.

    An expert of attention has one query head for each key/value head, all of which share keys and values; as many are
    active as there are queries in a group. Those of one copy have the same row in the router, and their outputs, which
    the class takes the mean of, are that many times as large. Feed-forwards are copied into as many experts.

    For a token whose embedding is zero, as one for padding may have, all scores of a router tie, and copies are mixed.

    Args:
        num_experts: experts of each layer, a multiple of `active`.
        active: how many of them a token goes through: the queries of a group.
        seed: what the routers are drawn from.
    """

    def __init__(self, *, num_experts: int, active: int, seed: int = 0) -> None:
        self.num_experts = num_experts
        self.active = active
        self.seed = seed
        self._dense: Mapping[str, Any] = {}
        self._rounded: str | None = None

    @property
    def summary(self) -> str:
        return (
            f"query heads and feed-forwards made {self.num_experts} experts of which a token goes through {self.active}"
        )

    @property
    def inexact(self) -> str | None:
        return self._rounded

    def check(self, config: Mapping[str, Any]) -> None:
        kind = config.get("model_type")
        if kind != "llama" or is_mixture(config):
            raise PlanError(
                f"experts cannot make {kind} models jetmoe, whose attention is that of a llama: leave target out"
            )
        dense = self._dense = with_defaults(config)
        reasons = {
            f"with the activation {dense['hidden_act']!r}, only with 'silu'": dense["hidden_act"] != "silu",
            "with biases (mlp_bias)": dense["mlp_bias"],
            "beside attention with biases (attention_bias), which jetmoe has no place for": dense["attention_bias"],
            f"beside norms that add {dense['rms_norm_eps']:g}, where the layers of a jetmoe add {EPSILON:g} whatever "
            "its configuration says": dense["rms_norm_eps"] != EPSILON,
            "of quantised weights: rewrite the model that they were made from": config.get("quantization_config"),
            "of a model that brings its own Python code": config.get("auto_map"),
        }
        for reason, given in reasons.items():
            if given:
                raise PlanError(f"experts cannot be made of feed-forwards {reason}")
        group = dense["num_attention_heads"] // dense["num_key_value_heads"]
        if self.active != group:
            raise PlanError(
                f"experts of a jetmoe are the {group} query heads of each key/value head, and all of a copy must be "
                f"active: give active: {group}"
            )
        if self.num_experts % group:
            raise PlanError(f"experts of a jetmoe are copies of {group}: give num_experts a multiple of {group}")

    def claims(self, tensor: Target) -> bool:
        return OF_LAYERS.fullmatch(tensor.name) is not None

    def rewrite(self, claimed: Mapping[str, Target]) -> Iterable[Target]:
        layers: dict[str, dict[str, Target]] = {}
        for name, tensor in claimed.items():
            found = OF_LAYERS.fullmatch(name)
            if found is None:
                continue
            layer, part, matrix = found.groups()
            if matrix not in MATRICES[part]:
                raise PlanError(f"experts cannot take the tensor {name!r} over: a jetmoe model has no place for it")
            if tensor.dtype not in FLOAT_TYPES:
                raise PlanError(
                    f"experts cannot read {name!r}, which has the type {tensor.dtype}: dequantise the model first, "
                    "with the tool that quantised it"
                )
            layers.setdefault(layer, {})[matrix] = tensor
        wanted = [matrix for matrices in MATRICES.values() for matrix in matrices]
        count = self._dense["num_hidden_layers"]
        whole = [layer for layer, found in layers.items() if all(matrix in found for matrix in wanted)]
        if len(whole) != count or len(layers) != count:
            raise PlanError(f"experts found {len(whole)} whole layers of {count}: the model's files are not complete")
        for layer, matrices in layers.items():
            query, key, value, output, gate, up, down = (matrices[matrix] for matrix in wanted)
            yield from self._attention(f"{layer}.self_attention", query, key, value, output)
            yield from self._feed_forward(f"{layer}.mlp", gate, up, down)

    def _attention(self, name: str, query: Target, key: Target, value: Target, output: Target) -> Iterator[Target]:
        dense, group, dtype = self._dense, self.active, FLOAT_TYPES[output.dtype]
        kv_heads, hidden = dense["num_key_value_heads"], dense["hidden_size"]
        size = query.shape[0] // dense["num_attention_heads"]
        shape = (self.num_experts, kv_heads * size, hidden)
        turns = [expert % group for expert in range(self.num_experts)]
        places = [(head * group + turn) * size for turn in turns for head in range(kv_heads)]
        heads = [rows(query, place, place + size) for place in places]
        yield joined(f"{name}.experts.input_linear.weight", shape, heads)
        if group.bit_count() > 1 and dtype.itemsize < 4:
            self._rounded = f"{group} times the output projections rounded to {str(dtype).removeprefix('torch.')}"

        def outputs(whole: Tensor) -> Tensor:
            split = whole.view(hidden, kv_heads, group, size).permute(2, 0, 1, 3).reshape(group, hidden, -1) * group
            return split.repeat(self.num_experts // group, 1, 1)

        shape = (self.num_experts, hidden, kv_heads * size)
        yield made(f"{name}.experts.output_linear.weight", shape, dtype, (output,), outputs)
        yield joined(f"{name}.kv_proj.weight", (2 * kv_heads * size, hidden), [key, value])
        yield from self._bias_and_router(f"{name}.experts", hidden, dtype)

    def _feed_forward(self, name: str, gate: Target, up: Target, down: Target) -> Iterator[Target]:
        (width, hidden), count = gate.shape, self.num_experts
        yield joined(f"{name}.input_linear.weight", (count, 2 * width, hidden), [gate, up] * count)
        yield joined(f"{name}.output_linear.weight", (count, hidden, width), [down] * count)
        yield from self._bias_and_router(name, hidden, FLOAT_TYPES[down.dtype])

    def _bias_and_router(self, name: str, hidden: int, dtype: torch.dtype) -> Iterator[Target]:
        shape, deviation = (self.num_experts, hidden), self._dense["initializer_range"]
        router = f"{name}.router.layer.weight"
        yield made(f"{name}.bias", (hidden,), dtype, (), lambda: torch.zeros(hidden, dtype=dtype))

        def weights() -> Tensor:
            return random_rows(shape, self.active, deviation=deviation, seed=self.seed, name=router).to(dtype)

        yield made(router, shape, dtype, (), weights)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the dense model's settings were, under the names that this class has for them."""
        dense = with_defaults(config)
        general = PreTrainedConfig().to_dict().keys() & config.keys() - {"_name_or_path", "architectures", "model_type"}
        kept = {key: dense[key] for key in (*KEPT, *sorted(general)) if dense.get(key) is not None}
        return {
            **kept,
            "activation_function": dense["hidden_act"],
            "kv_channels": dense.get("head_dim") or dense["hidden_size"] // dense["num_attention_heads"],
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.active,
            "architectures": ["JetMoeForCausalLM"],
            "model_type": "jetmoe",
        }
