"""Dense feed-forwards made mixtures of experts, in a class that transformers has."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...errors import PlanError
from ..reading.weight_files import FLOAT_TYPES
from .classes import CLASSES, PARTS, ExpertClass
from .steps import Step
from .tensors import Target, elementwise, made

OF_LAYERS = re.compile(r"(model\.layers\.\d+)\.(?:mlp\.(?P<part>.+)|self_attn\.(?P<projection>\w+)\.bias)")
WEIGHT = ".weight"
# Settings by which mixtures of experts say how many they have.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Experts(Step):
    """Copy every feed-forward into experts.

    All experts are equal and the weights of a token's experts add up to 1, so their sum is the dense feed-forward.
    Where the class has an expert that all tokens go through, it is the dense feed-forward too: its gate, a sigmoid of
    zero, halves it, and the experts' last matrices are halved, which rounds nothing.

    Args:
        num_experts: experts of each layer.
        active: how many of them a token goes through.
        target: model type of the class; None takes the one that fits the model.
        zero_router: leave the routers at zero instead of drawing them.
        seed: what they are drawn from.
    """

    def __init__(
        self, *, num_experts: int, active: int, target: str | None = None, zero_router: bool = False, seed: int = 0
    ) -> None:
        self.num_experts = num_experts
        self.active = active
        self.target = target
        self.zero_router = zero_router
        self.seed = seed
        self._row = CLASSES["mixtral"]
        self._layers = 0
        self._deviation = 0.0

    @property
    def summary(self) -> str:
        return f"each feed-forward made {self.num_experts} experts of which a token goes through {self.active}"

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuse what would not be exact, and settle the class."""
        self._row = _class_for(config, self.target)
        dense = _with_defaults(config)
        _check_settings(config, dense, self._row)
        self._layers = dense["num_hidden_layers"]
        self._deviation = dense["initializer_range"]

    def claims(self, tensor: Target) -> bool:
        return OF_LAYERS.fullmatch(tensor.name) is not None

    def rewrite(self, claimed: Mapping[str, Target]) -> Iterable[Target]:
        layers: dict[str, dict[str, Target]] = {}
        for name, tensor in claimed.items():
            found = OF_LAYERS.fullmatch(name)
            if found is None:
                continue
            layer, part, projection = found.group(1, "part", "projection")
            if projection in self._row.biases:
                yield tensor
            elif part is not None and part.removesuffix(WEIGHT) in PARTS and part.endswith(WEIGHT):
                layers.setdefault(layer, {})[part.removesuffix(WEIGHT)] = tensor
            else:
                raise PlanError(
                    f"experts cannot take the tensor {name!r} over: a {self._row.model_type} model has no place for it"
                )
        whole = [layer for layer, parts in layers.items() if len(parts) == len(PARTS)]
        if len(whole) != self._layers or len(layers) != self._layers:
            raise PlanError(
                f"experts found whole feed-forwards in {len(whole)} of {self._layers} layers: the model's files are "
                "not complete"
            )
        for layer, parts in layers.items():
            yield from self._experts(layer, [parts[part] for part in PARTS])

    def _experts(self, layer: str, matrices: list[Target]) -> Iterator[Target]:
        """The tensors of one layer's mixture."""
        row = self._row
        dtype = _computing_type(matrices[-1])
        routed = matrices if row.shared is None else [*matrices[:-1], elementwise(matrices[-1], dtype, _half)]
        for expert in range(self.num_experts):
            for part, matrix in zip(row.parts, routed, strict=True):
                yield replace(matrix, name=f"{layer}.{row.expert.format(expert=expert, part=part)}")
        if row.shared is not None:
            for part, matrix in zip(PARTS, matrices, strict=True):
                yield replace(matrix, name=f"{layer}.{row.shared.format(part=part)}")
        hidden = matrices[-1].shape[0]
        if row.shared_gate is not None:
            gate = torch.zeros(1, hidden, dtype=dtype)
            yield made(f"{layer}.{row.shared_gate}", (1, hidden), dtype, (), lambda: gate)
        yield self._router(f"{layer}.{row.router}", hidden, dtype)

    def _router(self, name: str, hidden: int, dtype: torch.dtype) -> Target:
        shape = (self.num_experts, hidden)

        def weights() -> Tensor:
            if self.zero_router:
                return torch.zeros(shape, dtype=dtype)
            # Each layer draws for itself, whatever is written before it.
            digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            return (torch.randn(shape, generator=generator) * self._deviation).to(dtype)

        return made(name, shape, dtype, (), weights)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the dense model's settings were, defaults written out: those of the two classes differ."""
        row, dense = self._row, _with_defaults(config)
        general = PreTrainedConfig().to_dict().keys()
        own = CONFIG_MAPPING[row.model_type]().to_dict().keys() - general
        wanted = own | (general & config.keys()) | {"dtype", "head_dim"}
        kept = {key: value for key, value in dense.items() if key in wanted and key != "_name_or_path"}
        for key in ("dtype", "head_dim"):
            if kept.get(key) is None:
                kept.pop(key, None)
        if config["model_type"] not in row.windows:
            # A stray setting that the dense class does not look at, and this one would.
            kept["sliding_window"] = None
        width = dense["intermediate_size"]
        kept |= {row.width: width, row.experts: self.num_experts, row.active: self.active, **row.config}
        if row.shared is not None:
            kept["shared_expert_intermediate_size"] = width
        return {**kept, "architectures": [row.architecture], "model_type": row.model_type}


