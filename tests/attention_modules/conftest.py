"""Fixtures of the attention modules' tests."""

from collections.abc import Iterator

import pytest
import torch
from invariants import LONG, Row, leads, with_segments

# What further options of a method leave to the long tests: parameters of tests by name, and the values meant.
LONG_TESTS: dict[str, tuple[object, ...]] = {"grad_mode": (True,), "dtype": (torch.float32,), "seed": (1, 2)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them before those that are not asked for are left out."""
    for item in items:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        row = given.get("row")
        is_long = any(name in given and given[name] in values for name, values in LONG_TESTS.items())
        if is_long and isinstance(row, Row) and not leads(row):
            item.add_marker(pytest.mark.slow)


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
