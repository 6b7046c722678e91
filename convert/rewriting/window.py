"""Sliding windows in some layers or all, as settings of a class that transformers has."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from ...errors import PlanError
from .attention_classes import attention_class, heads_of, redressed, with_defaults
from .projections import AttentionStep, floating
from .tensors import Target, made

FULL, SLIDING = "full_attention", "sliding_attention"
BY_LAYER = {"qwen2": {"use_sliding_window": True}, "qwen3": {"use_sliding_window": True}, "ministral": {}}
"""Classes that say for each layer whether it has a window, and with which further settings."""
UNIFORM = ("mistral", "mixtral")
"""Classes whose window is that of all layers."""
LLAMA_LIKE = ("llama", "mistral")

# Which layers of so many are meant.
Choice = Callable[[int], list[int]]


class Window(AttentionStep):
    """Let the attention of some layers see the newest tokens only; the weights stay as they are.

    Args:
        window: how many tokens, each itself included.
        layers: gives the chosen of so many layers.
        sinks: what the logits of learned sinks start at, one for each head; None for a class without sinks.
    """

    kind = "window"

    def __init__(self, *, window: int, layers: Choice, sinks: float | None = None) -> None:
        super().__init__()
        self.window = window
        self.layers = layers
        self.sinks = sinks
        self._chosen: list[int] = []
        self._target = ""

    @property
    def summary(self) -> str:
        learned = "" if self.sinks is None else ", with sinks that can be learned"
        return f"attention of {len(self._chosen)} layers within windows of {self.window} tokens{learned}"

    @property
    def inexact(self) -> str:
        return "attention within windows"

    def check(self, config: Mapping[str, Any]) -> None:
        self._row, self._heads = attention_class(config, self.kind), heads_of(config)
        full = with_defaults(config)
        self._chosen = self.layers(self.heads.layers)
        if not self._chosen:
            raise PlanError(f"window is to be put on none of the {self.heads.layers} layers: choose others")
        self._check_windows(full)
        self._target = self._class(full)
        if self._target not in CONFIG_MAPPING:
            raise PlanError(f"window would write a {self._target} model, which this transformers does not have")

    def _check_windows(self, full: Mapping[str, Any]) -> None:
        """Refuse windows that would become others, for a class has one length for all."""
        kind, old = self.row.model_type, full.get("sliding_window")
        types = (
            [SLIDING if old is not None else FULL] * self.heads.layers if kind in UNIFORM else full.get("layer_types")
        )
        has = [index for index, name in enumerate(types or ()) if name == SLIDING]
        others = [index for index in has if index not in self._chosen]
        if others and old is not None and old != self.window:
            raise PlanError(
                f"window cannot give some layers {self.window} tokens and leave layer {others[0]} its {old}: a "
                f"{kind} model has one length for all; choose that layer too, or the same length"
            )
        self._chosen = sorted({*self._chosen, *others})

    def _class(self, full: Mapping[str, Any]) -> str:
        kind = self.row.model_type
        all_layers = len(self._chosen) == self.heads.layers
        if self.sinks is not None:
            if kind not in LLAMA_LIKE:
                raise PlanError(f"window can give sinks to {' and '.join(LLAMA_LIKE)} models, and not to {kind} models")
            return "granite_swa"
        if kind in BY_LAYER or (kind in UNIFORM and all_layers):
            return kind
        if kind not in LLAMA_LIKE:
            raise PlanError(
                f"window knows no class with windows in {len(self._chosen)} of {self.heads.layers} layers for {kind} "
                f"models: {'choose all layers' if kind in UNIFORM else 'use the attention method sliding_window'}"
            )
        biased = [key for key in ("attention_bias", "mlp_bias") if full.get(key)]
        if biased:
            raise PlanError(
                f"window would write a Llama as Ministral or Mistral, which have no biases ({', '.join(biased)}): use "
                "the attention method sliding_window, or sinks, whose class has them"
            )
        return "mistral" if all_layers else "ministral"

    def claims(self, tensor: Target) -> bool:
        # Sinks stand beside the projections; without them no tensor changes.
        return self.sinks is not None and super().claims(tensor)

    def rewrite(self, claimed: Mapping[str, Target]) -> Iterable[Target]:
        return super().rewrite(claimed) if self.sinks is not None else ()

    def layer(self, index: int, tensors: Mapping[str, Target]) -> Iterable[Target]:
        yield from tensors.values()
        if self.sinks is not None:
            query = tensors["q_proj.weight"]
            dtype = floating(query, self.kind)
            start = torch.full((self.heads.query,), self.sinks, dtype=dtype)
            name = f"{query.name.removesuffix('q_proj.weight')}sinks"
            yield made(name, (self.heads.query,), dtype, (), lambda: start)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The same settings, with windows."""
        types = [SLIDING if index in self._chosen else FULL for index in range(self.heads.layers)]
        if self._target in UNIFORM:
            changes: dict[str, Any] = {"sliding_window": self.window}
        else:
            changes = {"sliding_window": self.window, "layer_types": types, **BY_LAYER.get(self._target, {})}
        if self._target == self.row.model_type:
            return {**config, **changes}
        if self._target == "granite_swa":
            # Granite's multipliers at what they are in a model that has none.
            changes |= {"attention_multiplier": self.heads.dim**-0.5, "embedding_multiplier": 1.0}
            changes |= {"residual_multiplier": 1.0, "logits_scaling": 1.0, "layer_rope_theta": None}
        architecture = {"mistral": "Mistral", "ministral": "Ministral", "granite_swa": "GraniteSWA"}[self._target]
        return redressed(config, self._target, f"{architecture}ForCausalLM", **changes, head_dim=self.heads.dim)
