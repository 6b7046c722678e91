"""The mixture-of-experts classes of transformers that dense models can become, as a table of data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PARTS = ("gate_proj", "up_proj", "down_proj")
"""The three matrices of a gated feed-forward, as all dense classes in the table call them."""
QKV = ("q_proj", "k_proj", "v_proj")
QKVO = (*QKV, "o_proj")

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Shared:
    """The expert of a class that all tokens go through.

    Attributes:
        matrix: the name of one of its matrices, with a place for `part`.
        parts: what stands for each of `PARTS` in it; the first two are joined where they have one name.
        gate: the name of the weight whose product with the input, through a sigmoid, scales it; None if nothing does.
        setting: the setting that says how wide it is; None if it is as wide as the others.
        counts: whether that setting counts how many of the others it is as wide as.
        optional: whether the class can be without it; the setting is then 0.
    """

    matrix: str
    parts: tuple[str, str, str] = PARTS
    gate: str | None = None
    setting: str | None = None
    counts: bool = False
    optional: bool = False


@dataclass(frozen=True)
class ExpertClass:
    """What a class calls its tensors and settings, and which dense models have everything else in common with it.

    Names of tensors are relative to the layer, as they are on disk.

    Attributes:
        model_type: transformers' name of it.
        architecture: its language model.
        dense: the dense language models that it differs from in the feed-forwards alone, by model type.
        attention: what keeps other dense models from becoming it, after `whose`.
        expert: the name of an expert's matrix, with places for `expert` and `part`; without one for `expert`, of all
            experts' matrices in one tensor, gate and up joined in the first.
        parts: what stands for each of `PARTS` in it.
        router: the name of the router's weight.
        router_dtype: safetensors' name of the type that the router always has; None for that of the experts.
        correction: the name of the numbers added to the experts' scores for the choice of them, and their shape with
            -1 for the number of experts; they are in float32.
        width: the setting that says how wide an expert is.
        experts: the setting that says how many there are.
        active: the setting that says how many of them a token goes through.
        shared: the expert that all tokens go through, if it has one.
        biases: projections of attention that may have a bias.
        zero_biases: projections that get a bias of zeros if they have none, by dense model type.
        windows: the dense model types whose sliding window, one for all layers, it has too.
        dense_layers: how it says which layers keep their feed-forward: by a list of them, by how many come first, by
            the first and the last that do not; None if none can.
        config: further settings.
        settings: further settings that follow from those of the dense model.
    """

    model_type: str
    architecture: str
    dense: Mapping[str, str]
    attention: str = "is another"
    expert: str = "mlp.experts.{expert}.{part}.weight"
    parts: tuple[str, str, str] = PARTS
    router: str = "mlp.gate.weight"
    router_dtype: str | None = None
    correction: tuple[str, tuple[int, ...]] | None = None
    width: str = "moe_intermediate_size"
    experts: str = "num_experts"
    active: str = "num_experts_per_tok"
    shared: Shared | None = None
    biases: tuple[str, ...] = ()
    zero_biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    windows: tuple[str, ...] = ()
    dense_layers: Literal["list", "first", "range"] | None = None
    config: Settings = field(default_factory=dict)
    settings: Callable[[Settings], Settings] = lambda _: {}

    @property
    def fused(self) -> bool:
        """Whether all experts' matrices are one tensor on disk."""
        return "{expert}" not in self.expert


# Without `norm_topk_prob` the weights of the chosen experts would not add up to 1.
NORMED: Settings = {"norm_topk_prob": True}
QWEN: Settings = {
    **NORMED,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "sliding_window": None,
}


def _plain_scaling(dense: Settings) -> Settings:
    """Granite's factors for a model that has none: all 1 but that of queries and keys."""
    if "attention_multiplier" in dense:
        return {}
    head_dim = dense.get("head_dim") or dense["hidden_size"] // dense["num_attention_heads"]
    return {"attention_multiplier": head_dim**-0.5}


def _whole_rotary(dense: Settings) -> Settings:
    """Rotary positions in all of a head, where the class' default is half of it."""
    return {"rope_parameters": {**dense["rope_parameters"], "partial_rotary_factor": 1.0}}


