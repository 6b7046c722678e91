"""Which mixture-of-experts class a dense model can become, and why not."""

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

from ...errors import PlanError
from .classes import CLASSES, ExpertClass

# Settings by which mixtures of experts say how many they have.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def is_mixture(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a mixture of experts."""
    return config.get("model_type") in CLASSES or any(config.get(key) for key in EXPERT_COUNTS)


def class_for(config: Mapping[str, Any], target: str | None) -> ExpertClass:
    """The class that a model becomes.

    Args:
        config: the model's config.json.
        target: model type of the class; None takes the first that fits.

    Raises:
        PlanError: there is none.
    """
    kind = config.get("model_type")
    if is_mixture(config):
        raise PlanError(f"experts needs a dense model, and this one ({kind}) is a mixture of experts already")
    fitting = [row for row in CLASSES.values() if kind in row.dense]
    if not fitting:
        known = ", ".join(dict.fromkeys(name for row in CLASSES.values() for name in row.dense))
        raise PlanError(f"experts knows no class for {kind} models that would start exactly: it takes {known}")
    if target is None:
        return fitting[0]
    row = CLASSES[target]
    if row not in fitting:
        raise PlanError(
            f"experts cannot make {kind} models {target}, whose attention {row.attention}: leave target out, or write "
            f"{' or '.join(row.model_type for row in fitting)}"
        )
    return row


def check_settings(config: Mapping[str, Any], dense: Mapping[str, Any], row: ExpertClass) -> None:
    """Refuse settings that the class has no equal of.

    Args:
        config: the model's config.json.
        dense: the same with the defaults of its class.
        row: the class that it is to become.

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
        "with biases (use_bias)": dense.get("use_bias"),
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


def dense_layers(row: ExpertClass, dense: list[int], count: int) -> dict[str, Any]:
    """The settings by which a class says which layers keep their feed-forward.

    Args:
        row: the class.
        dense: places of those layers, in ascending order.
        count: how many layers there are.

    Raises:
        PlanError: it cannot say so.
    """
    meant = [number for number in range(count) if number not in dense]
    if not meant:
        raise PlanError("experts would be made of no layer at all: give layers that the model has")
    forms: dict[str | None, tuple[bool, str, dict[str, Any]]] = {
        None: (not dense, "all layers", {}),
        "list": (True, "", {"mlp_only_layers": dense}),
        "first": (
            dense == list(range(len(dense))),
            "all layers but the first",
            {"first_k_dense_replace": len(dense)},
        ),
        "range": (
            meant == list(range(meant[0], meant[-1] + 1)),
            "all layers but the first and the last",
            {"moe_layer_start_index": meant[0], "moe_layer_end_index": meant[-1]},
        ),
    }
    fits, where, said = forms[row.dense_layers]
    if not fits:
        raise PlanError(f"experts of a {row.model_type} must be in {where}, and layers leaves out {dense}")
    return said


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a model, also those that its config.json leaves to its class."""
    # A copy: reading a configuration takes keys out of what it is given.
    return dict(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict())
