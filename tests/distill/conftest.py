"""Fixtures of the healing tests: the packaged model, converted, and stages that last a moment."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnconv.convert import convert_model
from attnconv.distill.batches import Batch
from attnconv.distill.trainee import Trainee
from attnconv.packaged.model import embedded_model_path, embedded_tokens


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model_path())


@pytest.fixture
def make_trainee():
    """A trainee of the packaged model; all its attention becomes `method`."""

    def make(method="lolcats", dtype=torch.float32, **options):
        if method == "lolcats":
            options = {"window": 8, **options}
        model = AutoModelForCausalLM.from_pretrained(embedded_model_path(), dtype=dtype)
        torch.manual_seed(0)
        return Trainee(convert_model(model, method, **options))

    return make


@pytest.fixture(scope="session")
def batch():
    """Three rows of 48 real tokens."""
    return Batch(embedded_tokens("valid")[:3, :48])


@pytest.fixture(scope="session")
def padded_batch(batch):
    """The same rows, of which the first has only 31 real tokens, behind padding, and the last only 40, before it."""
    mask = torch.ones(3, 48, dtype=torch.bool)
    mask[0, :17] = False
    mask[2, 40:] = False
    return Batch(batch.input_ids.masked_fill(~mask, 0), mask)


@pytest.fixture(scope="session")
def single_rows(padded_batch):
    """The rows of `padded_batch`, each alone and without its padding."""
    return [Batch(ids[mask][None]) for ids, mask in zip(padded_batch.input_ids, padded_batch.padding_mask, strict=True)]
