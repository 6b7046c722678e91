"""Fixtures of the attention modules' tests."""

from collections.abc import Iterator

import pytest
import torch
from invariants import LONG, Row, leads, with_segments

# What further options of a method leave to the long tests: parameters of tests by name, and the values meant ...
LONG_TESTS: dict[str, tuple[object, ...]] = {"grad_mode": (True,), "dtype": (torch.float32,)}
# ... and whole tests, by name: what they look at is the same code for all options of a method.
LONG_OF_OTHERS = {
    "test_nothing_is_copied_to_the_device_in_a_call",
    "test_bfloat16_weights_keep_an_fp32_state",
    "test_oracle_over_several_segments",
    "test_no_tokens_have_no_output",
    "test_single_tokens_go_on_behind_a_rounded_prompt",
    "test_finite",
}
# What the first options leave to them too where gradients are wanted, with which it takes as long and says little more.
LONG_WITH_GRADIENTS = {"test_nothing_is_copied_to_the_device_in_a_call", "test_bfloat16_weights_keep_an_fp32_state"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them before those that are not asked for are left out."""
    for item in items:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        row = given.get("row")
        if not isinstance(item, pytest.Function) or not isinstance(row, Row):
            continue
        name = item.originalname
        is_long = name in LONG_WITH_GRADIENTS and given.get("grad_mode") is True
        is_long = is_long or row.for_long_tests
        if not leads(row):
            is_long = is_long or name in LONG_OF_OTHERS
            is_long = is_long or any(key in given and given[key] in values for key, values in LONG_TESTS.items())
        if is_long:
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
