"""Fixtures of the attention modules' tests."""

from collections.abc import Iterator

import pytest
import torch
from invariants import LONG, with_segments


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `invariants.SHORTER` tokens more than what any method handles at a time."""
    for module in with_segments():
        assert 2 * module.SEGMENT < LONG
        monkeypatch.setattr(module, "SEGMENT", 128)


@pytest.fixture(params=[True, False], ids=["grad", "no-grad"])
def grad_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled(request.param):
        yield
