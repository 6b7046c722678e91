"""From rules to a plan."""

from dataclasses import replace

import pytest
import torch

from attnconv.attention_modules import Geometry
from attnconv.convert import Plan, ProbedModule, make_plan
from attnconv.errors import PlanError
from attnconv.recipes import AttentionRule

GEOMETRY = Geometry(4, 2, 8, 8)
CROSS = ProbedModule("decoder.0.cross", 0, GEOMETRY, None, 1, False, (), "Attention")


def layer(index: int, *extras: str) -> ProbedModule:
    return ProbedModule(f"decoder.{index}.attn", index, GEOMETRY, None, 1, True, extras, "Attention")


LAYERS = [layer(0), CROSS, layer(1), layer(2), layer(3)]


def rule(layers: object, method: str, **options: object) -> AttentionRule:
    return AttentionRule.model_validate({"layers": layers, "method": method, "options": options})


def methods(*rules: AttentionRule) -> list[str]:
    return [entry.method for entry in make_plan(rules, LAYERS).entries]


def test_the_first_rule_that_matches_wins() -> None:
    rules = [rule({"every": 2}, "softmax"), rule("3", "hedgehog"), rule("all", "lolcats")]
    assert methods(*rules) == ["softmax", "softmax", "lolcats", "softmax", "hedgehog"]


def test_cross_attention_is_not_a_layer() -> None:
    assert methods(rule({"last": 2}, "lolcats")) == ["softmax", "softmax", "softmax", "lolcats", "lolcats"]
    assert methods(rule("all", "lolcats"))[1] == "softmax"


def test_options_are_complete_and_survive_the_config() -> None:
    plan = make_plan([rule("all", "lolcats", window=8)], LAYERS)
    section = plan.to_config()
    again = Plan.from_config(section)
    assert again.to_config() == section
    assert section["modules"]["decoder.0.attn"]["options"]["window"] == 8
    assert section["modules"]["decoder.0.attn"]["options"]["feature_map"] == "hedgehog"
    assert "decoder.0.cross" not in section["modules"]


def test_a_layer_that_a_method_cannot_serve_is_refused_with_the_reason() -> None:
    rules = [rule("2", "linear", projection="none", feature_dim=4), rule("all", "linear")]
    with pytest.raises(PlanError, match=r"decoder\.2\.attn cannot be converted: .*leave feature_dim out"):
        make_plan(rules, LAYERS)
    refused = make_plan(rules, LAYERS, check=False).entries
    assert [entry.converted for entry in refused] == [True, False, True, False, True]
    both_ways = [replace(layer(0), geometry=replace(GEOMETRY, causal=False))]
    with pytest.raises(PlanError, match=r"decoder\.0\.attn cannot be converted: lightning .*bidirectional"):
        make_plan([rule("all", "lightning")], both_ways)
    with pytest.raises(PlanError, match="hidden_size is not known"):
        make_plan([rule("all", "lightning")], LAYERS)
    assert make_plan([rule("all", "lightning", output_gate=False)], LAYERS).converted


def test_nothing_to_convert_is_refused() -> None:
    with pytest.raises(PlanError, match="leave every layer"):
        make_plan([rule("all", "softmax")], LAYERS)
    with pytest.raises(PlanError, match="no self-attention"):
        make_plan([rule("all", "lolcats")], [CROSS])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("softcap", "soft cap"),
        ("s_aux", "sinks"),
        ("position_bias", "position bias"),
        ("indices", "selection of keys"),
    ],
)
def test_leaving_something_out_takes_a_flag(extra: str, words: str) -> None:
    rules, layers = [rule("all", "lolcats")], [layer(0), layer(1, extra)]
    with pytest.raises(PlanError, match=rf"{words}.*decoder\.1\.attn.*--allow-lossy"):
        make_plan(rules, layers)
    assert len(make_plan(rules, layers, allow_lossy=True).converted) == 2
    assert make_plan(rules, layers, check=False).entries[1].lossy
    assert make_plan([rule("1", "softmax"), *rules], layers).converted


def test_a_layer_that_runs_twice_is_refused() -> None:
    twice = replace(layer(1), calls=2)
    with pytest.raises(PlanError, match="runs 2 times"):
        make_plan([rule("all", "lolcats")], [layer(0), twice])
    plan = make_plan([rule("all", "lolcats")], [layer(0), twice], check=False)
    assert plan.entries[1].refused
    assert [entry.name for entry in plan.converted] == ["decoder.0.attn"]


def test_new_tensors_are_the_cores_start() -> None:
    plan = make_plan([rule("all", "lolcats", window=8)], LAYERS)
    tensors = dict(plan.new_tensors())
    assert set(tensors) == {
        f"decoder.{i}.attn.attnconv.{name}"
        for i in range(4)
        for name in ("mixing", "query_map.weight", "key_map.weight")
    }
    assert torch.equal(tensors["decoder.0.attn.attnconv.key_map.weight"][1], torch.eye(8))
    assert not dict(make_plan([rule("all", "sliding_window")], LAYERS).new_tensors())


def test_a_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match=r"rule 1 \(layers: model\\.layer\\.\*, .*named like decoder\.0\.attn"):
        make_plan([rule(r"model\.layer\.*", "lolcats"), rule("all", "lolcats")], LAYERS)


def test_a_rule_behind_another_warns(caplog: pytest.LogCaptureFixture) -> None:
    make_plan([rule("all", "lolcats"), rule("0", "softmax")], LAYERS)
    assert "rule 2 (layers: 0, method: softmax) has no effect" in caplog.text
