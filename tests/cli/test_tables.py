"""Tables in narrow terminals: every column and every number is there, whatever the width."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from attnconv.commands import results
from attnconv.evaluate.bench import BenchResult
from attnconv.evaluate.bench.schema import BenchmarkFile
from attnconv.evaluate.engine.running import Evaluation
from attnconv.evaluate.engine.schema import EvaluationFile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from fake_results import benchmark, evaluation, model_row

MODEL = model_row("a", converted=True, digest="1")
BASE = model_row("b", converted=False, digest="2")


@pytest.fixture(params=[80, 95, 110, 200])
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal of some width, which remembers what was printed."""
    console = Console(width=request.param, force_terminal=True, color_system=None, record=True, markup=False)
    monkeypatch.setattr(results, "make_console", lambda: console)
    return console


def test_bench_keeps_its_first_column_and_its_numbers(terminal: Console, capsys: pytest.CaptureFixture[str]) -> None:
    document = benchmark(MODEL, BASE)
    document["cases"] = [case for case in document["cases"] if case["skipped"] is None]
    results.show_bench(BenchResult(BenchmarkFile.model_validate(document), Path("bench.json")))
    lines = terminal.export_text(clear=False).splitlines()
    assert max(map(len, lines)) <= terminal.width
    # Decoding holds what the prompt before it does, so its memory is not said twice.
    for measure, count in (("prefill", 10), ("decode", 5), ("transfer", 6)):
        assert sum(line.startswith(f"{measure} ") for line in lines) == count
    row = next(" ".join(line.split()[2:]) for line in lines if line.split()[:2] == ["prefill", "8,192"])
    assert row == "17.8 s [17.45-18.34] 5.461 s [5.352-5.625] 3.26 x"
    assert {"tokens", "speed-up", "base's"} <= set(terminal.export_text().split())


def test_eval_keeps_its_figures(terminal: Console, capsys: pytest.CaptureFixture[str]) -> None:
    document = evaluation(MODEL, BASE)
    found = EvaluationFile.model_validate(document)
    results.show_evaluation(Evaluation(found, Path("x/eval.json"), tuple(found.tasks), {}))
    lines = terminal.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= max(terminal.width, 80)
    assert all(any(line.startswith(name) for line in lines) for name in document["tasks"])


def test_diagnose_breaks_no_name_of_a_method(terminal: Console, capsys: pytest.CaptureFixture[str]) -> None:
    head = SimpleNamespace(window_90=210, induction=0.01)
    layer = SimpleNamespace(index=0, role_counts={"local": 3, "global": 5}, heads=[head], mean=lambda name: 23.0)
    shown = SimpleNamespace(layers=[layer], tokens=512, text="book", context=512, role_counts={"local": 3, "global": 5})
    advice = SimpleNamespace(layer=0, method="sliding_window", options={"window": 64}, reason="so")
    results.show_diagnosis(shown, [advice])
    table = terminal.export_text().split("512 tokens")[0]
    assert "sliding_window" in table
    assert {"3", "local,", "global", "210"} <= set(table.split())
