"""Stages behind a rewrite: what is healed learns from the model that was rewritten, and stays an ordinary one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rewritten import loaded
from transformers import AutoModelForCausalLM

from attnconv.convert.writing.receipt import read_receipt
from attnconv.distill import healing
from attnconv.errors import InterruptedRun, RecipeError, TrainingError
from attnconv.files.json_files import read_json
from attnconv.packaged.model import embedded_model_path, embedded_tokens
from attnconv.recipes import Recipe, parse_recipe
from attnconv.runs import run_conversion

POOL = {"kind": "pool_heads", "kv_heads": 2, "how": "mean"}
LEARN = {"kind": "logits", "steps": 6, "sequence_length": 48, "learning_rate": 3e-3, "log_every": 2, "save_every": 2}
LORA = {"rank": 8, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def healed(*stages: dict[str, Any], rewrite: dict[str, Any] = POOL, **more: Any) -> Recipe:
    return Recipe(name="healed", rewrite=[rewrite], data={"embedded": True}, stages=list(stages), **more)


def kl(taught: Path, learned: Path) -> float:
    """Divergence of a model from another on text that neither saw."""
    tokens = embedded_tokens("valid")[:2, :96]
    with torch.no_grad():
        wanted, found = (loaded(folder)(tokens).logits.log_softmax(-1) for folder in (taught, learned))
    return float(torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean())


def test_a_pooled_model_learns_what_the_whole_one_says_and_loads_alone(tmp_path: Path) -> None:
    run_conversion(embedded_model_path(), Recipe(name="pooled", rewrite=[POOL]), tmp_path / "start")
    recipe = healed(
        {**LEARN, "steps": 30, "batch_size": 4, "lora": LORA},
        evaluate={"embedded": True, "tokens": 600, "context": 128},
    )
    result = run_conversion(embedded_model_path(), recipe, tmp_path / "out", device="cpu")
    assert result.plan.is_native
    assert kl(embedded_model_path(), tmp_path / "out") < 0.7 * kl(embedded_model_path(), tmp_path / "start")
    assert [row["stage"] for row in result.metrics] == ["teacher", "rewrite", "logits"]
    teacher, start, end = (row["perplexity"] for row in result.metrics)
    assert teacher < end < start
    config = read_json(tmp_path / "out" / "config.json")
    assert config == read_json(tmp_path / "start" / "config.json")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import attnconv" not in card
    assert "transformers alone suffices" in card
    assert ") and then trained, made with" in card
    receipt = read_receipt(tmp_path / "out")
    assert receipt is not None
    assert receipt.plan == {}
    assert receipt.rewrites == result.plan.rewrites
    assert set(receipt.inputs) == {path.name for path in embedded_model_path().glob("*.safetensors")}
    assert not (tmp_path / ".out.attnconv-work").exists()


def test_a_teacher_of_its_own_is_there_only_for_stages_that_learn_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[object] = []
    load = healing.load_teacher
    monkeypatch.setattr(healing, "load_teacher", lambda *given: teachers.append(given) or load(*given))
    lora = {**LEARN, "kind": "lora", "steps": 1, **LORA}
    run_conversion(embedded_model_path(), healed(lora), tmp_path / "lora", device="cpu")
    logits = {**LEARN, "steps": 1, "lora": LORA}
    exact = {"kind": "experts", "target": "mixtral"}
    run_conversion(embedded_model_path(), healed(logits, rewrite=exact), tmp_path / "exact", device="cpu")
    assert not teachers
    run_conversion(embedded_model_path(), healed(logits), tmp_path / "logits", device="cpu")
    assert len(teachers) == 1
    # Copies begin as the model itself once their gates are there, and without these they are no teacher.
    rule = {"layers": "all", "method": "moa", "options": {"num_experts": 2}}
    wide = healed({**logits, "log_every": 1}, rewrite={"kind": "widen"}, attention=[rule])
    run_conversion(embedded_model_path(), wide, tmp_path / "moa", device="cpu")
    assert len(teachers) == 2
    (record,) = healing.MetricsFile(tmp_path / "moa" / "metrics.jsonl").records()
    assert record.loss < 1e-6


def test_an_interrupted_healing_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = healed({**LEARN, "lora": LORA})
    run_conversion(embedded_model_path(), recipe, tmp_path / "whole", device="cpu")
    append = healing.MetricsFile.append

    def stop(metrics: Any, record: Any) -> None:
        append(metrics, record)
        if record.step == 4:
            raise InterruptedRun("enough", None)

    with monkeypatch.context() as patch:
        patch.setattr(healing.MetricsFile, "append", stop)
        with pytest.raises(InterruptedRun):
            run_conversion(embedded_model_path(), recipe, tmp_path / "out", device="cpu")
    identity = json.loads((tmp_path / ".out.attnconv-work" / "run.json").read_text())["identity"]
    assert identity["rewritten from"]
    other = recipe.model_copy(update={"rewrite": healed(LEARN, rewrite={**POOL, "kv_heads": 1}).rewrite})
    with pytest.raises(TrainingError, match="rewrite"):
        run_conversion(embedded_model_path(), other, tmp_path / "out", resume=True, device="cpu")
    run_conversion(embedded_model_path(), recipe, tmp_path / "out", resume=True, device="cpu")
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_stages_about_new_attention_are_refused_where_there_is_none() -> None:
    with pytest.raises(RecipeError, match=r"stage 0 \(attention_transfer\) is about new attention"):
        parse_recipe(
            "name: a\nrewrite: [{kind: degroup}]\ndata: {embedded: true}\n"
            "stages: [{kind: attention_transfer, steps: 1, sequence_length: 8, learning_rate: 1.0e-3}]"
        )
    with pytest.raises(TrainingError, match="nothing to train"):
        run_conversion(embedded_model_path(), healed(LEARN), "never", device="cpu")