CLASSES: Mapping[str, ExpertClass] = {
    row.model_type: row
    for row in (
        ExpertClass(
            "mixtral",
            "MixtralForCausalLM",
            {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
            attention="has neither biases nor norms of queries and keys",
            expert="block_sparse_moe.experts.{expert}.{part}.weight",
            parts=("w1", "w3", "w2"),
            router="block_sparse_moe.gate.weight",
            width="intermediate_size",
            experts="num_local_experts",
            windows=("mistral",),
        ),
        ExpertClass(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"},
            attention="has no norms of queries and keys, and no window in all layers",
            shared=Shared(
                "mlp.shared_expert.{part}.weight",
                gate="mlp.shared_expert_gate.weight",
                setting="shared_expert_intermediate_size",
            ),
            biases=QKV,
            # Engines look for them, whatever the setting says.
            zero_biases={"llama": QKV},
            dense_layers="list",
            config={**QWEN, "qkv_bias": True},
        ),
        ExpertClass(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            {"qwen3": "Qwen3ForCausalLM"},
            attention="normalises the queries and keys of each head",
            biases=QKVO,
            dense_layers="list",
            config=QWEN,
        ),
        ExpertClass(
            "granitemoe",
            "GraniteMoeForCausalLM",
            {"granite": "GraniteForCausalLM", "llama": "LlamaForCausalLM"},
            attention="has no norms of queries and keys, and no window",
            expert="block_sparse_moe.{part}.weight",
            parts=("input_linear", "input_linear", "output_linear"),
            router="block_sparse_moe.router.layer.weight",
            width="intermediate_size",
            experts="num_local_experts",
            biases=QKVO,
            settings=_plain_scaling,
        ),
        ExpertClass(
            "granitemoeshared",
            "GraniteMoeSharedForCausalLM",
            {"granite": "GraniteForCausalLM", "llama": "LlamaForCausalLM"},
            attention="has no norms of queries and keys, and no window",
            expert="block_sparse_moe.{part}.weight",
            parts=("input_linear", "input_linear", "output_linear"),
            router="block_sparse_moe.router.layer.weight",
            width="intermediate_size",
            experts="num_local_experts",
            shared=Shared(
                "shared_mlp.{part}.weight",
                parts=("input_linear", "input_linear", "output_linear"),
                setting="shared_intermediate_size",
                optional=True,
            ),
            biases=QKVO,
            settings=_plain_scaling,
        ),
        ExpertClass(
            "flex_olmo",
            "FlexOlmoForCausalLM",
            {"olmo2": "Olmo2ForCausalLM"},
            attention="normalises queries and keys over all heads, and comes before its norm",
            width="intermediate_size",
            biases=QKVO,
            config=NORMED,
        ),
        ExpertClass(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            {"llama": "LlamaForCausalLM"},
            attention="has no window, and not the norms of others",
            router_dtype="F32",
            correction=("mlp.gate.e_score_correction_bias", (-1,)),
            experts="n_routed_experts",
            shared=Shared("mlp.shared_experts.{part}.weight", setting="n_shared_experts", counts=True),
            biases=QKV,
            dense_layers="first",
            config={
                **NORMED,
                "use_qk_norm": False,
                "routed_scaling_factor": 1.0,
                "n_group": 1,
                "topk_group": 1,
                "num_nextn_predict_layers": 0,
            },
            settings=_whole_rotary,
        ),
        ExpertClass(
            "hunyuan_v1_moe",
            "HunYuanMoEV1ForCausalLM",
            {"hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM"},
            attention="normalises queries and keys after their rotation",
            router="mlp.gate.wg.weight",
            width="intermediate_size",
            active="moe_topk",
            shared=Shared("mlp.shared_mlp.{part}.weight"),
            biases=QKVO,
        ),
        ExpertClass(
            "ernie4_5_moe",
            "Ernie4_5_MoeForCausalLM",
            {"ernie4_5": "Ernie4_5ForCausalLM"},
            attention="rotates neighbouring numbers of a head, not its halves",
            router_dtype="F32",
            correction=("mlp.moe_statics.e_score_correction_bias", (1, -1)),
            experts="moe_num_experts",
            active="moe_k",
            shared=Shared(
                "mlp.shared_experts.{part}.weight", setting="moe_num_shared_experts", counts=True, optional=True
            ),
            dense_layers="range",
            config={"moe_layer_interval": 1},
        ),
        ExpertClass(
            "olmoe", "OlmoeForCausalLM", {}, attention="normalises queries and keys over all heads, as no dense class"
        ),
    )
}
"""By model type; a dense model becomes the first that fits, if no other is asked for."""
