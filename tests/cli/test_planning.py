"""`attnconv plan`: the budget, the choice, the recipe that it writes, and what cannot be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import Result

from attnconv.attention_modules import Geometry
from attnconv.convert.planning.budget import Budget, Choice, choose, cost_of
from attnconv.convert.planning.importance import read_importance
from attnconv.convert.planning.plan import make_plan
from attnconv.convert.planning.probe import probe
from attnconv.errors import PlanError
from attnconv.evaluate.diagnose.plan_picture import plot_plan
from attnconv.packaged.model import embedded_model_path
from attnconv.recipes import load_recipe
from attnconv.runs.planner import ModelPlan, PlanSettings, plan_yaml

Run = Callable[..., Result]
HEAD = Geometry(2, 1, 8, 8)


def test_costs_are_those_of_the_methods() -> None:
    full, streaming = Choice("softmax", {}), Choice("sliding_window", {"window": 16, "num_sinks": 4})
    assert cost_of("kv_bytes", full, HEAD, 1000, torch.bfloat16) == 1000 * 16 * 2
    # The newest but one, and first tokens in fp32 with their validity.
    assert cost_of("kv_bytes", streaming, HEAD, 1000, torch.bfloat16) < 15 * 16 * 2 + 4 * 16 * 4 + 64
    assert cost_of("flops", full, HEAD, 1000, torch.bfloat16) == 1000 * 2 * 16
    assert cost_of("flops", streaming, HEAD, 1000, torch.bfloat16) == 20 * 2 * 16


def test_the_least_is_lost_within_the_budget() -> None:
    costs, losses = [[10, 1], [10, 1], [30, 1]], [[0.0, 2.0], [0.0, 1.0], [0.0, 2.5]]
    whole = Budget("kv_bytes", 1.0)
    assert choose(costs, losses, whole, 50) == [0, 0, 0]
    # The first two are worth more than the third and cost less, if all three are not to be had.
    assert choose(costs, losses, whole, 40) == [0, 0, 1]
    assert choose([*costs, [1]], [*losses, [0.5]], whole, 23) == [0, 0, 1, 0]
    assert choose(costs, losses, Budget("kv_bytes", 0.06), 50) == [1, 1, 1]
    # What states hold besides may cost more than the model itself, whose part the budget is.
    with pytest.raises(PlanError, match=r"budget of flops=4.25% cannot be met: with the cheapest .* it is 6.7%;"):
        choose(costs, losses, Budget("flops", 0.0425), 45)


@pytest.mark.parametrize("text", ["kv_bytes", "kv_bytes=0%", "flops=101%", "heads=25%", "kv_bytes=0.25"])
def test_budgets_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"a budget is kv_bytes=25% or flops=25%"):
        Budget.parse(text)
    assert Budget.parse(" flops = 12.5 % ") == Budget("flops", 0.125)


@pytest.mark.parametrize("text", ["kv_bytes=1%", "flops=12.5%", "kv_bytes=0.07%", "kv_bytes=100%"])
def test_budgets_are_echoed_as_given(text: str) -> None:
    assert str(Budget.parse(text)) == text


def plan(full: list[list[bool]]) -> ModelPlan:
    settings = PlanSettings(Budget("kv_bytes", 0.5), window=8, num_sinks=2)
    losses = tuple(tuple(0.25 for _ in row) for row in full)
    layers = tuple(f"model.layers.{layer}.self_attn" for layer in range(len(full)))
    return ModelPlan("tiny", settings, layers, losses, tuple(map(tuple, full)), 0.4, 0.1, 0.01, 0.02)


def test_the_recipe_makes_the_plan(tmp_path: Path) -> None:
    full = [[True] * 4, [False] * 4, [True, False, False, True], [True] * 4, [True, False, False, True]]
    path = tmp_path / "mine.yaml"
    path.write_text(plan_yaml(plan(full), name="mine"))
    recipe = load_recipe(path)
    assert (recipe.name, recipe.stages) == ("mine", [])
    from transformers import AutoConfig, LlamaForCausalLM

    made = make_plan(recipe.attention, probe(AutoConfig.from_pretrained(embedded_model_path()), LlamaForCausalLM))
    assert [entry.method for entry in made.entries] == ["softmax", "sliding_window", "by_head", "softmax", "by_head"]
    assert [part["groups"] for part in made.entries[2].options["parts"]] == [[0, 3], [1, 2]]


def test_the_command_writes_recipe_and_picture(run: Run, teacher: str, tmp_path: Path) -> None:
    recipe, picture = tmp_path / "recipe.yaml", tmp_path / "plan.png"
    settings = [
        "--steps",
        2,
        "--tokens",
        160,
        "--window",
        24,
        "--judged-window",
        16,
        "--length",
        2048,
        "--output",
        recipe,
    ]
    settings += ["--importance", tmp_path / "heads.json"]
    made = run("plan", teacher, "--budget", "kv_bytes=40%", "--calibrate", "book", "--picture", picture, *settings)
    assert made.exit_code == 0, made.output
    # Room for more tokens is counted too.
    assert "6 of 20 KV heads stay full: 3" in made.output
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert yaml.safe_load(recipe.read_text())["attention"][-1]["method"] == "sliding_window"
    settings += ["--measure", "ablation", "--unit", "layer"]
    made = run("plan", teacher, "--budget", "flops=50%", "--calibrate", "book", *settings)
    assert made.exit_code == 0, made.output
    rules = yaml.safe_load(recipe.read_text())["attention"]
    assert not any("heads" in rule for rule in rules)
    assert set(read_importance(tmp_path / "heads.json").measures) == {"trained", "ablation"}
    made = run("plan", teacher, "--budget", "kv_bytes=0.1%", "--calibrate", "book", *settings)
    assert made.exit_code == 1
    assert "the budget of kv_bytes=0.1% cannot be met" in made.stderr


def test_layers_of_different_numbers_of_heads_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "plan.png"
    plot_plan([[0.1, 0.2], [0.3]], [[True, False], [True]], path, title="a", meaning="b")
    assert path.stat().st_size > 0
