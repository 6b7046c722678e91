"""Scripts that run Triton kernels interpreted, each as one process, and their cases as tests."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path


def cases_of(script: Path) -> list[str]:
    """Names of the cases that a script defines, without running it."""
    return re.findall(r'^    "([\w-]+)":', script.read_text(encoding="utf-8"), re.MULTILINE)


def check(script: Path, case: str) -> None:
    """Compare each quantity's error with what its precision allows."""
    tolerance = {"bf16": 2e-2, "fp16": 2e-3}.get(case.rsplit("-")[-1], 2e-5)
    process = running(script)
    print(case, file=process.stdin, flush=True)
    line = process.stdout.readline()
    assert line, f"{script.name} ended by itself"
    found = json.loads(line)
    assert not isinstance(found, str), found
    assert found
    assert {name: error for name, error in found.items() if not error < tolerance} == {}


def interpreted(*arguments: str | Path) -> str:
    """What Python prints when it is called with these; the code may import what lies beside this file."""
    done = subprocess.run([sys.executable, *arguments], env=_paths(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def running(script: Path) -> subprocess.Popen[str]:
    """A script that waits for names of cases; it ends with this process, which closes its input."""
    command = [sys.executable, script]
    return subprocess.Popen(command, env=_paths(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _paths() -> dict[str, str]:
    found = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *([found] if found else [])])}
