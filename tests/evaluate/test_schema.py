"""What reports read are the classes that measurements and runs write, and lines are read in one way."""

import ast
import json
import math
from pathlib import Path

import pytest

import attnconv
from attnconv.convert.writing.receipt import Receipt, read_receipt, write_receipt
from attnconv.distill.metrics import MetricsFile, Record
from attnconv.errors import DataError
from attnconv.evaluate.bench.cases import BASE, PREFILL, Case, Piece
from attnconv.evaluate.bench.schema import BenchmarkFile
from attnconv.evaluate.engine.items import Figure, Metric
from attnconv.evaluate.engine.results import read_results, results_path
from attnconv.evaluate.engine.schema import EvaluationFile, MeasuredModel, TaskResult
from attnconv.evaluate.report.gathering import gather
from attnconv.evaluate.report.page import make_page
from attnconv.files.documents import parse_document
from attnconv.files.json_files import json_text
from attnconv.formats import number

RECORD = Record(0, "lora", 1, 10, 1.5, 1e-3, 0.1, 100.0, {"layer": 0.5})


def parse(kind, value, name):
    return parse_document(kind, value, Path(name), remedy="measure again")


def test_a_case_comes_back_as_it_was_written() -> None:
    case = Case.measured(Piece(PREFILL, 64, 1), BASE, [0.1, 0.2], peak_bytes=None, cache_bytes=12)
    written = BenchmarkFile(model=MeasuredModel(), cases=[case])
    document = json.loads(json_text(written.plain()))
    assert parse(BenchmarkFile, document, "bench.json") == written


def test_metrics_and_figures_come_back_as_they_were_written() -> None:
    metric, figure = Metric("recall", "found", better="higher"), Figure("recall", {"length": 64}, 3, 0.5, (0.25, 0.75))
    document = json.loads(json_text({"kind": "retrieval", "metrics": [vars(metric)], "figures": [vars(figure)]}))
    task = parse(TaskResult, document, "eval.json")
    assert task.metrics == [metric]
    assert task.figures == [figure]


@pytest.mark.parametrize("change", [{"count": "many"}, {"better": "taller"}, {"interval": [1.0]}])
def test_a_damaged_figure_is_an_error(change: dict[str, object]) -> None:
    figure = {**vars(Figure("recall", {}, 3, 0.5)), **change}
    with pytest.raises(DataError, match="figures"):
        parse(TaskResult, {"kind": "retrieval", "figures": [figure]}, "eval.json")


def test_records_come_back_and_half_a_line_is_left_out(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append(RECORD)
    with file.path.open("a", encoding="utf-8") as stream:
        stream.write('{"index": 0, "sta')
    assert list(file.records()) == [RECORD]


def test_a_number_that_is_none_is_shown_as_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({**vars(RECORD), "loss": None}) + "\n", encoding="utf-8")
    (record,) = MetricsFile(path).records()
    assert math.isnan(record.loss)
    assert number(record.loss) == "-"


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(vars(RECORD)) + "\n{half\n", encoding="utf-8")
    with pytest.raises(DataError, match="ine 2"):
        list(MetricsFile(path).records())


# What the first released versions wrote, figures of real runs.
SAMPLES = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["bench_conversion-20261121-153203.json", "bench_conversion-20261121-213717.json"])
def test_old_benchmarks_stay_readable(name: str, tmp_path: Path) -> None:
    old = json.loads((SAMPLES / name).read_text(encoding="utf-8"))
    head = {"tool": "attnconv", "version": 1, "kind": "bench", "model": {"name": "smollm2", "dtype": "float32"}}
    setup = {**old["hardware"], "versions": old["versions"], "time": old["time"]}
    values = (
        head | {"setup": setup, "settings": old["settings"]} | {k: old["results"][k] for k in ("cases", "crossover")}
    )
    results_path(tmp_path, BenchmarkFile).write_text(json.dumps(values), encoding="utf-8")
    read = read_results(tmp_path, BenchmarkFile)
    assert read is not None
    # What came later is as if it had not been measured.
    assert [case.to_dict() for case in read.cases] == [case | {"attention": None} for case in old["results"]["cases"]]
    assert read.settings is not None
    assert read.settings.contexts == (512, 2048, 8192)
    page = make_page(gather(tmp_path))
    assert "speed" in [part.id for part in page.sections]


def test_an_old_evaluation_lacks_what_came_later(tmp_path: Path) -> None:
    task = {"kind": "perplexity", "settings": {"kind": "perplexity"}, "figures": [], "items": {"model": {"ids": ["a"]}}}
    values = {"tool": "attnconv", "version": 1, "kind": "eval", "model": {"name": "m"}, "tasks": {"book": task}}
    results_path(tmp_path, EvaluationFile).write_text(json.dumps(values | {"a key of tomorrow": 1}), encoding="utf-8")
    read = read_results(tmp_path, EvaluationFile)
    assert read is not None
    assert read.tasks["book"].items["model"].ids == ["a"]
    assert read.base is None


def test_a_receipt_is_read_as_it_was_written(tmp_path: Path) -> None:
    receipt = Receipt(source="base", inputs={"a": "b"}, path_use={"window": math.nan}, rewrites=("cast",))
    write_receipt(tmp_path, receipt)
    assert read_receipt(tmp_path) == receipt
    path = tmp_path / "receipt.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(DataError, match="newer version"):
        read_receipt(tmp_path)


def test_reports_declare_no_class_of_a_file() -> None:
    report = Path(attnconv.__file__).parent / "evaluate" / "report"
    for path in report.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            assert not {"BaseModel", "Document", "OwnFile", "ResultsFile"} & set(bases), path
