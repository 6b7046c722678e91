"""The command line in this process, with nothing left behind in it."""

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from attnconv.cli import app


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line sets what a process logs and warns; the next test shall not notice."""
    logger = logging.getLogger("attnconv")
    level, handlers, verbosity = logger.level, logger.handlers, transformers_logging.get_verbosity()
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setenv("COLUMNS", "80")
    yield
    logger.setLevel(level)
    logger.handlers = handlers
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


@pytest.fixture
def run() -> Callable[..., Result]:
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def teacher(repository: Path) -> str:
    return str(repository / "packaged" / "assets" / "stories260K")
