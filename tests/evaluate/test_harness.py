import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from attnconv.convert import convert_model
from attnconv.errors import DataError
from attnconv.evaluate.engine.items import Item
from attnconv.evaluate.engine.models import load_evaluated, open_evaluated
from attnconv.evaluate.tasks import harness
from attnconv.evaluate.tasks.base import EvaluatedModel, Scope
from attnconv.evaluate.tasks.harness import HarnessSettings, HarnessTask, items_of
from attnconv.packaged.model import embedded_model_path
from attnconv.recipes import Recipe
from attnconv.runs import run_conversion

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
STORIES = [
    {"question": "Once upon a time, there was a little", "choices": ["girl", "xylophone"], "label": 0},
    {"question": "The dog was very happy and wagged his", "choices": ["car car", "tail"], "label": 1},
    {"question": "Lily went to the park to", "choices": ["play", "the the"], "label": 0},
    {"question": "Tom was sad because he lost his toy. His mom gave him a big", "choices": ["of", "hug"], "label": 1},
    {"question": "They", "choices": ["were friends", "zq zq"], "label": 0},
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_target": "label",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
WRITE = {
    "output_type": "generate_until",
    "doc_to_text": "question",
    "doc_to_target": "{{choices[label]}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
ROLL = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "bits_per_byte")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tasks")
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STORIES), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(where / "rows.jsonl")}}}
    for name, task in {"choose": CHOICE, "write": WRITE, "roll": ROLL}.items():
        text = yaml.safe_dump({"task": f"stories_{name}", "test_split": "test", **data, **task})
        (where / f"{name}.yaml").write_text(text, encoding="utf-8")
    missing = {"task": "stories_missing", "dataset_path": "nobody/nothing-at-all", "test_split": "test", **CHOICE}
    (where / "missing.yaml").write_text(yaml.safe_dump(missing), encoding="utf-8")
    return where


@pytest.fixture(scope="module")
def converted() -> EvaluatedModel:
    evaluated = open_evaluated("model", str(embedded_model_path()))
    load_evaluated(evaluated, device="cpu")
    convert_model(evaluated.model, "lolcats", window=16)
    return evaluated


def run(evaluated: EvaluatedModel, folder: Path, name: str, **scope: int) -> list[Item]:
    task = HarnessTask(HarnessSettings(tasks=(name,), include_path=str(folder)))
    (unit,) = task.units(evaluated, Scope(**scope))
    with torch.inference_mode():
        return list(task.measure(evaluated, unit).items)


