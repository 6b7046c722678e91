"""Damaged input of every kind ends in one sentence of ours: no Python error, no hang, no dense model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Run = Callable[..., Result]


@pytest.fixture
def base(teacher: str, tmp_path: Path) -> Path:
    return shutil.copytree(teacher, tmp_path / "base")


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("layers", [10**9, 10**30])
def test_more_layers_than_can_be_built(run: Run, base: Path, layers: int) -> None:
    edit(base, num_hidden_layers=layers)
    result = run("inspect", base)
    assert result.exit_code == 1
    assert f"it sets num_hidden_layers to {layers}, more than any model has" in result.stderr
