"""What cards say of engines: what the table holds, and nothing that nobody looked at."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import save, tiny_llama

from attnconv.convert.writing.serving import COMMANDS, TABLE, WORDS, serving_lines, serving_text, servings
from attnconv.evaluate.diagnose.inspection import inspect_model


@pytest.mark.parametrize(
    ("architecture", "settings", "state", "command"),
    [
        ("LlamaForCausalLM", {}, "read", "vllm serve mine"),
        ("MistralForCausalLM", {"sliding_window": None}, "read", "vllm serve mine"),
        ("MistralForCausalLM", {"sliding_window": 64}, "unknown", None),
        (
            "MinistralForCausalLM",
            {"layer_types": ["sliding_attention"]},
            "read",
            "serve mine --model-impl transformers",
        ),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention", "sliding_attention"]}, "read", "--model-impl"),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention"]}, "read", "vllm serve mine"),
        ("MixtralForCausalLM", {"sliding_window": 64}, "no", None),
        ("GraniteSWAForCausalLM", {"layer_types": ["sliding_attention"]}, "read", "vllm serve mine"),
        ("DeepseekV3ForCausalLM", {"attention_bias": True}, "no", None),
        ("DeepseekV3ForCausalLM", {"rope_parameters": {"rope_type": "longrope"}}, "no", None),
        ("DeepseekV3ForCausalLM", {"attention_bias": False}, "unknown", None),
    ],
)
def test_a_card_promises_what_was_looked_at(
    architecture: str, settings: dict[str, Any], state: str, command: str | None
) -> None:
    config = {"architectures": [architecture], **settings}
    row = servings(config)[0]
    assert (row.engine, row.state) == ("vLLM", state)
    text = serving_text("mine", config)
    assert WORDS[row.state] in text
    assert ("vllm serve" in text) is (command is not None)
    assert command is None or command in text
    line = serving_lines("mine", config)[0]
    assert WORDS[row.state] in line
    assert command is None or command in line


@pytest.mark.parametrize(
    ("architecture", "settings", "states"),
    [
        ("MixtralForCausalLM", {}, {"vLLM": "read", "SGLang": "read", "llama.cpp": "read"}),
        ("MixtralForCausalLM", {"tie_word_embeddings": True}, {"vLLM": "read", "SGLang": "no", "llama.cpp": "read"}),
        ("MixtralForCausalLM", {"sliding_window": 64}, {"vLLM": "no", "SGLang": "no", "llama.cpp": "no"}),
        ("Qwen2MoeForCausalLM", {}, {"vLLM": "read", "SGLang": "read", "llama.cpp": "no"}),
        ("Qwen3MoeForCausalLM", {}, {"vLLM": "read", "llama.cpp": "read"}),
        ("GraniteMoeForCausalLM", {}, {"vLLM": "read"}),
        ("GraniteMoeSharedForCausalLM", {"attention_bias": True}, {"vLLM": "unknown"}),
    ],
)
def test_each_engine_is_told_of_by_itself(architecture: str, settings: dict[str, Any], states: dict[str, str]) -> None:
    config = {"architectures": [architecture], **settings}
    assert {row.engine: row.state for row in servings(config)} == states
    text = serving_text("mine", config)
    for engine, state in states.items():
        assert engine in text
        assert (COMMANDS[engine].format("mine") in text) is (state == "read")


def test_rows_are_about_classes_that_there_are() -> None:
    names = {name for row in TABLE for name in row.architectures}
    assert [name for name in names - {"GraniteSWAForCausalLM"} if not hasattr(transformers, name)] == []
    # A row that says no or nothing says why.
    assert all(row.remark for row in TABLE if row.state in ("no", "unknown"))


def test_a_class_that_nobody_looked_at_is_unknown() -> None:
    for config in ({"architectures": ["GemmaForCausalLM"]}, {}):
        assert serving_text("mine", config) == "vLLM is not known to serve it: nobody looked."
        assert serving_lines("mine", config) == ()


def test_inspect_tells_of_the_model_as_it_is(tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "base")
    (line,) = inspect_model(str(folder)).serving
    assert line.startswith(f"vllm serve {folder} (vLLM, as read")
