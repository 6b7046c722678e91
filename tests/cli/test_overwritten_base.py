"""A base that shares its weights with a conversion as hard links, and is overwritten in place."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from attnconv.files import fast_copy

Run = Callable[..., Result]
SENTENCE = "model-00001-of-00002.safetensors in {} no longer holds the weights that were converted: it is a hard link"


@pytest.fixture
def base(teacher: str, tmp_path: Path) -> Path:
    return shutil.copytree(teacher, tmp_path / "base")


@pytest.fixture
def linked(run: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fast_copy, "_clone", lambda source, target: False)
    result = run("-q", "convert", base, "--recipe", "sliding-window", "--output", tmp_path / "out")
    assert "linked to the base's" in " ".join(result.stdout.split())
    return tmp_path / "out"


def overwrite_in_place(file: Path) -> None:
    """As `cp new base/model.safetensors` does with weights of the same shapes."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as opened:
        opened.write(content)


def test_eval_bench_and_push_refuse_and_inspect_reports(run: Run, linked: Path, base: Path) -> None:
    overwrite_in_place(base / "model.safetensors")
    for command in (("eval", linked), ("bench", linked), ("push", linked, "user/model"), ("inspect", linked)):
        result = run("-q", *command)
        assert result.exit_code == 1, command
        assert SENTENCE.format(linked) in result.stderr, command
    assert "converted already" in run("inspect", linked).stdout
    assert SENTENCE.format(linked) in json.loads(run("inspect", linked, "--json").stdout)["overwritten"]


def test_a_push_reads_what_size_and_time_do_not_tell(run: Run, linked: Path, base: Path) -> None:
    times = (base / "model.safetensors").stat()
    overwrite_in_place(base / "model.safetensors")
    os.utime(base / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run("-q", "inspect", linked).exit_code == 0
    assert SENTENCE.format(linked) in run("-q", "push", linked, "user/model").stderr


def test_another_time_alone_says_nothing(run: Run, linked: Path, base: Path) -> None:
    os.utime(base / "model.safetensors", (0, 0))
    assert run("-q", "inspect", linked).exit_code == 0


@pytest.mark.parametrize("links", [3, ["a"], {"../config.json": {"digest": "x"}, "gone": {}, "config.json": 1}])
def test_a_damaged_receipt_does_not_stop_an_inspection(run: Run, linked: Path, links: object) -> None:
    receipt = json.loads((linked / "receipt.json").read_text())
    (linked / "receipt.json").write_text(json.dumps({**receipt, "links": links}))
    assert run("-q", "inspect", linked).exit_code == 0


def test_a_base_that_is_replaced_leaves_the_conversion_alone(run: Run, linked: Path, base: Path) -> None:
    shutil.copyfile(base / "model.safetensors", base / "new")
    overwrite_in_place(base / "new")
    os.replace(base / "new", base / "model.safetensors")
    assert run("-q", "inspect", linked).exit_code == 0
