import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from attnconv import convert_model
from attnconv.errors import CheckpointError, DataError
from attnconv.evaluate.diagnose import compare
from attnconv.evaluate.diagnose.compare import attention_divergence, comparable_layers
from attnconv.evaluate.engine.bootstrap import make_figures
from attnconv.evaluate.engine.models import load_evaluated, open_evaluated
from attnconv.evaluate.tasks.base import EvaluatedModel, Outcome, Scope
from attnconv.evaluate.tasks.fidelity import FidelitySettings, FidelityTask, spread
from attnconv.packaged.model import embedded_model_path
from attnconv.recipes import build_recipe

BASE = str(embedded_model_path())
SMALL = {"context": 40, "windows": 2, "map_size": 16}
# A conversion of one kind in the first layers, of another in the next, and two layers that stay.
RULES = [
    {"layers": "0-1", "method": "lolcats", "options": {"window": 8}},
    {"layers": "2", "method": "sliding_window", "options": {"window": 8, "num_sinks": 2}},
]


def hybrid() -> PreTrainedModel:
    recipe = build_recipe({"name": "hybrid", "attention": RULES})
    return convert_model(AutoModelForCausalLM.from_pretrained(BASE), recipe)


def evaluated_of(model: PreTrainedModel, folder: Path) -> EvaluatedModel:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    evaluated = open_evaluated("model", str(folder))
    load_evaluated(evaluated, device="cpu")
    return evaluated


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedModel:
    # Saved and loaded again, as evaluation meets it.
    found = evaluated_of(hybrid(), tmp_path_factory.mktemp("model"))
    found.base = open_evaluated("base", BASE)
    load_evaluated(found.base, device="cpu")
    return found


def run(evaluated: EvaluatedModel, scope: Scope = Scope(), **settings: object) -> list[Outcome]:  # noqa: B008
    task = FidelityTask(FidelitySettings(**{**SMALL, **settings}))
    with torch.inference_mode():
        return [task.measure(evaluated, unit) for unit in task.units(evaluated, scope)]


def eager(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    plain = AutoModelForCausalLM.from_pretrained(BASE, attn_implementation="eager")
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "attnconv" not in key})
    with torch.no_grad():
        return plain(input_ids=ids, output_attentions=True).attentions


def test_items_and_figures(evaluated: EvaluatedModel) -> None:
    outcomes = run(evaluated)
    assert len(outcomes) == 2
    items = [item for outcome in outcomes for item in outcome.items]
    assert len(items) == len({item.id for item in items}) == 2 * 5 * (8 + 1)
    heads = [item for item in items if "head" in item.group]
    layers = [item for item in items if "head" not in item.group]
    assert {tuple(item.values) for item in heads} == {("kl", "one")}
    assert {tuple(item.values) for item in layers} == {("error", "power")}
    figures = make_figures(items, None, FidelityTask.metrics, [(), *FidelityTask.slices])
    found = {(figure.metric, *figure.group.values()): figure.model for figure in figures}
    # All, by layer, and by layer and head; the output error has no heads.
    assert len(found) == 2 + 5 + 5 + 5 * 8
    mean = sum(item.values["kl"] for item in heads) / len(heads)
    assert found["attention KL",] == pytest.approx(mean)
    first = [item for item in layers if item.group["layer"] == 0]
    share = sum(item.values["error"] for item in first) / sum(item.values["power"] for item in first)
    assert found["output error", 0] == pytest.approx(share)
    assert 0.01 < share < 1
    assert found["attention KL", 0] > 0.01


