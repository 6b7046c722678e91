import math
from pathlib import Path

import pytest

from attnconv.errors import OutputError
from attnconv.evaluate.engine.journal import Journal


def test_it_keeps_what_was_added(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "eval.partial"
    with Journal(path) as journal:
        assert "a" not in journal
        assert not path.parent.exists()
        journal.add("a", {"x": [1, math.nan]})
        assert journal["a"] == {"x": [1, None]}
    with Journal(path) as again:
        assert "a" in again
        again.add("b", 2)
    assert Journal(path).entries == {"a": {"x": [1, None]}, "b": 2}


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "eval.partial"
    with Journal(path) as journal:
        journal.add("a", 1)
    with path.open("a") as file:
        file.write('{"key": "b", "val')
    with Journal(path) as journal:
        assert journal.entries == {"a": 1}
        journal.add("c", 3)
    assert Journal(path).entries == {"a": 1, "c": 3}


def test_removing(tmp_path: Path) -> None:
    path = tmp_path / "eval.partial"
    with Journal(path) as journal:
        journal.add("a", 1)
        journal.remove()
        assert not path.exists()
        assert "a" not in journal
        journal.add("b", 1)
    assert Journal(path).entries == {"b": 1}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Journal(tmp_path / "file" / "eval.partial") as journal, pytest.raises(OutputError, match="cannot be written"):
        journal.add("a", 1)


def test_a_damaged_line_is_measured_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "eval.partial"
    path.write_bytes(b'{"key": "a", "value": 1}\n{"key": "b"\n[1]\n{"key": "c"}\n"\xff\n{"key": "d", "value": 2}\n')
    with Journal(path) as journal:
        assert journal.entries == {"a": 1, "d": 2}
        journal.add("b", 3)
    assert caplog.text.count("measured again") == 4
    assert Journal(path).entries == {"a": 1, "b": 3, "d": 2}


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "eval.partial"
    with Journal(path) as journal:
        journal.add("a", 1)
        with pytest.raises(OutputError, match="Another run is measuring"), Journal(path):
            pass
        journal.add("b", 2)
    with Journal(path) as again:
        assert again.entries == {"a": 1, "b": 2}