@needs_lm_eval
def test_questions_become_items(converted: EvaluatedModel, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    items = run(converted, folder, "stories_choose", limit=4, batch_size=2)
    assert [item.id for item in items] == [f"stories_choose/{number}" for number in range(4)]
    assert all(set(item.values) == {"acc", "acc_norm"} for item in items)
    assert all(value in (0.0, 1.0) for item in items for value in item.values.values())
    assert {item.group["task"] for item in items} == {"stories_choose"}
    task = HarnessTask(HarnessSettings(tasks=("stories_choose",)))
    metrics = task.metrics_of(items)
    assert [(metric.name, metric.better, metric.style) for metric in metrics] == [
        ("acc", "higher", "percent"),
        ("acc_norm", "higher", "percent"),
    ]
    assert capfd.readouterr() == ("", "")


@needs_lm_eval
def test_a_batch_of_generations_is_what_single_ones_are(converted: EvaluatedModel, folder: Path) -> None:
    one = run(converted, folder, "stories_write", batch_size=1)
    many = run(converted, folder, "stories_write", batch_size=5)
    assert one == many
    assert len(one) == 5
    assert len({item.note for item in one}) > 1
    assert all(item.note for item in one)


@needs_lm_eval
def test_perplexity_is_a_quotient_of_sums(converted: EvaluatedModel, folder: Path) -> None:
    items = run(converted, folder, "stories_roll", batch_size=2)
    words, bits = HarnessTask(HarnessSettings(tasks=("stories_roll",))).metrics_of(items)
    assert (words.name, words.scale, words.better, words.compare) == ("word_perplexity", "exp", "lower", "ratio")
    assert (bits.name, bits.scale, bits.better) == ("bits_per_byte", "linear", "lower")
    nats = sum(item.values["word_perplexity"] for item in items)
    assert sum(item.values["bits_per_byte"] for item in items) == pytest.approx(nats / math.log(2))
    assert sum(item.values[words.per] for item in items) == sum(len(row["question"].split()) for row in STORIES)
    assert sum(item.values[bits.per] for item in items) == sum(len(row["question"]) for row in STORIES)
    assert nats > 0


@needs_lm_eval
def test_data_that_cannot_be_had_is_one_sentence(converted: EvaluatedModel, folder: Path) -> None:
    with pytest.raises(DataError, match='The lm-eval task "stories_missing" cannot be loaded: ') as caught:
        run(converted, folder, "stories_missing", limit=1)
    assert len(str(caught.value).splitlines()) == 1


@needs_lm_eval
def test_an_unknown_task_is_answered_with_the_nearest(converted: EvaluatedModel, folder: Path, monkeypatch) -> None:
    # All that lm-eval has takes seconds to read; its own folder of one task stands in for it.
    original = harness._index
    monkeypatch.setattr(harness, "_index", lambda path, defaults: original(path, False))
    with pytest.raises(DataError, match='no task "stories_chose"; the nearest are stories_choose'):
        run(converted, folder, "stories_chose")


@needs_lm_eval
def test_the_folder_of_tasks_must_exist(converted: EvaluatedModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        run(converted, tmp_path / "nowhere", "piqa")


def test_without_lm_eval_it_says_what_to_install(converted: EvaluatedModel, folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="need lm-eval: pip install lm-eval"):
        run(converted, folder, "stories_choose")


def test_several_readings_of_an_answer_are_metrics_of_their_own(caplog) -> None:
    shared = {"doc_id": 7, "metrics": ["exact_match", "f1"], "f1": ("a", "b"), "filtered_resps": [" 12 "]}
    samples = [{**shared, "filter": "strict", "exact_match": 0.0}, {**shared, "filter": "loose", "exact_match": True}]
    (item,) = items_of("sums", samples)
    assert item == Item("sums/7", {"exact_match (strict)": 0.0, "exact_match (loose)": 1.0}, {"task": "sums"}, "12")
    assert "f1 of the lm-eval task sums is no mean" in caplog.text
    metrics = HarnessTask(HarnessSettings(tasks=("sums",))).metrics_of([item])
    assert {metric.style for metric in metrics} == {"percent"}


def test_tasks_must_be_named() -> None:
    with pytest.raises(ValidationError):
        HarnessSettings(tasks=())


COMMAND_LINE = """
import sys
sys.modules["attnconv"] = None
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.mark.slow
@needs_lm_eval
def test_its_own_command_line_takes_native_results(folder: Path, tmp_path: Path) -> None:
    upcycle = Recipe(name="native", rewrite=[{"kind": "experts", "target": "mixtral"}])
    run_conversion(embedded_model_path(), upcycle, tmp_path / "native")
    found = {}
    for name, model in {"base": embedded_model_path(), "native": tmp_path / "native"}.items():
        arguments = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
        arguments += ["--tasks", "stories_choose", "--include_path", folder, "--output_path", tmp_path / f"to-{name}"]
        command = [sys.executable, "-c", COMMAND_LINE, *map(str, arguments)]
        subprocess.run(command, check=True, env={**os.environ, "HF_HOME": str(tmp_path / "cache")})
        (file,) = (tmp_path / f"to-{name}").rglob("results_*.json")
        found[name] = json.loads(file.read_text())["results"]["stories_choose"]
    assert found["native"]["acc,none"] == found["base"]["acc,none"]
    assert found["native"]["acc_norm,none"] == found["base"]["acc_norm,none"]
