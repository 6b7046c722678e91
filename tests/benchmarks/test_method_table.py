"""The pure parts of the table of methods: what is measured, rows, resuming, Markdown."""

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from attnconv.attention_modules import available
from attnconv.evaluate.diagnose.inspection import inspect_model
from attnconv.recipes import list_recipes, load_recipe


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    for name in ("common", "method_table"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("method_table")


@pytest.fixture
def model(repository: Path) -> Path:
    return repository / "packaged" / "assets" / "stories260K"


@pytest.fixture(scope="module")
def causal(repository: Path) -> list[str]:
    """The recipes that the table has; each is planned for a model, which takes a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "benchmarks"))
        found: list[str] = importlib.import_module("method_table").causal_recipes(
            repository / "packaged" / "assets" / "stories260K"
        )
    return found


def case(role: str, measure: str, seconds: list[float], skipped: str | None = None) -> dict[str, Any]:
    figures = {"median": sorted(seconds)[len(seconds) // 2], "low": min(seconds), "high": max(seconds)}
    return {"role": role, "measure": measure, "seconds": seconds, "skipped": skipped, **figures}


CASES = [
    case("base", "prefill", [1.0, 2.0, 4.0]),
    case("model", "prefill", [2.0, 6.0, 16.0]),
    case("base", "decode", [0.5, 0.5, 0.5]),
    case("model", "decode", [0.25, 0.25, 0.5]),
]
METRICS = [
    {"stage": "teacher", "perplexity": 14.368},
    {"stage": "swap", "perplexity": 2186.6},
    {"stage": "attention_transfer", "perplexity": 138.648},
    {"stage": "lora", "perplexity": 36.216},
]
INSPECTION = {"parameters": 1_474_560, "footprints": [{"tokens": 8192, "before": 377_487_360, "after": 11_905_650}]}


def test_all_causal_recipes_are_measured_and_no_others(causal: list[str], model: Path) -> None:
    left_out = set(list_recipes()) - set(causal)
    assert left_out >= {"agent", "hedgehog-encoder", "hedgehog-vision", "lolcats-vision", "quickstart"}
    methods = {rule.method for name in causal for rule in load_recipe(name).attention}
    # Rules that name heads, of a file about the model, make layers of `by_head`.
    for method in set(available()) - methods - {"softmax", "by_head"}:
        users = [
            recipe
            for recipe in map(load_recipe, list_recipes())
            if method in [rule.method for rule in recipe.attention]
        ]
        assert users
        for recipe in users:
            # Of layers that this small model does not have.
            beyond = any(rule.selector.layers_needed > 5 for rule in recipe.attention)
            assert beyond or recipe.rewrite or not inspect_model(str(model), recipe=recipe).num_converted


def test_stages_share_the_tokens(script: ModuleType, causal: list[str], tmp_path: Path) -> None:
    files = tmp_path / "train.jsonl", tmp_path / "text.txt"
    for name in causal:
        as_shipped = load_recipe(name)
        stages = as_shipped.stages
        recipe = load_recipe(name, script.changes(len(stages), 20_480, *files))
        assert recipe.evaluate is not None
        assert (recipe.evaluate.tokens, recipe.evaluate.context) == (5_120, 1_024)
        assert recipe.attention == as_shipped.attention
        for stage, shipped in zip(recipe.stages, stages, strict=True):
            changed = {"steps", "tokens", "sequence_length", "batch_size", "precision"}
            assert stage.model_dump(exclude=changed) == shipped.model_dump(exclude=changed)
            assert (stage.tokens, stage.sequence_length) == (20_480 // len(stages), 512)
            assert (stage.batch_size, stage.precision) == (1, "bf16")
        assert (recipe.data is None) == (not stages)


def test_a_row_holds_ratios_of_turns(script: ModuleType) -> None:
    row = script.row_of(INSPECTION, METRICS, CASES)
    assert (row["parameters"], row["state_bytes"], row["base_state_bytes"]) == (1_474_560, 11_905_650, 377_487_360)
    assert row["prefill"]["ratio"] == {"low": 2.5, "median": 3.0, "high": 3.5}
    assert row["prefill"]["model"] == {"median": 6.0, "low": 2.0, "high": 16.0}
    assert row["decode"]["ratio"] == {"low": 0.5, "median": 0.5, "high": 0.75}
    assert row["stages"] == METRICS


def test_a_time_that_was_left_out_is_no_row(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="out of memory"):
        script.row_of(INSPECTION, METRICS, [*CASES[1:], case("base", "prefill", [0.0], skipped="out of memory")])


def test_an_interrupted_run_goes_on(script: ModuleType, tmp_path: Path) -> None:
    kept, settings, asked = tmp_path / "rows.partial", {"tokens": 1}, []

    def measured(name: str) -> dict[str, Any]:
        asked.append(name)
        if name == "lolcats" and len(asked) == 2:
            raise KeyboardInterrupt
        return {"name": name}

    names = ["sliding-window", "lolcats", "linear"]
    with pytest.raises(KeyboardInterrupt):
        script.collect(names, settings, kept, measured)
    rows = script.collect(names, settings, kept, measured)
    assert rows == {name: {"name": name} for name in names}
    assert asked == ["sliding-window", "lolcats", "lolcats", "linear"]
    script.collect(["linear"], {"tokens": 2}, kept, measured)
    assert asked[4:] == ["linear"]


def test_one_that_fails_leaves_the_others_to_be_measured(script: ModuleType, tmp_path: Path) -> None:
    broken = True

    def measured(name: str) -> dict[str, Any]:
        if broken and name == "linear":
            sys.exit("broken")
        return {"name": name}

    kept = tmp_path / "rows.partial"
    with pytest.raises(SystemExit, match="linear: broken"):
        script.collect(["linear", "lolcats"], {}, kept, measured)
    (entry,) = [json.loads(row) for row in kept.read_text(encoding="utf-8").splitlines()]
    assert entry["value"] == {"name": "lolcats"}
    broken = False
    assert set(script.collect(["linear", "lolcats"], {}, kept, measured)) == {"linear", "lolcats"}


def test_the_table(script: ModuleType) -> None:
    rows = {
        "lolcats": script.row_of(INSPECTION, METRICS, CASES),
        "sliding-window": script.row_of({**INSPECTION, "parameters": 0}, METRICS[:2], CASES),
    }
    document = {
        "hardware": {"cpu": "a CPU"},
        "settings": {
            "model": "small",
            "dtype": "float32",
            "threads": 2,
            "tokens": 20_480,
            "length": 2_048,
            "state_tokens": 8_192,
            "evaluate": {"tokens": 5_120, "context": 1_024},
        },
        "results": {"rows": rows},
    }
    explanation, table = script.markdown(document, "method_table-1.json").split("\n\n")
    assert "20,480 tokens" in explanation
    assert "(benchmarks/results/method_table-1.json)" in explanation
    header, rule, *lines = table.splitlines()
    assert "state at 8,192 tokens | prefill of 2,048 tokens" in header
    assert {len(re.findall(r"\|", row)) for row in (header, rule, *lines)} == {8}
    assert lines == [
        "| the base, softmax | 0 | 360.0 MiB | 1 | 1 | 14.37 | – |",
        "| `lolcats` | 1,474,560 | 11.4 MiB | 3.00 (2.50-3.50) | 0.50 (0.50-0.75) | 2,187 | 36.22 |",
        "| `sliding-window` | 0 | 11.4 MiB | 3.00 (2.50-3.50) | 0.50 (0.50-0.75) | 2,187 | not trained |",
    ]


def test_the_block_in_the_readme(script: ModuleType, repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    once = script.with_block(readme, r"first \1 table")
    assert once.index(script.AFTER) < once.index(script.BEGIN) < once.index("## Questions")
    assert r"first \1 table" in once
    again = script.with_block(once, "second table")
    assert again == once.replace(r"first \1 table", "second table")
