"""Which engines serve a model without this package, as far as anybody has looked: one table, and nothing beyond it.

A row says how much is known: that it *ran* here, that it was *read* in the engine's source, that the source says *no*,
or that it is *unknown*. A card promises no more than that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["ran", "read", "no", "unknown"]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Serving:
    """What is known of an engine and a kind of model.

    Attributes:
        engine: the engine.
        architectures: classes that the row is about.
        state: how it is known.
        flags: what its command needs beside the model's name.
        remark: what else to know, one clause; may be empty.
        when: which models of these classes, by their config.json; the first row that fits counts.
    """

    engine: str
    architectures: tuple[str, ...]
    state: State
    flags: str = ""
    remark: str = ""
    when: Callable[[Config], bool] = lambda _config: True

    def command(self, name: str) -> str | None:
        """The command that serves a model of this name, or makes it the engine's; None where none is known to work."""
        return f"{COMMANDS[self.engine].format(name)}{self.flags}" if self.state in ("ran", "read") else None


def _some_windows(config: Config) -> bool:
    """Whether layers differ in what they see."""
    return "sliding_attention" in (config.get("layer_types") or ())


def _one_window(config: Config) -> bool:
    return config.get("sliding_window") is not None


def _beyond_deepseek(config: Config) -> bool:
    rope = config.get("rope_parameters") or {}
    return bool(config.get("attention_bias")) or rope.get("rope_type", "default") != "default"


def _biased(config: Config) -> bool:
    return bool(config.get("attention_bias"))


def _tied(config: Config) -> bool:
    return bool(config.get("tie_word_embeddings"))


VLLM, SGLANG, LLAMA_CPP = "vLLM", "SGLang", "llama.cpp"
COMMANDS: Mapping[str, str] = {
    VLLM: "vllm serve {}",
    SGLANG: "python -m sglang.launch_server --model-path {}",
    LLAMA_CPP: "python convert_hf_to_gguf.py {}",
}
NO_WINDOW = "its class leaves the sliding window out, so long texts come out otherwise"
TABLE = (
    Serving(
        VLLM,
        ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "MinistralForCausalLM"),
        "read",
        " --model-impl transformers",
        "its own classes do not look at the windows of single layers, those of transformers do",
        _some_windows,
    ),
    Serving(
        VLLM,
        ("MixtralForCausalLM",),
        "no",
        remark=NO_WINDOW,
        when=_one_window,
    ),
    Serving(VLLM, ("MistralForCausalLM",), "unknown", remark="nobody looked at its window", when=_one_window),
    Serving(
        VLLM,
        (
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "MixtralForCausalLM",
            "Qwen2MoeForCausalLM",
            "Qwen3MoeForCausalLM",
            "GraniteSWAForCausalLM",
            "Glm4MoeForCausalLM",
            "Ernie4_5_MoeForCausalLM",
        ),
        "read",
    ),
    Serving(
        VLLM,
        ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        "unknown",
        remark="nobody looked at the biases of its attention",
        when=_biased,
    ),
    Serving(VLLM, ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"), "read"),
    Serving(
        VLLM,
        ("DeepseekV3ForCausalLM",),
        "no",
        remark=(
            "its class reads neither the bias that holds the latent's norm nor the factors of the rotary embedding; "
            "`constant: false` in the rewrite writes a model without either, at a high cost in quality "
            "(SmolLM2-135M in 192 of 384 numbers, before any healing: a perplexity of 98 in place of 26)"
        ),
        when=_beyond_deepseek,
    ),
    Serving(
        VLLM,
        ("DeepseekV3ForCausalLM",),
        "unknown",
        remark="it has the class, and whether its kernels take a latent of this size was not tried",
    ),
    Serving(SGLANG, ("MixtralForCausalLM",), "no", remark=NO_WINDOW, when=_one_window),
    Serving(
        SGLANG,
        ("MixtralForCausalLM", "Qwen2MoeForCausalLM"),
        "no",
        remark="its class wants an output layer of its own, and this model's is tied to the embedding",
        when=_tied,
    ),
    Serving(SGLANG, ("MixtralForCausalLM", "Qwen2MoeForCausalLM"), "read"),
    Serving(LLAMA_CPP, ("MixtralForCausalLM",), "no", remark=NO_WINDOW, when=_one_window),
    Serving(LLAMA_CPP, ("MixtralForCausalLM", "Qwen3MoeForCausalLM"), "read"),
    Serving(
        LLAMA_CPP,
        ("Qwen2MoeForCausalLM",),
        "no",
        remark="its class does not make the weights of a token's experts add up to 1",
    ),
)
WORDS: Mapping[State, str] = {
    "ran": "as it ran here",
    "read": "as read in its source, not run",
    "no": "does not serve it",
    "unknown": "is not known to serve it",
}


def servings(config: Config) -> tuple[Serving, ...]:
    """What is known of each engine for a model, one row for each engine that anybody looked at.

    Args:
        config: the model's config.json.
    """
    architecture = str((config.get("architectures") or [""])[0])
    found: dict[str, Serving] = {}
    for row in TABLE:
        if architecture in row.architectures and row.engine not in found and row.when(config):
            found[row.engine] = row
    return tuple(found.values())


def serving_lines(name: str, config: Config) -> tuple[str, ...]:
    """What is known of serving a model, a plain line for each engine.

    Args:
        name: the model's name.
        config: its config.json.
    """
    lines = []
    for row in servings(config):
        command, remark = row.command(name), f": {row.remark}" if row.remark else ""
        lines.append(
            f"{row.engine} {WORDS[row.state]}{remark}"
            if command is None
            else f"{command} ({row.engine}, {WORDS[row.state]}){remark}"
        )
    return tuple(lines)


def serving_text(name: str, config: Config) -> str:
    """What a card says of serving a model.

    Args:
        name: the model's name.
        config: its config.json.
    """
    parts = []
    for row in servings(config) or (Serving(VLLM, (), "unknown", remark="nobody looked"),):
        remark = f": {row.remark}" if row.remark else ""
        command = row.command(name)
        if command is None:
            parts.append(f"{row.engine} {WORDS[row.state]}{remark}.")
        else:
            parts.append(f"```sh\n{command}\n```\n\nThis is for {row.engine}, {WORDS[row.state]}{remark}.")
    return "\n\n".join(parts)
