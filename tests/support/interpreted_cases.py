"""Scripts that run Triton kernels interpreted, each as one process, and their cases as tests."""

import functools
import json
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
    found = measured(script)[case]
    assert found
    assert {name: error for name, error in found.items() if not error < tolerance} == {}


@functools.cache
def measured(script: Path) -> dict[str, dict[str, float]]:
    """What a script prints: for each case, errors by quantity."""
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found
