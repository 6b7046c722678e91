"""Layer rules: what each form chooses, and what is refused."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnconv.errors import RecipeError
from attnconv.recipes import AttentionRule, parse_layers, selectors


def chosen(layers, num_layers):
    rule = AttentionRule(layers=layers, method="softmax")
    return [index for index in range(num_layers) if rule.matches(index, num_layers, f"model.layers.{index}.self_attn")]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", list(range(12))),
        (" all ", list(range(12))),
        ("0-3,7", [0, 1, 2, 3, 7]),
        ("0 - 1 , 11", [0, 1, 11]),
        ("5", [5]),
        (5, [5]),
        ({"every": 4, "offset": 3}, [3, 7, 11]),
        ({"every": 5}, [0, 5, 10]),
        ({"first": 2}, [0, 1]),
        ({"last": 2}, [10, 11]),
        (r"layers\.[12]\.", [1, 2]),
        ("self_attn$", list(range(12))),
        ("vision", []),
    ],
)
def test_forms(layers, expected):
    assert chosen(layers, 12) == expected


@given(st.sets(st.integers(0, 40), min_size=1))
def test_numbers_choose_themselves(numbers):
    assert chosen(",".join(map(str, numbers)), 41) == sorted(numbers)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted), min_size=1, max_size=4))
def test_ranges_include_both_ends(ranges):
    text = ",".join(f"{first}-{last}" for first, last in ranges)
    assert chosen(text, 41) == sorted({index for first, last in ranges for index in range(first, last + 1)})


@given(st.integers(1, 20), st.integers(1, 60), st.data())
def test_every_layer_has_exactly_one_offset(every, num_layers, data):
    index = data.draw(st.integers(0, num_layers - 1))
    offsets = [
        offset
        for offset in range(every)
        if offset < num_layers and index in chosen({"every": every, "offset": offset}, num_layers)
    ]
    assert offsets == [index % every]


@given(st.integers(1, 30), st.integers(1, 30))
def test_first_and_the_remaining_last_divide_the_layers(first, last):
    total = first + last
    assert chosen({"first": first}, total) + chosen({"last": last}, total) == list(range(total))


@given(st.one_of(st.text(max_size=12), st.integers(), st.none(), st.dictionaries(st.text(max_size=6), st.integers())))
def test_anything_is_read_or_refused_by_a_value_error(value):
    try:
        selector = parse_layers(value)
    except ValueError:
        return
    assert str(selector)
    assert isinstance(selector.matches(None, 4, "encoder.attention"), bool)


@given(
    st.one_of(
        st.integers(0, 99).map(str),
        st.builds(lambda first, more: f"{first}-{first + more}", st.integers(0, 9), st.integers(1, 9)),
        st.builds(lambda every, offset: {"every": every + offset, "offset": offset}, st.integers(1), st.integers(0)),
        st.builds(lambda count: {"first": count}, st.integers(1)),
        st.builds(lambda count: {"last": count}, st.integers(1)),
    )
)
def test_a_selector_is_written_as_a_recipe_writes_it(layers):
    written = str(parse_layers(layers))
    assert written == (
        layers if isinstance(layers, str) else "{" + ", ".join(f"{key}: {layers[key]}" for key in layers) + "}"
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (-1, "negative layer"),
        ("-3", "negative layer"),
        ("0,-1", "negative layer"),
        ("7-3", "runs backwards"),
        ("0-", "no list of layers"),
        ("0:4", "no list of layers"),
        ("1,,2", "no list of layers"),
        ("[", "no valid regex"),
        ("", "layers are all"),
        (True, "layers are all"),
        (None, "layers are all"),
        (1.5, "layers are all"),
        ([0, 1], "layers are all"),
        ({}, "exactly one of"),
        ({"offset": 1}, "exactly one of"),
        ({"first": 1, "last": 1}, "exactly one of"),
        ({"first": 1, "offset": 0}, "exactly one of"),
        ({"evry": 4}, "did you mean 'every'"),
        ({"every": 0}, "1 or more"),
        ({"every": True}, "whole number"),
        ({"every": 4, "offset": 4}, "offset must be below every"),
        ({"every": 4, "offset": -1}, "0 or more"),
        ({"first": 0}, "1 or more"),
        ({"last": "2"}, "whole number"),
    ],
)
def test_wrong_layers_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        parse_layers(layers)


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ("4", "4 needs 5"),
        ("0-7", "0-7 needs 8"),
        ({"first": 5}, "first: 5"),
        ({"last": 5}, "last: 5"),
        ({"every": 8, "offset": 6}, "offset: 6"),
    ],
)
def test_layers_the_model_has_not_are_refused(layers, named):
    with pytest.raises(RecipeError, match="the model has 4") as refusal:
        chosen(layers, 4)
    assert named in str(refusal.value)


def test_the_documented_examples():
    assert doctest.testmod(selectors).failed == 0


def test_a_module_outside_of_the_layers_is_chosen_by_all_and_by_name_only():
    def matches(layers):
        return AttentionRule(layers=layers, method="softmax").matches(None, 4, "pooler.attention")

    assert matches("all")
    assert matches("pooler")
    assert not any(matches(layers) for layers in ("0-3", {"every": 1}, {"first": 4}, {"last": 4}, "layers"))


def test_a_regex_that_backtracks_for_ever_is_stopped(monkeypatch):
    monkeypatch.setattr(selectors, "SECONDS_PER_NAME", 0.1)
    selector = parse_layers("(x|xx|xxx)+$")
    with pytest.raises(RecipeError, match="finds no end on model"):
        selector.matches(0, num_layers=2, module_name="model." + "x" * 200 + "y")
