"""Windows as settings of native classes and as a method: one recipe in two forms."""

from typing import Any

import pytest
from typer.testing import CliRunner

from attnconv import runs
from attnconv.cli import app
from attnconv.errors import PlanError, RecipeError
from attnconv.recipes import Recipe, load_recipe, with_target


def test_windows_go_from_one_form_to_the_other_and_back() -> None:
    native = load_recipe("window-native")
    method = with_target(native, "attnconv")
    assert method.rewrite == []
    assert [(rule.layers, rule.method) for rule in method.attention] == [
        ({"every": 4, "offset": 3}, "softmax"),
        ("all", "sliding_window"),
    ]
    assert method.attention[1].options == {"window": 1024, "num_sinks": 0}
    assert with_target(method, "native") == native
    assert with_target(native, "native") == native
    assert with_target(method, "attnconv") == method


@pytest.mark.parametrize(
    ("target", "parts", "said"),
    [
        ("native", {"attention": [{"layers": "all", "method": "sliding_window"}]}, "num_sinks 4, and no class keeps"),
        ("native", {"attention": [{"layers": "all", "method": "hedgehog"}]}, "other than layers that stay softmax"),
        ("native", {"attention": [{"layers": "0", "method": "sliding_window"}]}, "then a sliding_window for all"),
        ("attnconv", {"rewrite": [{"kind": "degroup"}]}, "neither attention rules nor a rewrite window"),
        ("attnconv", {"rewrite": [{"kind": "window", "window": 8, "sinks": -10}]}, "without sinks"),
    ],
)
def test_what_has_one_form_is_refused_in_the_other(target: Any, parts: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=f"no form for --target {target}: .*{said}"):
        with_target(Recipe(name="a", **parts), target)


def test_the_command_line_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def convert(_model: str, recipe: Recipe, *_: Any, **__: Any) -> None:
        seen.append(recipe)
        raise PlanError("enough")

    monkeypatch.setattr(runs, "run_conversion", convert)
    for target in ("attnconv", "native"):
        command = ["convert", "model", "--recipe", "window-native", "--output", "out", "--target", target]
        assert CliRunner().invoke(app, command).exit_code == 1
    assert [(bool(recipe.rewrite), bool(recipe.attention)) for recipe in seen] == [(False, True), (True, False)]
    assert CliRunner().invoke(app, [*command[:-1], "vllm"]).exit_code == 2
