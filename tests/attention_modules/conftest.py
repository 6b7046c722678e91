"""Fixtures of the attention modules' tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Rows and draws that several files share are a plain module beside the rooms.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))


@pytest.fixture(params=[True, False], ids=["grad", "no-grad"])
def grad_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled(request.param):
        yield
