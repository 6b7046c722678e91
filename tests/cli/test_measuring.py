"""From a conversion to its report, as a user goes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from attnconv.recipes import load_recipe

Run = Callable[..., Result]

SUITE = """
tasks:
  tale: {kind: perplexity, data: book, tokens: 512, context: 256, buckets: [128]}
  piqa: {kind: multiple_choice, limit: 6}
  agreement: {kind: agreement, tokens: 256, context: 128}
  fidelity: {kind: fidelity, windows: 1, context: 64}
"""


@pytest.fixture(scope="module")
def folders(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two conversions that need no training."""
    from attnconv import run_conversion

    parent = tmp_path_factory.mktemp("conversions")
    for window in (16, 64):
        changes = [f"attention.0.options.window={window}"]
        run_conversion(teacher, load_recipe("sliding-window", changes), parent / f"window-{window}")
    return sorted(parent.iterdir())


def test_the_way_to_a_report(
    run: Run, teacher: str, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(SUITE)
    for folder in folders:
        evaluated = run("eval", folder, "--against", teacher, "--suite", suite)
        assert evaluated.exit_code == 0, evaluated.stderr
        assert f"Next: attnconv report {folder}" in evaluated.stdout
        assert "attention KL" in evaluated.stdout
    lengths = ["--contexts", "64,128", "--training-contexts", "", "--repeats", "1", "--decode-tokens", "2"]
    timed = run("bench", folders[0], "--against", teacher, *lengths)
    assert timed.exit_code == 0, timed.stderr
    assert "prefill" in timed.stdout
    assert "decode" in timed.stdout
    assert "peak memory is above the weights" in timed.stdout
    # Pictures take as long as all else, and are looked at where reports are.
    monkeypatch.setattr("attnconv.evaluate.report.markdown.to_png", lambda figure: b"")
    reported = run("report", folders[0])
    assert reported.exit_code == 0, reported.stderr
    assert {path.name for path in (folders[0] / "results").iterdir()} >= {
        "eval.json",
        "bench.json",
        "report.html",
        "report.md",
    }
    assert "results/report.md" in (folders[0] / "README.md").read_text()
    page = tmp_path / "compare.html"
    compared = run("compare", *folders, "--output", page)
    assert compared.exit_code == 0, compared.stderr
    assert "window-16" in compared.stdout
    assert "tale: perplexity" in compared.stdout
    assert page.is_file()
    document = json.loads(run("compare", *folders, "--output", page, "--json").stdout)
    assert [row["name"] for row in document["rows"]] == ["stories260K", "window-16", "window-64"]


def test_bench_as_json(run: Run, teacher: str, tmp_path: Path) -> None:
    arguments = ["--contexts", "32", "--repeats", "1", "--decode-tokens", "1", "--output", tmp_path, "--json"]
    document = json.loads(run("bench", teacher, *arguments).stdout)
    assert document["settings"]["contexts"] == [32]
    assert {case["measure"] for case in document["cases"]} == {"prefill", "decode"}


@pytest.mark.slow
def test_diagnosing(run: Run, teacher: str, tmp_path: Path) -> None:
    recipe, picture = tmp_path / "advised.yaml", tmp_path / "heads.png"
    done = run("diagnose", teacher, "--tokens", "512", "-o", recipe, "--picture", picture)
    assert done.exit_code == 0, done.stderr
    assert "Why:" in done.stdout
    assert load_recipe(recipe).name == "advised"
    assert picture.read_bytes().startswith(b"\x89PNG")
    document = json.loads(run("diagnose", teacher, "--tokens", "512", "--json").stdout)
    assert len(document["layers"]) == len(document["advice"]) == 5
    planned = run("inspect", teacher, "--recipe", recipe)
    assert planned.exit_code == 0, planned.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "m", "--contexts", "12,many"], "12,many"),
        (["bench", "m", "--batches", "0"], "above 0"),
        (["bench", "m", "--repeats", "0"], "repeats"),
        (["inspect", "m", "--diagnose", "book"], "--diagnose"),
        (["diagnose", "m", "--tokens", "1"], "tokens"),
        (["eval", "m", "--batch-size", "0"], "batch-size"),
        (["report"], "DIR"),
    ],
)
def test_wrong_usage(run: Run, arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "{teacher}", "--suite", "standart"], "standard"),
        (["eval", "{teacher}", "--device", "cuda:99"], "CUDA"),
        (["bench", "./none"], "./none"),
        (["report", "./missing"], "missing"),
        (["compare", "{teacher}"], "neither a conversion nor measurements"),
        (["diagnose", "{teacher}", "--text", "none.txt"], "none.txt"),
    ],
)
def test_failures_take_one_line(run: Run, teacher: str, tmp_path: Path, arguments: list[str], words: str) -> None:
    result = run("-q", *(argument.format(teacher=teacher) for argument in arguments))
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("Error: ")
