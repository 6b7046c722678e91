"""Fixtures of the tests of whole runs: a copy of the packaged model, a text, and a recipe that takes a moment."""

import shutil

import pytest

from attnconv.recipes import load_recipe
from attnconv.runs import conversion, embedded_model_path

RECIPE = """
name: moment
attention: [{layers: all, method: hedgehog}]
data: {path: %s}
stages: [{kind: attention_transfer, steps: 2, sequence_length: 16, learning_rate: 1.0e-3}]
"""


@pytest.fixture
def base(tmp_path):
    """A copy of the packaged model that a test may damage."""
    return shutil.copytree(embedded_model_path(), tmp_path / "base")


@pytest.fixture
def text(tmp_path):
    """Training text that a test may change."""
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a cat who liked to sing.\n\n" * 20)
    return path


@pytest.fixture
def recipe(tmp_path, text):
    """Loads the recipe with changes."""
    path = tmp_path / "moment.yaml"
    path.write_text(RECIPE % text)
    return lambda *changes: load_recipe(str(path), changes)


class ReachedError(Exception):
    """The run came to its healing."""


@pytest.fixture
def reach_healing(monkeypatch):
    """Ends every run where its healing would begin."""

    def stop(run, prepare):
        raise ReachedError

    monkeypatch.setattr(conversion.WorkFolder, "remove_if_empty", lambda folder: None)
    monkeypatch.setattr(conversion, "heal", stop)
    return ReachedError
