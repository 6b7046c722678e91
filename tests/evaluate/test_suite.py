from pathlib import Path

import pytest

from attnconv.errors import DataError
from attnconv.evaluate.engine.suite import Suite, list_suites, load_suite
from attnconv.evaluate.tasks.base import make_task
from attnconv.evaluate.tasks.packaged import packaged_names


@pytest.mark.parametrize("name", list_suites())
def test_shipped_suites_need_nothing_but_the_package(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite.description
    for settings in suite.tasks.values():
        assert make_task(settings).settings is settings
        data = getattr(settings, "data", None)
        assert data is None or data in packaged_names()


def test_the_shipped_suites() -> None:
    assert list_suites() == ["generation", "long", "quick", "standard"]
    assert set(load_suite("quick").tasks) <= set(load_suite("standard").tasks)


def test_a_file_finds_its_data_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("words")
    path = tmp_path / "mine.yaml"
    path.write_text(
        "tasks:\n  own: {kind: perplexity, data: own.txt}\n  book: {kind: perplexity, data: book}\n"
        "  away: {kind: perplexity, data: /elsewhere/x.txt}\n"
    )
    suite = load_suite(path)
    assert suite.name == "mine"
    assert [task.data for task in suite.tasks.values()] == [str(tmp_path / "own.txt"), "book", "/elsewhere/x.txt"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: {a: {kind: perplexity, data: book, tokenz: 3}}", "tasks.a.tokenz: unknown key; did you mean 'tokens'"),
        ("tasks: {a: {kind: perplexitty}}", "did you mean 'perplexity'"),
        ("tasks: {a: {data: book}}", "tasks.a.kind: this key is required"),
        ("tasks: {}", "tasks"),
        ("task: {}", "did you mean 'tasks'"),
        ("- 1", "suite"),
        ("tasks: {a: {kind: perplexity, tokens: 0}, b: {kind: retrieval, samples: 0}}", "has 2 problems"),
        ("tasks: [", "no valid YAML"),
    ],
)
def test_what_is_wrong_is_said_at_once(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=said.replace(".", r"\.")):
        load_suite(path)


@pytest.mark.parametrize("name", ["standart", "none.yaml", "."])
def test_unknown_suites(name: str) -> None:
    with pytest.raises(DataError, match=r"no evaluation suite.*YAML"):
        load_suite(name)


def test_settings_survive_json() -> None:
    suite = load_suite("standard")
    assert Suite.model_validate(suite.model_dump(mode="json")) == suite
