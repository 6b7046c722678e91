"""Shares of full attention, trained on texts that hide something, written down and taken up by a recipe."""

import json

import pytest
import torch
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

from attnconv.convert import convert_model, converted_modules
from attnconv.convert.planning.importance import read_importance, write_importance
from attnconv.convert.planning.plan import make_plan
from attnconv.convert.planning.probe import probe
from attnconv.distill import Silent
from attnconv.distill.batches import Batch
from attnconv.distill.roles import RoleTraining
from attnconv.errors import PlanError, TrainingError
from attnconv.evaluate.diagnose.importance import trained_importance
from attnconv.evaluate.diagnose.needles import FORMS, Needles
from attnconv.packaged.model import embedded_model_path, embedded_tokens
from attnconv.recipes import load_recipe, parse_recipe
from attnconv.recipes.stages.roles import RolesStage
from attnconv.runs import run_conversion

STAGE = RolesStage(steps=1, sequence_length=200, learning_rate=0.1, keep=0.0, penalty=1.0)


@pytest.fixture
def trainee(make_trainee, tokenizer):
    trainee = make_trainee("head_roles", window=16, num_sinks=2)
    trainee.tokenizer = tokenizer
    return trainee


def test_something_is_hidden_and_asked_for(tokenizer):
    ids = embedded_tokens("valid").flatten()[:300]
    torch.manual_seed(0)
    for _ in range(6):
        hidden = Needles(tokenizer, others=50).hide(ids)
        text, key = tokenizer.decode(hidden.ids[0]), tokenizer.decode(hidden.ids[0, hidden.answers + 1]).strip()
        assert text.count(key) in (2, 3)
        assert any(text.endswith(f"{question} {key}") for _, _, question in FORMS)
        assert abs(hidden.ids.shape[1] - 300) <= 1
        assert len(hidden.others) == 50
        assert not set(hidden.others.tolist()) & set(hidden.answers.tolist())


def test_it_starts_as_the_model_and_only_shares_learn(trainee):
    objective = RoleTraining(trainee, STAGE)
    (group,) = objective.parameter_groups()
    assert sum(parameter.numel() for parameter in group.parameters.values()) == 20
    trainee.train_only(group.parameters.values())
    torch.manual_seed(0)
    figures = objective.backward(_batch(), 2)
    # Nothing is lost yet, so the loss is the price alone.
    assert float(figures.loss) == pytest.approx(1.0, abs=1e-5)
    assert all(parameter.grad is not None for parameter in group.parameters.values())
    with torch.no_grad():
        next(iter(group.parameters.values())).fill_(-3.0)
    assert float(objective.backward(_batch(), 2).loss) > 0.8 + 1e-3
    assert float(next(iter(group.parameters.values())).detach().min()) == 0.0


def test_what_was_learned_is_told_by_head(trainee):
    core = next(iter(trainee.cores().values()))
    core.alpha.data = torch.tensor([0.25, 1.5, -0.5, 1.0])
    query = torch.zeros(1, core.geometry.num_heads, 3, core.geometry.head_dim)
    (told,) = core.statistics(query, query[:, :4], scaling=1.0).values()
    assert (told.name, told.per, told.style) == ("full attention", "head", "percent")
    assert told.values.tolist() == [0.25, 0.25, 1, 1, 0, 0, 1, 1]


def test_heads_for_nothing_have_no_price(trainee):
    objective = RoleTraining(trainee, STAGE.model_copy(update={"keep": 0.5, "penalty": 4.0}))
    assert float(objective.price()) == pytest.approx(2.0)
    for core in trainee.cores().values():
        core.alpha.data.fill_(0.5)
    assert float(objective.price()) == 0.0


def test_what_it_needs_is_named(make_trainee, trainee):
    with pytest.raises(TrainingError, match="no converted layer is one: give a rule"):
        RoleTraining(make_trainee(), STAGE)
    trainee.tokenizer = None
    with pytest.raises(TrainingError, match="the model has no tokenizer"):
        RoleTraining(trainee, STAGE)


TEXT = """
name: a
attention: [{layers: all, method: head_roles, options: {window: 16, num_sinks: 2}}]
data: {embedded: true}
stages: [{kind: roles, steps: 4, sequence_length: 160, learning_rate: 0.2, keep: 0.25, save_every: 2, log_every: 1}]
"""


