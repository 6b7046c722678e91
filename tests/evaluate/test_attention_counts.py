"""Evaluations and benchmarks count what converted layers do, and refuse a model whose layers do something else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnconv import convert_model
from attnconv.attention_modules.counts import AttentionCounts
from attnconv.attention_modules.sparse.sliding_window import SlidingWindowAttention
from attnconv.commands import results
from attnconv.errors import PlanError
from attnconv.evaluate.bench import run_bench
from attnconv.evaluate.bench.cases import Case
from attnconv.evaluate.engine.running import run_evaluation
from attnconv.evaluate.engine.suite import Suite
from attnconv.evaluate.report import compare_conversions
from attnconv.evaluate.report.attention_part import attention_section
from attnconv.evaluate.report.gathering import gather
from attnconv.packaged.model import embedded_model_path

BASE = str(embedded_model_path())
SUITE = Suite.model_validate({"name": "tiny", "tasks": {"book": {"kind": "perplexity", "tokens": 64, "context": 64}}})
QUICK: dict[str, Any] = {"contexts": (16, 40), "repeats": 1, "decode_tokens": 1, "training_contexts": ()}


def converted(folder: Path, window: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    convert_model(model, "sliding_window", window=window, num_sinks=0).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return str(folder)


def seen(tokens: int, window: int) -> int:
    """Tokens that all queries of a text look at together."""
    return sum(min(place, window) for place in range(1, tokens + 1))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Results of conversions by their windows."""
    folders = {window: tmp_path_factory.mktemp(f"window-{window}") for window in (8, 16)}
    for window, folder in folders.items():
        model = converted(folder / "model", window)
        run_evaluation(model, SUITE, against=BASE, device="cpu", output=folder)
    run_bench(str(folders[8] / "model"), device="cpu", output=folders[8], **QUICK)
    return folders


def test_an_evaluation_counts_the_model_and_not_its_base(measured: dict[int, Path]) -> None:
    for window, folder in measured.items():
        document = json.loads((folder / "eval.json").read_text())
        assert list(document["attention"]) == ["model"]
        found = document["attention"]["model"]
        assert (found["text"], found["tokens"], len(found["layers"])) == ("book", 512, 5)
        assert {layer["exact_pairs"] for layer in found["layers"].values()} == {seen(512, window)}
        assert found["total"]["density"] == pytest.approx(seen(512, window) / (512 * 513 / 2))


def test_a_benchmark_counts_each_case_once(measured: dict[int, Path]) -> None:
    document = json.loads((measured[8] / "bench.json").read_text())
    found = {(case["measure"], case["context"]): case["attention"] for case in document["cases"]}
    assert {key: counts["total"]["exact_pairs"] for key, counts in found.items()} == {
        ("prefill", 16): 5 * seen(16, 8),
        ("prefill", 40): 5 * seen(40, 8),
        ("decode", 16): 5 * 8,
        ("decode", 40): 5 * 8,
    }
    assert all(layer["calls"] == 1 for counts in found.values() for layer in counts["layers"].values())
    assert set(found["prefill", 16]["layers"]) == {f"model.layers.{number}.self_attn" for number in range(5)}
    for case in document["cases"]:
        assert Case.from_dict(case).to_dict() == case


def test_the_terminal_has_a_line_of_it(
    measured: dict[int, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(results, "make_console", lambda: Console(width=300))
    results.show_evaluation(run_evaluation(str(measured[8] / "model"), SUITE, device="cpu", output=tmp_path))
    results.show_bench(run_bench(str(measured[8] / "model"), device="cpu", output=tmp_path, **QUICK))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("attention")]
    assert lines[0].startswith("attention: at 512 tokens 3.1% of each query's tokens one by one (7.945), 0.0310 x the")
    assert lines[1].startswith(
        "attention, prefill: at 40 tokens 35.6% of each query's tokens one by one (7.3), 0.356 x"
    )
    assert "a state of " in lines[2]


def test_reports_and_comparisons_have_a_part_of_it(measured: dict[int, Path], tmp_path: Path) -> None:
    section = attention_section(gather(measured[8]))
    assert section is not None
    tables = [block for block in section.blocks if block.kind == "table"]
    assert [len(table.rows) for table in tables] == [6, 4]
    compared = compare_conversions(list(measured.values()), output=tmp_path / "compare.html")
    assert compared.columns[-1].label == "tokens attended one by one, at 512"
    shares = {row.name: row.values["density"].value for row in compared.rows if row.folder is not None}
    assert sorted(shares.values()) == [pytest.approx(seen(512, window) / (512 * 513 / 2)) for window in (8, 16)]


def test_a_model_without_converted_layers_has_no_counts(tmp_path: Path) -> None:
    evaluation = run_evaluation(BASE, SUITE, device="cpu", output=tmp_path)
    assert evaluation.document["attention"] == {}
    assert attention_section(gather(tmp_path)) is None


def test_what_computes_dense_attention_is_not_measured(
    measured: dict[int, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def dense(self: SlidingWindowAttention, call: Any, memory: Any) -> torch.Tensor:
        groups, tokens = self.geometry.num_groups, call.tokens
        keys, values = (t.repeat_interleave(groups, 1) for t in (tokens.keys, tokens.values))
        return F.scaled_dot_product_attention(call.query, keys, values, is_causal=True, scale=call.scaling)

    monkeypatch.setattr(SlidingWindowAttention, "attend_torch", dense)
    model = str(measured[8] / "model")
    with pytest.raises(PlanError, match="5 of 5 layers .* compute dense softmax attention"):
        run_evaluation(model, SUITE, device="cpu", output=tmp_path)
    with pytest.raises(PlanError, match="5 of 5 layers .* compute dense softmax attention"):
        run_bench(model, device="cpu", output=tmp_path, **QUICK)


def test_counts_are_read_as_they_are_written() -> None:
    counts = AttentionCounts(3, {})
    assert AttentionCounts.from_dict(counts.to_dict()) == counts
    assert counts.total.density == 0
