"""Inspect shows what the rewrites of a recipe would make of a model, without writing anything."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from expert_models import dense, experts
from typer.testing import CliRunner

from attnconv.cli import app
from attnconv.evaluate.diagnose.inspection import inspect_model
from attnconv.recipes import Recipe, parse_recipe
from attnconv.runs import run_conversion


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return dense("llama", tmp_path / "base")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: " ".join(CliRunner().invoke(app, ["inspect", *map(str, arguments)]).output.split())


def test_it_tells_the_result_and_its_size(base: Path, tmp_path: Path, shown: Callable[..., str]) -> None:
    found = inspect_model(str(base), recipe=experts(num_experts=3, active=1)).rewrite
    assert found is not None
    assert found.steps == ("each feed-forward made 3 experts of which a token goes through 1",)
    assert (found.class_name, found.inexact, found.refused) == ("MixtralForCausalLM", (), None)
    run_conversion(base, experts(num_experts=3, active=1), tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    assert found.bytes_after is not None
    assert 0 < os.path.getsize(weights) - found.bytes_after < 20_000
    said = shown(base, "--recipe", "upcycle-mixtral")
    assert "LlamaForCausalLM (llama), float32 rewritten: each feed-forward made 4 experts" in said
    assert "the result: MixtralForCausalLM" in said
    assert "its start: exact, which convert checks" in said
    assert "would be converted" not in said
    assert "not exact: 50% of each expert's neurons drawn anew" in shown(base, "-r", "drop-upcycle")


def test_it_counts_the_cache_of_the_result(base: Path) -> None:
    cast: dict[str, Any] = {"kind": "cast", "dtype": "bfloat16"}
    rows = inspect_model(str(base), recipe=Recipe(name="a", rewrite=[cast])).footprints
    assert all(row.after * 2 == row.before for row in rows)
    text = "name: a\nrewrite: [{kind: experts}]\nattention: [{layers: '0', method: sliding_window}]"
    found = inspect_model(str(base), recipe=parse_recipe(text))
    assert [(group.method, group.class_name) for group in found.groups] == [
        ("sliding_window", "MixtralAttention"),
        (None, "MixtralAttention"),
    ]
    assert found.footprints[0].after < found.footprints[0].before


def test_it_says_what_serves_the_result(base: Path, shown: Callable[..., str]) -> None:
    assert "serving: vllm serve DIR (vLLM, as read in its source, not run)" in shown(base, "-r", "upcycle-mixtral")
    text = "name: a\nrewrite: [{kind: experts}]\nattention: [{layers: '0', method: sliding_window}]"
    assert inspect_model(str(base), recipe=parse_recipe(text)).serving == ()


def test_it_counts_the_memory_of_a_teacher_of_its_own(base: Path, shown: Callable[..., str]) -> None:
    stage: dict[str, Any] = {"kind": "logits", "steps": 1, "sequence_length": 8, "learning_rate": 1e-3}
    given: dict[str, Any] = {"stages": [stage], "data": {"embedded": True}}
    pooled = Recipe(name="a", rewrite=[{"kind": "pool_heads", "kv_heads": 1, "how": "mean"}], **given)
    found = inspect_model(str(base), recipe=pooled).rewrite
    assert found is not None
    assert found.teacher_bytes == found.bytes_before
    exact = inspect_model(str(base), recipe=Recipe(name="a", rewrite=[{"kind": "degroup"}], **given)).rewrite
    assert exact is not None
    assert exact.teacher_bytes is None
    said = shown(base, "--recipe", "pool-heads", "--set", "rewrite.0.kv_heads=1")
    assert "healing: learns from the model as it was, which takes" in said


def test_it_says_why_a_model_is_refused(base: Path, shown: Callable[..., str]) -> None:
    found = inspect_model(str(base), recipe=experts(target="qwen3_moe"))
    assert found.rewrite is not None
    assert "normalises the queries and keys" in str(found.rewrite.refused)
    said = shown(base, "-r", "upcycle-qwen3")
    assert "refused: the model cannot be rewritten so" in said
    result = CliRunner().invoke(app, ["inspect", str(base), "-r", "upcycle-qwen3", "--json"])
    assert json.loads(result.stdout)["rewrite"]["class_name"] is None
    assert result.exit_code == 1


def test_weights_that_are_elsewhere_are_not_needed(base: Path) -> None:
    (base / "model.safetensors").unlink()
    found = inspect_model(str(base), recipe=experts()).rewrite
    assert found is not None
    assert (found.class_name, found.tensors, found.bytes_after) == ("MixtralForCausalLM", None, None)