def test_a_run_learns_shares_that_a_recipe_goes_by(tmp_path):
    source = embedded_model_path()
    result = run_conversion(source, parse_recipe(TEXT), tmp_path / "roles")
    path = tmp_path / "heads.json"
    found = trained_importance(str(tmp_path / "roles"), path)
    assert found == read_importance(path)
    assert found.measure == "trained"
    shares = torch.tensor(found.scores(None))
    assert 0 <= float(shares.min()) < float(shares.max()) <= 1
    assert result.metrics
    recipe = load_recipe("duo", [f"attention.0.heads.importance={path}", "attention.1.options.window=16"])
    streaming = run_conversion(source, recipe, tmp_path / "duo")
    kept = [
        len(part["groups"])
        for entry in streaming.plan.converted
        for part in entry.options.get("parts", [])
        if part["method"] == "softmax"
    ]
    untouched = len(streaming.plan.entries) - len(streaming.plan.converted)
    assert sum(kept) + untouched * shares.shape[1] == round(shares.numel() / 2)
    # A model without such shares is diagnosed as ever.
    assert trained_importance(str(tmp_path / "duo"), path) is None
    assert trained_importance(str(source), path) is None


def test_a_stopped_run_goes_on_to_the_same_shares(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TEXT)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_conversion(embedded_model_path(), load_recipe(str(recipe)), whole)
    with pytest.raises(ZeroDivisionError):
        run_conversion(embedded_model_path(), load_recipe(str(recipe)), parts, progress=Stopper())
    run_conversion(embedded_model_path(), load_recipe(str(recipe)), parts, resume=True)
    found = [trained_importance(str(folder), tmp_path / f"{folder.name}.json") for folder in (whole, parts)]
    assert found[0].measures == found[1].measures


class Stopper(Silent):
    """Fails in the third step, behind the checkpoint of the second."""

    def begin(self, text, total, done, unit="tokens"):
        self.left = 3

    def step(self, loss, per_second):
        self.left -= 1
        assert 1 / self.left


def _batch():
    return Batch(embedded_tokens("valid").flatten()[:400].view(2, 200))


def test_a_converted_layer_of_another_kind_is_named(tmp_path):
    rules = "[{layers: 0, method: head_roles}, {layers: all, method: sliding_window, options: {window: 4}}]"
    model = convert_model(tiny_llama(), parse_recipe(f"name: a\nattention: {rules}"))
    assert len(converted_modules(model)) == 2
    model.save_pretrained(tmp_path)
    with pytest.raises(PlanError, match=r"layers\.1\.self_attn .* is not 'head_roles'"):
        trained_importance(str(tmp_path), tmp_path / "a.json")


def test_linear_heads_beside_softmax_ones_are_healed(tmp_path):
    """Attention transfer of layers that are both, by outputs and by weights."""
    settings = {"learning_rate": 0.01, "sequence_length": 64, "steps": 2, "kind": "attention_transfer"}
    loss = {"output_mse": 1, "weight_cross_entropy": 1}
    recipe = {
        "name": "a",
        "attention": [
            {"layers": "0-1", "heads": "0,3", "method": "softmax"},
            {"layers": "0-1", "heads": "1", "method": "lolcats", "options": {"window": 8}},
            {"layers": "0-1", "method": "hedgehog"},
        ],
        "data": {"embedded": True},
        "stages": [{**settings, "loss": loss}],
    }
    result = run_conversion(embedded_model_path(), parse_recipe(json.dumps(recipe)), tmp_path / "out")
    assert [entry.method for entry in result.plan.converted] == ["by_head"] * 2
    stages = {row["stage"]: row for row in result.metrics}
    assert stages["attention_transfer"]["tokens"] == 128


@pytest.mark.parametrize("name", ["duo", "retrieval-heads"])
def test_recipes_by_importance_plan_a_model(name, tmp_path):
    path = tmp_path / "heads.json"
    model = AutoModelForCausalLM.from_pretrained(embedded_model_path())
    modules = probe(model.config, type(model))
    measures = {"ablation": [[layer + head for head in range(4)] for layer in range(5)]}
    write_importance(path, source="stories", modules=modules, measures=measures, measure="ablation")
    recipe = load_recipe(name, [f"attention.0.heads.importance={path}"])
    plan = make_plan(recipe.attention, modules)
    assert "by_head" in {entry.method for entry in plan.converted}
    assert recipe.attention[1].method in plan.converted[0].methods
