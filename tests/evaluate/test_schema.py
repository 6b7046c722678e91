"""What reports read are the classes that measurements and runs write, and lines are read in one way."""

import json
import math
from pathlib import Path

import pytest

from attnconv.distill.metrics import MetricsFile, Record
from attnconv.errors import DataError
from attnconv.evaluate.bench.cases import BASE, PREFILL, Case, Piece
from attnconv.evaluate.engine.items import Figure, Metric
from attnconv.evaluate.report.documents import BenchmarkFile, TaskRow, parse, read_records
from attnconv.evaluate.report.formats import number
from attnconv.files.json_files import json_text

RECORD = Record(0, "lora", 1, 10, 1.5, 1e-3, 0.1, 100.0, {"layer": 0.5})


def test_a_case_comes_back_as_it_was_written() -> None:
    case = Case.measured(Piece(PREFILL, 64, 1), BASE, [0.1, 0.2], peak_bytes=None, cache_bytes=12)
    document = json.loads(json_text({"model": {}, "cases": [case.to_dict()]}))
    assert parse(BenchmarkFile, document, Path("bench.json")).cases == [case]


def test_metrics_and_figures_come_back_as_they_were_written() -> None:
    metric, figure = Metric("recall", "found", better="higher"), Figure("recall", {"length": 64}, 3, 0.5, (0.25, 0.75))
    document = json.loads(json_text({"kind": "retrieval", "metrics": [vars(metric)], "figures": [vars(figure)]}))
    task = parse(TaskRow, document, Path("eval.json"))
    assert task.metrics == [metric]
    assert task.figures == [figure]


@pytest.mark.parametrize("change", [{"count": "many"}, {"better": "taller"}, {"interval": [1.0]}])
def test_a_damaged_figure_is_an_error(change: dict[str, object]) -> None:
    figure = {**vars(Figure("recall", {}, 3, 0.5)), **change}
    with pytest.raises(DataError, match="figures"):
        parse(TaskRow, {"kind": "retrieval", "figures": [figure]}, Path("eval.json"))


def test_records_come_back_and_half_a_line_is_left_out(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(RECORD)
    with file.path.open("a", encoding="utf-8") as stream:
        stream.write('{"index": 0, "sta')
    assert read_records(file.path) == list(file.records()) == [RECORD]


def test_a_number_that_is_none_is_shown_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({**vars(RECORD), "loss": None}) + "\n", encoding="utf-8")
    (record,) = read_records(path)
    assert math.isnan(record.loss)
    assert number(record.loss) == "-"


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(vars(RECORD)) + "\n{half\n", encoding="utf-8")
    with pytest.raises(DataError, match="ine 2"):
        read_records(path)
    with pytest.raises(DataError, match="ine 2"):
        list(MetricsFile(path).records())
