"""What rewrites of attention's projections have in common: layer by layer, with every tensor accounted for."""

import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ...errors import PlanError
from ..reading.weight_files import FLOAT_TYPES
from .attention_classes import QKVO, AttentionClass, Heads, attention_class, heads_of, redressed, with_defaults
from .steps import Step
from .tensors import Target

OF_ATTENTION = re.compile(r"model\.layers\.(\d+)\.self_attn\.(.+)")
NORMS = ("q_norm.weight", "k_norm.weight")


class AttentionStep(Step):
    """A rewrite of every layer's attention, on its own.

    Attributes:
        kind: what recipes call it, for messages.
    """

    kind: str

    def __init__(self) -> None:
        self._row: AttentionClass | None = None
        self._heads: Heads | None = None

    @property
    def row(self) -> AttentionClass:
        """The model's class; known after `check`."""
        assert self._row is not None, "a plan checks a model before it looks at its tensors"
        return self._row

    @property
    def heads(self) -> Heads:
        """The model's sizes; known after `check`."""
        assert self._heads is not None, "a plan checks a model before it looks at its tensors"
        return self._heads

    def check(self, config: Mapping[str, Any]) -> None:
        self._row = attention_class(config, self.kind)
        self._heads = heads_of(config)

    def claims(self, tensor: Target) -> bool:
        return OF_ATTENTION.fullmatch(tensor.name) is not None

    def rewrite(self, claimed: Mapping[str, Target]) -> Iterable[Target]:
        known = {f"{projection}.weight" for projection in QKVO}
        taken = known | {f"{projection}.bias" for projection in self.row.biases}
        taken |= set(NORMS) if self.row.head_norms else set()
        layers: dict[int, dict[str, Target]] = {index: {} for index in range(self.heads.layers)}
        for name, tensor in claimed.items():
            found = OF_ATTENTION.fullmatch(name)
            assert found is not None, "only such tensors are claimed"
            if found[2] not in taken or int(found[1]) not in layers:
                raise PlanError(
                    f"{self.kind} cannot take the tensor {name!r} over: a {self.row.model_type} model has no such one"
                )
            layers[int(found[1])][found[2]] = tensor
        whole = [index for index, tensors in layers.items() if known <= tensors.keys()]
        if len(whole) != len(layers):
            raise PlanError(
                f"{self.kind} found all projections in {len(whole)} of {len(layers)} layers: the model's files are "
                "not complete"
            )
        for index, tensors in layers.items():
            self._check_shapes(tensors)
            yield from self.layer(index, tensors)

    @abstractmethod
    def layer(self, index: int, tensors: Mapping[str, Target]) -> Iterable[Target]:
        """What takes the place of one layer's tensors.

        Args:
            index: the layer's.
            tensors: its tensors by the rest of their names, such as `q_proj.weight`; all projections are there.
        """

    def _check_shapes(self, tensors: Mapping[str, Target]) -> None:
        rows = {"q_proj": self.heads.query, "k_proj": self.heads.kv, "v_proj": self.heads.kv}
        for part, tensor in tensors.items():
            floating(tensor, self.kind)
            projection, _, what = part.partition(".")
            wide = rows.get(projection, self.heads.query) * self.heads.dim
            if projection == "o_proj":
                wanted: tuple[int, ...] = (self.heads.hidden, wide) if what == "weight" else (self.heads.hidden,)
            elif projection in rows:
                wanted = (wide, self.heads.hidden) if what == "weight" else (wide,)
            else:
                wanted = (self.heads.dim,)
            if tensor.shape != wanted:
                raise PlanError(
                    f"{self.kind} expects {tensor.name!r} to have the shape {wanted}, as config.json has it, and it "
                    f"has {tensor.shape}"
                )


def floating(tensor: Target, kind: str) -> torch.dtype:
    """The type in which a tensor is computed with.

    Raises:
        PlanError: there is none.
    """
    if tensor.dtype not in FLOAT_TYPES:
        raise PlanError(
            f"{kind} cannot read {tensor.name!r}, which has the type {tensor.dtype}: dequantise the model first, with "
            "the tool that quantised it"
        )
    return FLOAT_TYPES[tensor.dtype]


def with_heads(config: Mapping[str, Any], kind: str, query: int, kv: int) -> dict[str, Any]:
    """A config.json with other numbers of heads.

    Llama's class refuses numbers of query heads that do not divide its hidden size, and Mistral's without a window is
    the same otherwise.

    Args:
        config: as it was.
        kind: the rewrite that asks, for the message.
        query: query heads.
        kv: key/value heads.

    Raises:
        PlanError: no class takes the number.
    """
    row, heads, full = attention_class(config, kind), heads_of(config), with_defaults(config)
    changes = {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": heads.dim}
    if row.any_count or heads.hidden % query == 0:
        return {**config, **changes}
    biased = [key for key in ("attention_bias", "mlp_bias") if full.get(key)]
    if biased:
        raise PlanError(
            f"{kind} would leave {query} query heads, which do not divide the hidden size of {heads.hidden}: Llama's "
            f"class refuses that, and Mistral's has no biases ({', '.join(biased)}); keep another number"
        )
    return redressed(config, "mistral", "MistralForCausalLM", **changes, sliding_window=None)
