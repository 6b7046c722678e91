"""Scripts that run Triton kernels interpreted, each as one process, and their cases as tests."""

import functools
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, TextIO

import fresh_process
import pytest


def cases_of(script: Path, *, long: Collection[str] = ()) -> list[Any]:
    """Names of the cases that a script defines, without running it; those that take long are left to the long tests."""
    names = re.findall(r'^    "([\w-]+)":', script.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(long) <= set(names)
    return [pytest.param(name, marks=[pytest.mark.slow] if name in long else []) for name in names]


def check(script: Path, case: str) -> None:
    """Compare each quantity's error with what its precision allows."""
    tolerance = {"bf16": 2e-2, "fp16": 2e-3}.get(case.rsplit("-")[-1], 2e-5)
    ask, answers = running(script)
    print(case, file=ask, flush=True)
    line = answers.readline()
    assert line, f"{script.name} ended by itself"
    found = json.loads(line)
    assert not isinstance(found, str), found
    assert found
    assert {name: error for name, error in found.items() if not error < tolerance} == {}


def interpreted(*arguments: str | Path) -> str:
    """What Python prints when it is called with these; the code may import what lies beside this file."""
    return fresh_process.run(*arguments, env=_environment(), check=True, interpreted=True).stdout


@functools.cache
def running(script: Path) -> tuple[TextIO, TextIO]:
    """A script that waits for names of cases; it ends with this process, which closes what leads to it."""
    return fresh_process.talk(script, env=_environment(), interpreted=True)


def _environment() -> dict[str, str]:
    found = os.environ.get("PYTHONPATH")
    paths = os.pathsep.join([str(Path(__file__).parent), *([found] if found else [])])
    return {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