def test_the_first_layer_by_hand(evaluated: EvaluatedModel) -> None:
    """The first layer of both models gets the same input, and a sliding window's weights are known in closed form."""
    model = convert_model(AutoModelForCausalLM.from_pretrained(BASE), "sliding_window", window=8, num_sinks=0)
    task = FidelityTask(FidelitySettings(**SMALL))
    unit = task.units(evaluated, Scope())[0]
    windowed = EvaluatedModel(
        "model", "windowed", evaluated.checkpoint, evaluated.tokenizer, model.eval(), evaluated.base
    )
    with torch.inference_mode():
        outcome = task.measure(windowed, unit)
    teacher = eager(evaluated.base.model, unit.content[1][None])[0][0].double()
    gap = torch.arange(40)[:, None] - torch.arange(40)
    student = teacher * (gap < 8)
    student = student / student.sum(-1, keepdim=True)
    terms = teacher * (teacher.clamp_min(1e-6).log() - student.clamp_min(1e-6).log())
    expected = terms.sum(-1).mean(-1)
    measured = [item.values["kl"] for item in outcome.items if item.group["layer"] == 0 and "head" in item.group]
    assert measured == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-5)
    (error,) = [item.values for item in outcome.items if item.group == {"layer": 0}]
    seen = {}
    handle = evaluated.base.model.model.layers[0].self_attn.v_proj.register_forward_hook(
        lambda module, args, out: seen.update(value=out)
    )
    with torch.no_grad():
        evaluated.base.model(input_ids=unit.content[1][None])
    handle.remove()
    values = seen["value"].view(40, 4, 8).transpose(0, 1).repeat_interleave(2, 0).double()
    assert error["power"] == pytest.approx(float((teacher @ values).square().sum()), rel=1e-4)
    assert error["error"] == pytest.approx(float(((student - teacher) @ values).square().sum()), rel=1e-3)


def test_a_model_is_faithful_to_itself_and_stays_as_it_was(evaluated: EvaluatedModel) -> None:
    base = evaluated.base
    assert base is not None
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = base.model(input_ids=ids).logits, evaluated.model(input_ids=ids, use_cache=False).logits
    own = EvaluatedModel("model", BASE, base.checkpoint, base.tokenizer, base.model, base)
    for outcome in run(own):
        assert all(item.values.get("kl", 0.0) == 0 for item in outcome.items)
        assert all(item.values.get("error", 0.0) == 0 for item in outcome.items)
        assert {row["name"] for row in outcome.extra["statistics"]} == {"density"}
    run(evaluated)
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, before[0])
        assert torch.equal(evaluated.model(input_ids=ids, use_cache=False).logits, before[1])


def test_extras_are_what_reports_draw(evaluated: EvaluatedModel) -> None:
    first = run(evaluated)[0]
    extra = json.loads(json.dumps(first.extra))
    assert (extra["size"], extra["tokens"], len(extra["maps"])) == (16, None, 6)
    divergences = sorted((item.values["kl"] for item in first.items if "kl" in item.values), reverse=True)
    kept = [row["kl"] for row in extra["maps"]]
    assert kept == [divergences[place] for place in (0, 1, 19, 20, 38, 39)]
    for row in extra["maps"]:
        assert row["layer"] == f"model.layers.{row['layer_index']}.self_attn"
        for side in ("teacher", "student"):
            grid = torch.tensor(row[side])
            assert grid.shape == (16, 16)
            assert (grid.triu(1) == 0).all()
            assert 0 <= grid.min() <= grid.max() <= 1
    shares = {(row["layer_index"], row["name"]): row["values"] for row in extra["statistics"]}
    assert [key for key in shares if key[1] == "linear share"] == [(0, "linear share"), (1, "linear share")]
    assert all(0 < value < 1 for value in shares[0, "linear share"])
    assert all(0 < value < 1 for value in shares[2, "sink share"])
    # 40 tokens, of which 8 and the first two are seen.
    visible = sum(min(8, position + 1) + min(2, max(0, position - 7)) for position in range(40))
    assert shares[2, "density"] == pytest.approx([visible / (40 * 41 / 2)] * 8)
    assert shares[3, "density"] == pytest.approx([1.0] * 8)


def test_short_windows_keep_their_maps_and_tokens(evaluated: EvaluatedModel) -> None:
    extra = run(evaluated, context=12, map_heads=1)[0].extra
    (row,) = extra["maps"]
    assert extra["size"] == len(extra["tokens"]) == len(row["teacher"]) == 12
    assert [sum(line) for line in row["teacher"]] == pytest.approx([1.0] * 12, abs=1e-3)
    assert [sum(line) for line in row["student"]] == pytest.approx([1.0] * 12, abs=1e-3)


