"""`attnconv.sparse`: another attention for a while, and then the model is what it was."""

import pytest
import torch
from tiny_models import tiny_llama

import attnconv
from attnconv.attention_modules.counting import counting
from attnconv.errors import PlanError


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("xattention", {"block": 4, "stride": 2, "density": 0.3}),
        ("quest", {"block": 4, "budget": 8}),
        ("sliding_window", {"window": 5}),
    ],
)
def test_inside_the_method_runs_and_afterwards_all_is_as_before(method, options):
    model = tiny_llama().eval()
    tokens = torch.arange(40)[None] % model.config.vocab_size
    names, config = list(model.state_dict()), model.config.to_dict()
    with torch.no_grad():
        before = model(tokens).logits
        written = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
        with attnconv.sparse(model, method, **options) as same:
            assert same is model
            with counting(model) as counter:
                inside = model(tokens).logits
            assert 0 < counter.total.density < 0.9
            model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
        after = model(tokens).logits
        again = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert not torch.equal(inside, before)
    assert torch.equal(after, before)
    assert torch.equal(again, written)
    assert list(model.state_dict()) == names
    assert model.config.to_dict() == config
    assert not any(name.startswith("_attnconv") for module in model.modules() for name in vars(module))


def test_the_model_is_given_back_after_an_error_and_converted_ones_are_refused():
    model = tiny_llama().eval()
    with pytest.raises(KeyError), attnconv.sparse(model, "quest"):
        raise KeyError
    nearest = pytest.raises(ValueError, match="unknown attention method 'qest'; did you mean 'quest'")
    with nearest, attnconv.sparse(model, "qest"):
        raise AssertionError
    attnconv.convert_model(model, "quest")
    with pytest.raises(PlanError, match="converted already"), attnconv.sparse(model, "quest"):
        raise AssertionError
