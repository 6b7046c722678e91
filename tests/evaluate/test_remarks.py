"""An evaluation whose texts all fit into a model's window says so: it compares softmax with softmax."""

import pytest
from transformers import AutoModelForCausalLM

from attnconv.convert import convert_model
from attnconv.evaluate.engine.remarks import remarks_on
from attnconv.evaluate.engine.suite import load_suite
from attnconv.packaged.model import embedded_model_path


def settings(name):
    return [task.model_dump(mode="json") for task in load_suite(name).tasks.values()]


@pytest.fixture(scope="module")
def base():
    return embedded_model_path()


def config_of(base, method, **options):
    return convert_model(AutoModelForCausalLM.from_pretrained(base), method, **options).config


def test_quick_inside_a_window_of_1024(base):
    config = config_of(base, "sliding_window", window=1024)
    (remark,) = remarks_on(config, settings("quick"))
    assert remark.startswith("No text of these tasks is longer than the window of 1,024 tokens")
    assert "--suite standard" in remark
    assert remarks_on(config, settings("standard")) == []


@pytest.mark.parametrize(("method", "options"), [("sliding_window", {"window": 512}), ("hedgehog", {})])
def test_nothing_is_said_where_texts_go_past_the_window(base, method, options):
    assert remarks_on(config_of(base, method, **options), settings("quick")) == []


def test_nothing_is_said_of_a_base_or_of_texts_of_unknown_length(base):
    plain = AutoModelForCausalLM.from_pretrained(base).config
    assert remarks_on(plain, settings("quick")) == []
    config = config_of(base, "sliding_window", window=1024)
    assert remarks_on(config, [*settings("quick"), {"kind": "harness", "tasks": ["arc_easy"]}]) == []
    assert remarks_on(config, [{"kind": "multiple_choice", "data": "piqa"}]) == []