def test_groups_of_layers_change_nothing(evaluated: EvaluatedModel, monkeypatch) -> None:
    whole = run(evaluated)
    monkeypatch.setattr(compare, "WEIGHTS_AT_ONCE", 2 * 8 * 40 * 40)
    assert run(evaluated) == whole


def test_limits_and_settings(evaluated: EvaluatedModel) -> None:
    whole = run(evaluated)
    assert run(evaluated, Scope(1)) == whole[:1]
    assert run(evaluated, map_heads=0)[0].extra["maps"] == []
    with pytest.raises(DataError, match="packaged"):
        run(evaluated, data="bok")


def test_layers_that_do_not_correspond_are_left_out(evaluated: EvaluatedModel, tmp_path: Path, caplog) -> None:
    config = evaluated.base.model.config.__class__.from_pretrained(BASE)
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = 4, 4, 4
    config.head_dim = 16
    torch.manual_seed(0)
    other = evaluated_of(type(evaluated.base.model)(config), tmp_path)
    other.base = evaluated.base
    layers, skipped = comparable_layers(evaluated.base.model, other.model)
    assert layers == ()
    assert skipped["model.layers.4.self_attn"] == "only the base has it"
    assert skipped["model.layers.0.self_attn"] == "it has 4 heads of 16 values, but 8 heads of 8 values in the base"
    with caplog.at_level(logging.WARNING):
        outcome = run(other)[0]
    assert outcome.items == []
    assert caplog.text.count("is not compared with the base's") == 5


def test_without_a_base_nothing_is_measured(evaluated: EvaluatedModel) -> None:
    alone = EvaluatedModel("model", "alone", evaluated.checkpoint, evaluated.tokenizer, evaluated.model)
    with pytest.raises(CheckpointError, match="no base was named"):
        run(alone)


def test_weights_of_either_sign_are_compared_by_their_size(evaluated: EvaluatedModel) -> None:
    model = convert_model(AutoModelForCausalLM.from_pretrained(BASE), "lightning", activation="none").eval()
    task = FidelityTask(FidelitySettings(**SMALL | {"map_size": 40}))
    lightning = EvaluatedModel("model", "lightning", evaluated.checkpoint, evaluated.tokenizer, model, evaluated.base)
    with torch.inference_mode():
        outcome = task.measure(lightning, task.units(evaluated, Scope())[0])
    divergences = [item.values["kl"] for item in outcome.items if "kl" in item.values]
    # As if no key of the teacher's were seen at all it would be 13.8.
    assert all(0.01 < kl < 13.8 for kl in divergences)
    for drawn in outcome.extra["maps"]:
        rows = torch.tensor(drawn["student"])
        assert rows.min() >= 0
        torch.testing.assert_close(rows.sum(-1), torch.ones(40), atol=0.01, rtol=0)
    assert {"density", "half-life"} <= {statistic["name"] for statistic in outcome.extra["statistics"]}


def test_divergence() -> None:
    base = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
    model = torch.tensor([[[0.25, 0.75], [0.0, 1.0]]])
    expected = (0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log() + torch.tensor(1e6).log()) / 2
    torch.testing.assert_close(attention_divergence(base, model), expected[None])
    # Only proportions count, and equal weights are equal.
    assert attention_divergence(base, 0.3 * base).item() == pytest.approx(0, abs=1e-6)
    assert attention_divergence(model, model).item() == 0


@pytest.mark.parametrize(
    ("length", "count", "places"),
    [
        (40, 6, [0, 1, 19, 20, 38, 39]),
        (10, 1, [0]),
        (10, 2, [0, 4]),
        (3, 6, [0, 1, 2]),
        (5, 4, [0, 1, 2, 4]),
        (0, 6, []),
    ],
)
def test_spread(length: int, count: int, places: list[int]) -> None:
    assert spread(length, count) == places
