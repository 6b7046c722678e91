"""A module that answers without running, so that what comes behind it can run alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def answering(module: nn.Module, output: object) -> Iterator[None]:
    """Within the context the module answers every call with `output`, untouched by its hooks' arguments."""
    own = module.__dict__.get("forward")

    def answer(*_: Any, **__: Any) -> object:
        return output

    module.forward = answer
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
