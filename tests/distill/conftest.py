"""Fixtures of the healing tests: the packaged model and its tokenizer."""

import pytest
from transformers import AutoTokenizer

from attnconv.distill.embedded import embedded_model_path


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_path())
