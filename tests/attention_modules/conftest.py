"""Fixtures of the attention modules' tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=[True, False], ids=["grad", "no-grad"])
def grad_mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled(request.param):
        yield
