"""The mixture-of-experts classes of transformers that dense models can become, as a table of data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

PARTS = ("gate_proj", "up_proj", "down_proj")
"""The three matrices of a gated feed-forward, as all dense classes in the table call them."""


@dataclass(frozen=True)
class ExpertClass:
    """What a class calls its tensors and settings, and which dense models have everything else in common with it.

    Names of tensors are relative to the layer, as they are on disk: one tensor per expert.

    Attributes:
        model_type: transformers' name of it.
        architecture: its language model.
        dense: the dense language models that it differs from in the feed-forwards alone, by model type.
        expert: the name of an expert's matrix, with places for `expert` and `part`.
        parts: what stands for each of `PARTS` in it.
        router: the name of the router's weight.
        width: the setting that says how wide an expert is.
        experts: the setting that says how many there are.
        active: the setting that says how many of them a token goes through.
        shared: the name of a matrix of the expert that all tokens go through; None if there is none.
        shared_gate: the name of the weight whose product with the input, through a sigmoid, scales that expert.
        biases: projections of attention that may have a bias.
        windows: the dense model types whose sliding window, one for all layers, it has too.
        config: further settings.
    """

    model_type: str
    architecture: str
    dense: Mapping[str, str]
    expert: str = "mlp.experts.{expert}.{part}.weight"
    parts: tuple[str, str, str] = PARTS
    router: str = "mlp.gate.weight"
    width: str = "moe_intermediate_size"
    experts: str = "num_experts"
    active: str = "num_experts_per_tok"
    shared: str | None = None
    shared_gate: str | None = None
    biases: tuple[str, ...] = ()
    windows: tuple[str, ...] = ()
    config: Mapping[str, object] = field(default_factory=dict)


# Without `norm_topk_prob` the weights of the chosen experts would not add up to 1.
QWEN = {
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "sliding_window": None,
}

CLASSES: Mapping[str, ExpertClass] = {
    row.model_type: row
    for row in (
        ExpertClass(
            "mixtral",
            "MixtralForCausalLM",
            {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
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
            {"qwen2": "Qwen2ForCausalLM"},
            shared="mlp.shared_expert.{part}.weight",
            shared_gate="mlp.shared_expert_gate.weight",
            biases=("q_proj", "k_proj", "v_proj"),
            config={**QWEN, "qkv_bias": True},
        ),
        ExpertClass(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            {"qwen3": "Qwen3ForCausalLM"},
            biases=("q_proj", "k_proj", "v_proj", "o_proj"),
            config=QWEN,
        ),
    )
}
"""By model type."""
