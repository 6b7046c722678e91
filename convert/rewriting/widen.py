"""Several attentions made one: their heads side by side in each layer, for a gate to mix."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...errors import PlanError
from ..reading.checkpoint import Checkpoint
from .branches import Branch, merged, open_branches, public_names
from .steps import Step
from .tensors import TORCH_TYPES, Target, elementwise, made, stored_tensors

PROJECTION = re.compile(r"model\.layers\.\d+\.self_attn\.(?P<which>[qkvo])_proj\.(?P<kind>weight|bias)")
# Each head of these attends by itself between a projection to the heads and one from them.
KINDS = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "granite")


class Widen(Step):
    """Copy the attention of each layer, so that a layer holds several that a gate can weigh.

    Where the weights of the gate add up to 1, equal attentions are together what one of them is. With keys and values
    of its own the heads of one attention stand together; with shared ones the query heads of each KV head do, those of
    one attention after those of another.

    With branches the attentions are theirs. All but the projections stays what it is before: to average it, put
    `Experts` with the same branches before this.

    Args:
        num_experts: attentions of each layer; with branches one for each model.
        share_kv: whether all have the same keys and values, those of the model or the mean over all models.
        mixed: whether a method `moa` with the same two settings follows in all layers, whose gates add up to 1.
        sources: fine-tuned branches of the model, folders or Hub ids, whose attentions these are.
        include_base: whether the model's own is the first of them.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        share_kv: bool = False,
        mixed: bool = False,
        sources: Sequence[str] = (),
        include_base: bool = True,
    ) -> None:
        self.num_experts = num_experts
        self.share_kv = share_kv
        self.mixed = mixed
        self.branches = tuple(sources)
        self.include_base = include_base
        self._branches: tuple[Branch, ...] = ()
        self._models: list[Mapping[str, Target]] = []
        self._kv_heads = 1
        self._heads = 1

    @property
    def summary(self) -> str:
        kv = "one set of keys and values" if self.share_kv else "keys and values of their own"
        made_of = ""
        if self.branches:
            names = [*(["the model"] if self.include_base else []), *self.sources]
            made_of = f", out of those of {', '.join(names)}"
        return f"the attention of each layer made {self.num_experts} side by side, with {kv}{made_of}"

    @property
    def inexact(self) -> str | None:
        """Why the result, with its gates if they follow, is not its source."""
        if not self.mixed:
            return (
                "the attentions of a layer are only added up until the method moa, with as many experts, weighs them "
                "in all layers"
            )
        return "attentions of several models" if self.branches else None

    @property
    def sources(self) -> Mapping[str, Checkpoint]:
        return public_names(self._branches)

    def begin(self, checkpoint: Checkpoint) -> None:
        self._branches = open_branches(self.branches, checkpoint)
        models = [branch.tensors for branch in self._branches]
        if self.include_base or not models:
            models.insert(0, stored_tensors(checkpoint))
        self._models = models

    def compared(self, tensors: Mapping[str, Target]) -> Mapping[str, Target]:
        """With gates that are all equal: where attentions are, any that add up to 1 give the same."""
        if not self.mixed:
            return tensors
        share = 1 / self.num_experts
        return {
            name: elementwise(tensor, TORCH_TYPES[tensor.dtype], lambda piece: piece * share)
            if (found := PROJECTION.fullmatch(name)) is not None and (found["which"], found["kind"]) == ("o", "weight")
            else tensor
            for name, tensor in tensors.items()
        }

    def check(self, config: Mapping[str, Any]) -> None:
        kind = config.get("model_type")
        if kind not in KINDS:
            raise PlanError(f"widen does not know the attention of {kind} models: it takes {', '.join(KINDS)}")
        if config.get("quantization_config"):
            raise PlanError("widen cannot read quantised weights: rewrite the model that they were made from")
        if config.get("auto_map"):
            raise PlanError("widen cannot rewrite a model that brings its own Python code")
        settings = _with_defaults(config)
        self._heads, self._kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
        # Whatever cannot be loaded is refused before it is written.
        self.config(config)

    def claims(self, tensor: Target) -> bool:
        found = PROJECTION.fullmatch(tensor.name)
        return found is not None and (found["which"], found["kind"]) != ("o", "bias")

    def rewrite(self, claimed: Mapping[str, Target]) -> Iterable[Target]:
        for name, tensor in claimed.items():
            found = PROJECTION.fullmatch(name)
            if found is None:
                continue
            if tensor.dtype not in TORCH_TYPES:
                raise PlanError(
                    f"widen cannot read {name!r}, which has the type {tensor.dtype}: dequantise the model first"
                )
            which, experts = found["which"], self._experts(name, tensor)
            if which in "kv" and self.share_kv:
                yield merged(name, [{name: expert} for expert in experts])
                continue
            axis = 1 if which == "o" else 0
            heads = self._heads if which in "qo" else self._kv_heads
            if tensor.shape[axis] % heads:
                raise PlanError(f"{name!r} has {tensor.shape[axis]} rows, which do not make up {heads} heads")
            shape = [size * self.num_experts if place == axis else size for place, size in enumerate(tensor.shape)]
            join = self._join(axis, self._kv_heads if self.share_kv else 1)
            yield made(name, tuple(shape), TORCH_TYPES[tensor.dtype], experts, join)

    def _experts(self, name: str, tensor: Target) -> tuple[Target, ...]:
        """A projection of each attention, or the one of which all are copies.

        Raises:
            PlanError: a branch has none of this shape and type, or an earlier step has changed the model's.
        """
        if not self.branches:
            return (tensor,)
        found = [model.get(name) for model in self._models]
        for place, other in enumerate(found):
            if other is None or (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
                of = (["the model", *self.branches] if self.include_base else self.branches)[place]
                raise PlanError(
                    f"widen cannot take {name!r} from {of}: it is {_described(other)} there, and {_described(tensor)} "
                    "here; give branches of one model, and change attention or cast only after this step"
                )
        return tuple(other for other in found if other is not None)

    def _join(self, axis: int, blocks: int) -> Callable[[Tensor], Tensor]:
        """Puts the heads of all experts side by side, block by block, along an axis."""

        def join(*experts: Tensor) -> Tensor:
            parts = experts * self.num_experts if len(experts) == 1 else experts
            split = [part.unflatten(axis, (blocks, -1)) for part in parts]
            return torch.cat(split, axis + 1).flatten(axis, axis + 1)

        return join

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """More heads of the size that they had.

        Raises:
            PlanError: the class cannot have so many.
        """
        settings = _with_defaults(config)
        heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
        head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
        wide = {
            "num_attention_heads": heads * self.num_experts,
            "num_key_value_heads": kv_heads if self.share_kv else kv_heads * self.num_experts,
            "head_dim": head_dim,
        }
        if config["model_type"] == "llama" and settings["hidden_size"] % wide["num_attention_heads"]:
            return {**_as_mistral(settings, config), **wide}
        return {**config, **wide}


def _as_mistral(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a Llama as those of a Mistral without a window, which is the same model.

    Llama's class insists that the number of heads divides the width even where heads have a size of their own.

    Raises:
        PlanError: the Llama has something that Mistral has not.
    """
    lacking = next((key for key in ("attention_bias", "mlp_bias") if settings.get(key)), None)
    if lacking is not None:
        raise PlanError(
            f"widen would have to write this llama as a mistral, for its class wants a number of heads that divides "
            f"its width, and a mistral has no {lacking}: choose num_experts so that the heads divide the width"
        )
    general = PreTrainedConfig().to_dict().keys()
    wanted = CONFIG_MAPPING["mistral"]().to_dict().keys() - general | (general & config.keys()) | {"dtype"}
    kept = {key: settings[key] for key in settings if key in wanted and key != "_name_or_path"}
    if kept.get("dtype") is None:
        kept.pop("dtype", None)
    of_class = (config.get("architectures") or ["LlamaForCausalLM"])[0].replace("Llama", "Mistral")
    return {**kept, "architectures": [of_class], "model_type": "mistral", "sliding_window": None}


def _described(tensor: Target | None) -> str:
    return "missing" if tensor is None else f"{list(tensor.shape)} in {tensor.dtype}"


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a model, also those that its config.json leaves to its class."""
    # A copy: reading a configuration takes keys out of what it is given.
    return dict(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict())