def _class_for(config: Mapping[str, Any], target: str | None) -> ExpertClass:
    """The class that a model becomes.

    Raises:
        PlanError: there is none.
    """
    kind = config.get("model_type")
    if kind in CLASSES or any(config.get(key) for key in EXPERT_COUNTS):
        raise PlanError(f"experts needs a dense model, and this one ({kind}) is a mixture of experts already")
    rows = [row for row in CLASSES.values() if kind in row.dense]
    if not rows:
        known = ", ".join(name for row in CLASSES.values() for name in row.dense)
        raise PlanError(f"experts knows no class for {kind} models that would start exactly: it takes {known}")
    if target is None:
        return rows[0]
    if CLASSES[target] not in rows:
        raise PlanError(
            f"experts cannot make {kind} models {target}, whose attention is another: leave target out, or write "
            f"{' or '.join(row.model_type for row in rows)}"
        )
    return CLASSES[target]


def _check_settings(config: Mapping[str, Any], dense: Mapping[str, Any], row: ExpertClass) -> None:
    """Refuse settings that the class has no equal of.

    Raises:
        PlanError: names the first.
    """
    kind = config["model_type"]
    architectures = config.get("architectures") or [row.dense[kind]]
    reasons = {
        f"of a {architectures[0]}, only of a {row.dense[kind]}": architectures != [row.dense[kind]],
        "of a model that brings its own Python code": config.get("auto_map"),
        "of quantised weights: rewrite the model that they were made from": config.get("quantization_config"),
        f"with the activation {dense.get('hidden_act')!r}, only with 'silu'": dense.get("hidden_act") != "silu",
        "with biases (mlp_bias)": dense.get("mlp_bias"),
        f"beside attention with biases (attention_bias), which {row.model_type} has no place for": (
            dense.get("attention_bias") and not row.biases
        ),
        f"beside attention with a sliding window in some layers, which {row.model_type} models have in all or none": (
            "sliding_attention" in (dense.get("layer_types") or ()) and kind not in row.windows
        ),
    }
    for reason, given in reasons.items():
        if given:
            raise PlanError(f"experts cannot be made of feed-forwards {reason}")


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a model, also those that its config.json leaves to its class."""
    # A copy: reading a configuration takes keys out of what it is given.
    return dict(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict())


def _computing_type(matrix: Target) -> torch.dtype:
    if matrix.dtype not in FLOAT_TYPES:
        raise PlanError(
            f"experts cannot read {matrix.name!r}, which has the type {matrix.dtype}: dequantise the model first, "
            "with the tool that quantised it"
        )
    return FLOAT_TYPES[matrix.dtype]


def _half(piece: Tensor) -> Tensor:
    return piece * 0.5
