"""Fixtures of the healing tests: the packaged model and its tokenizer."""

import pytest
from attnconv.distill.embedded import embedded_model_path
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_path())
