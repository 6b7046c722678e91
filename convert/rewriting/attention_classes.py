"""The classes of transformers whose attention rewrites can reshape, as a table of data, and their settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...errors import PlanError


@dataclass(frozen=True)
class AttentionClass:
    """A class with q, k, v and o projections under `model.layers.N.self_attn`.

    Attributes:
        model_type: transformers' name of it.
        architecture: its language model.
        biases: projections that may have a bias.
        head_norms: whether queries and keys are normalised head by head, with one weight for all heads.
        any_count: whether it takes a number of query heads that does not divide the hidden size.
        plain_rope: whether every layer turns queries and keys by their position, and in the same way.
    """

    model_type: str
    architecture: str
    biases: tuple[str, ...] = ()
    head_norms: bool = False
    any_count: bool = True
    plain_rope: bool = True


QKV = ("q_proj", "k_proj", "v_proj")
QKVO = (*QKV, "o_proj")

ATTENTION_CLASSES: Mapping[str, AttentionClass] = {
    row.model_type: row
    for row in (
        AttentionClass("llama", "LlamaForCausalLM", biases=QKVO, any_count=False),
        AttentionClass("mistral", "MistralForCausalLM"),
        AttentionClass("ministral", "MinistralForCausalLM"),
        AttentionClass("qwen2", "Qwen2ForCausalLM", biases=QKV),
        AttentionClass("qwen3", "Qwen3ForCausalLM", biases=QKVO, head_norms=True),
        AttentionClass("smollm3", "SmolLM3ForCausalLM", biases=QKVO, plain_rope=False),
        AttentionClass("mixtral", "MixtralForCausalLM"),
        AttentionClass("qwen2_moe", "Qwen2MoeForCausalLM", biases=QKV),
        AttentionClass("qwen3_moe", "Qwen3MoeForCausalLM", biases=QKVO, head_norms=True),
    )
}
"""By model type."""


@dataclass(frozen=True)
class Heads:
    """The sizes of a model's attention.

    Attributes:
        layers: how many layers there are.
        query: query heads of each.
        kv: key/value heads of each.
        dim: numbers of a head.
        hidden: numbers of a hidden state.
    """

    layers: int
    query: int
    kv: int
    dim: int
    hidden: int

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.query // self.kv


def attention_class(config: Mapping[str, Any], kind: str) -> AttentionClass:
    """The row of a model.

    Args:
        config: its config.json.
        kind: the rewrite that asks, for the message.

    Raises:
        PlanError: there is none, or the model is not a plain one of its class.
    """
    model_type = config.get("model_type")
    row = ATTENTION_CLASSES.get(str(model_type))
    if row is None:
        known = ", ".join(ATTENTION_CLASSES)
        raise PlanError(f"{kind} does not know the attention of {model_type} models: it takes {known}")
    architecture = (config.get("architectures") or [row.architecture])[0]
    reasons = {
        f"a {architecture}, only a {row.architecture}": architecture != row.architecture,
        "a model that brings its own Python code": config.get("auto_map"),
        "quantised weights: rewrite the model that they were made from": config.get("quantization_config"),
    }
    for reason, given in reasons.items():
        if given:
            raise PlanError(f"{kind} cannot rewrite {reason}")
    return row


def heads_of(config: Mapping[str, Any]) -> Heads:
    """The sizes of a model of the table."""
    full = with_defaults(config)
    dim = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
    kv = full.get("num_key_value_heads") or full["num_attention_heads"]
    return Heads(full["num_hidden_layers"], full["num_attention_heads"], kv, dim, full["hidden_size"])


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a model, also those that its config.json leaves to its class."""
    # A copy: reading a configuration takes keys out of what it is given.
    return dict(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict())


def redressed(config: Mapping[str, Any], model_type: str, architecture: str, **changes: Any) -> dict[str, Any]:
    """The config.json of the same model in another class, which has its settings under the same names.

    Args:
        config: the config.json it had.
        model_type: the other class's.
        architecture: its language model.
        changes: settings that are not the model's; defaults of the two classes differ, so all others are written out.
    """
    general = PreTrainedConfig().to_dict().keys()
    own = CONFIG_MAPPING[model_type]().to_dict().keys() - general
    wanted = own | (general & config.keys()) | {"dtype"}
    kept = {key: value for key, value in with_defaults(config).items() if key in wanted and key != "_name_or_path"}
    if kept.get("dtype") is None:
        kept.pop("dtype", None)
    return {**kept, **changes, "architectures": [architecture], "model_type": model_type}
