import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from attnconv.convert.reading.checkpoint import open_checkpoint
from attnconv.errors import DataError, OutputError
from attnconv.evaluate.bench.schema import BenchmarkFile
from attnconv.evaluate.engine.results import (
    describe_model,
    describe_setup,
    read_results,
    results_folder,
    results_path,
    write_results,
)
from attnconv.evaluate.engine.schema import EvaluationFile, MeasuredModel, ResultsFile, TaskResult


def test_where_results_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted, plain = tmp_path / "converted", tmp_path / "plain"
    for folder in (converted, plain):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    (converted / "receipt.json").write_text('{"tool": "attnconv"}')
    assert results_folder(converted) == converted / "results"
    assert results_folder(plain) == Path("results/plain")
    assert results_folder("org/some-model") == Path("results/some-model")
    assert results_folder("model.Q4_K.gguf") == Path("results/model.Q4_K.gguf")
    assert results_folder("..") == Path("results/model")
    assert results_folder(converted, tmp_path / "x") == tmp_path / "x"


def test_writing_and_reading(tmp_path: Path) -> None:
    assert read_results(tmp_path, EvaluationFile) is None
    results = EvaluationFile(
        model=MeasuredModel(), tasks={"a": TaskResult(kind="perplexity", seconds={"model": float("inf")})}
    )
    path = write_results(tmp_path / "new", results)
    assert read_results(tmp_path / "new", EvaluationFile) == results
    written = json.loads(path.read_text())
    assert (written["tool"], written["version"], written["kind"]) == ("attnconv", 1, "eval")
    assert written["tasks"]["a"]["seconds"] == {"model": None}
    assert [entry.name for entry in path.parent.iterdir()] == ["eval.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "measure again"),
        ('{"tool": "other"}', "no such file by attnconv"),
        ('{"tool": "attnconv", "kind": "bench"}', "no such file by attnconv"),
        ('{"tool": "attnconv", "kind": "eval", "version": 99}', "newer version"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "eval.json").write_text(content)
    with pytest.raises(DataError, match=said):
        read_results(tmp_path, EvaluationFile)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_results(tmp_path / "file", EvaluationFile(model=MeasuredModel(), tasks={}))


def test_descriptions(repository: Path) -> None:
    folder = repository / "packaged" / "assets" / "stories260K"
    about = describe_model(open_checkpoint(folder), torch.bfloat16)
    assert (about.name, about.model_type, about.dtype, about.converted) == (
        "stories260K",
        "llama",
        "bfloat16",
        False,
    )
    assert list(about.digests) == ["model.safetensors"]
    setup = describe_setup(torch.device("cpu"))
    assert setup.cores == os.cpu_count()
    assert setup.versions["torch"] == torch.__version__
    json.dumps([about.plain(), setup.plain()])


@pytest.mark.parametrize("kind", [EvaluationFile, BenchmarkFile])
def test_a_file_without_its_figures_is_damaged(tmp_path: Path, kind: type[ResultsFile]) -> None:
    head = {"tool": "attnconv", "version": 1, "kind": kind.model_fields["kind"].default, "model": {}}
    results_path(tmp_path, kind).write_text(json.dumps(head))
    with pytest.raises(DataError, match="is damaged.*measure again"):
        read_results(tmp_path, kind)


def test_another_configuration_is_another_model(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "packaged" / "assets" / "stories260K", tmp_path / "model")
    before = describe_model(open_checkpoint(tmp_path / "model"), torch.float32)
    assert before.identity == MeasuredModel.model_validate(json.loads(json.dumps(before.plain()))).identity
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("{", '{"rope_theta": 5000.0,', 1))
    after = describe_model(open_checkpoint(tmp_path / "model"), torch.float32)
    assert before.digests == after.digests
    assert before.identity != after.identity
