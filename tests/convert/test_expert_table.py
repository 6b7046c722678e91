"""Every row of the table of classes with every kind of expert: exact where promised, drawn as asked where not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import EXACT, assert_equal, dense, experts, loaded, logits
from safetensors.torch import load_file

from attnconv.convert.rewriting.classes import CLASSES
from attnconv.convert.rewriting.tensors import Columns, Joined, Target, columns, joined, made, mean, rows
from attnconv.errors import PlanError, RecipeError
from attnconv.files.json_files import read_json
from attnconv.recipes import Recipe, load_recipe, parse_recipe
from attnconv.runs import run_conversion

GRANITE = {"attention_multiplier": 0.2, "logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 4.0}
HEADS = {"head_dim": 8}
ROWS: list[tuple[str, str, dict[str, Any], str]] = [
    ("llama", "mixtral", {}, "auto"),
    ("mistral", "mixtral", {"sliding_window": 8, "head_dim": 16}, "none"),
    ("qwen2", "qwen2_moe", {}, "dense"),
    ("qwen2", "qwen2_moe", {}, "none"),
    ("llama", "qwen2_moe", {}, "none"),
    ("qwen3", "qwen3_moe", {"head_dim": 16}, "auto"),
    ("llama", "granitemoe", {}, "auto"),
    ("granite", "granitemoe", GRANITE, "auto"),
    ("llama", "granitemoeshared", {}, "dense"),
    ("granite", "granitemoeshared", GRANITE, "none"),
    ("olmo2", "flex_olmo", {}, "auto"),
    ("llama", "glm4_moe", {}, "none"),
    ("llama", "glm4_moe", {"attention_bias": False}, "dense"),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", HEADS, "none"),
    ("ernie4_5", "ernie4_5_moe", HEADS, "none"),
    ("ernie4_5", "ernie4_5_moe", HEADS, "dense"),
]


def test_every_pair_of_the_table_is_here() -> None:
    pairs = {(dense, row.model_type) for row in CLASSES.values() for dense in row.dense}
    assert {(row[0], row[1]) for row in ROWS} == pairs


@pytest.mark.parametrize(("kind", "target", "settings", "shared"), ROWS)
# How finely experts are cut does not depend on the classes; the tests below cut them finely in every run.
@pytest.mark.parametrize("granularity", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_row_is_exact_and_keeps_its_names(
    tmp_path: Path, kind: str, target: str, settings: dict[str, Any], shared: str, granularity: int
) -> None:
    base = dense(kind, tmp_path / "base", **settings)
    counts = {"num_experts": 6, "active": 4, "granularity": granularity}
    result = run_conversion(base, experts(target=target, shared=shared, **counts), tmp_path / "out")
    assert result.exactness is not None
    assert result.exactness.promised
    mixture = assert_equal(base, tmp_path / "out")
    assert mixture.config.model_type == target
    mixture.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    ("kind", "target", "layers", "changed"),
    [
        ("qwen2", "qwen2_moe", "0-1", [0, 1]),
        ("qwen3", "qwen3_moe", {"every": 2, "offset": 0}, [0, 2]),
        ("llama", "glm4_moe", {"last": 2}, [1, 2]),
        ("ernie4_5", "ernie4_5_moe", "1", [1]),
    ],
)
def test_some_layers_can_keep_their_feed_forward(
    tmp_path: Path, kind: str, target: str, layers: object, changed: list[int]
) -> None:
    base = dense(kind, tmp_path / "base", **(HEADS if kind == "ernie4_5" else {}))
    run_conversion(base, experts(target=target, layers=layers), tmp_path / "out")
    assert_equal(base, tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert [number for number in range(3) if any(f"layers.{number}.mlp.experts." in name for name in names)] == changed


def test_parts_of_a_copy_have_one_row_and_scaled_last_matrices(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base")
    run_conversion(base, experts(num_experts=6, active=3, granularity=3), tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    router = after["model.layers.1.block_sparse_moe.gate.weight"].view(2, 3, 32)
    assert torch.equal(router, router[:, :1].expand_as(router))
    assert not torch.equal(router[0], router[1])
    name = "model.layers.1.block_sparse_moe.experts.4.{}.weight"
    up, down = (before[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("up", "down"))
    assert torch.equal(after[name.format("w3")], up[16:32])
    assert torch.equal(after[name.format("w2")], down[:, 16:32] * 3)
    assert read_json(tmp_path / "out" / "config.json")["intermediate_size"] == 16
    assert_equal(base, tmp_path / "out")


def test_a_factor_that_the_type_rounds_is_no_promise(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base")
    cast = {"kind": "cast", "dtype": "bfloat16"}
    for granularity, exact in {2: True, 3: False}.items():
        wanted = {"kind": "experts", "num_experts": 6, "active": 6, "granularity": granularity}
        found = run_conversion(base, Recipe(name="a", rewrite=[cast, wanted]), tmp_path / f"{granularity}").exactness
        assert found is not None
        assert any("3 times the last matrices rounded to bfloat16" in reason for reason in found.reasons) != exact


def test_dropped_neurons_are_the_same_in_all_matrices_and_drawn_like_them(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base", intermediate_size=400)
    recipe = experts(num_experts=3, active=2, init={"kind": "drop", "ratio": 0.25})
    found = run_conversion(base, recipe, tmp_path / "out").exactness
    assert found is not None
    assert found.reasons == ("25% of each expert's neurons drawn anew",)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    chosen = []
    for expert in range(3):
        changed = []
        for old, new, axis in [("gate", "w1", 1), ("up", "w3", 1), ("down", "w2", 0)]:
            dense_matrix = before[f"model.layers.2.mlp.{old}_proj.weight"]
            matrix = after[f"model.layers.2.block_sparse_moe.experts.{expert}.{new}.weight"]
            rows_changed = (matrix != dense_matrix).any(axis)
            changed.append(rows_changed)
            drawn = matrix[rows_changed] if axis else matrix[:, rows_changed]
            assert abs(drawn.std() - 0.3) < 0.02
        assert torch.equal(changed[0], changed[1])
        assert torch.equal(changed[0], changed[2])
        assert changed[0].sum() == 100
        chosen.append(changed[0])
    assert not torch.equal(chosen[0], chosen[1])
    run_conversion(base, recipe, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in again.items())


def test_noise_is_as_large_as_asked_for(tmp_path: Path) -> None:
    base = dense("qwen3", tmp_path / "base", intermediate_size=400)
    found = run_conversion(base, experts(init={"kind": "noise", "scale": 0.1}), tmp_path / "out").exactness
    assert found is not None
    assert not found.promised
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    new = [after[f"model.layers.0.mlp.experts.{expert}.up_proj.weight"] for expert in (0, 1)]
    noise = new[0] - before["model.layers.0.mlp.up_proj.weight"]
    assert 0.028 < noise.std() < 0.032
    assert not torch.equal(new[0], new[1])


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("llama", {"granularity": 3}, "active 2 with a granularity of 3, .*: give a multiple of 3"),
        (
            "llama",
            {"granularity": 5, "num_experts": 10, "active": 5},
            "are 48 wide: give a granularity that divides 48",
        ),
        ("llama", {"granularity": 2, "router": "zero"}, "need routers that tell copies apart.*: write router: random"),
        ("llama", {"shared": "dense"}, "a mixtral have none that all tokens go through: write shared: none"),
        ("llama", {"layers": "1"}, r"a mixtral must be in all layers, and layers leaves out \[0, 2\]"),
        (
            "llama",
            {"layers": "1", "target": "glm4_moe"},
            r"in all layers but the first, and layers leaves out \[0, 2\]",
        ),
        ("qwen3", {"layers": "5"}, "needs 6 layers, but the model has 3"),
        ("qwen3", {"layers": "nothing.at.all"}, "made of no layer at all"),
        (
            "llama",
            {"target": "olmoe"},
            "llama models olmoe, whose attention normalises queries and keys over all heads",
        ),
        (
            "llama",
            {"target": "qwen3_moe"},
            "normalises the queries and keys of each head: .* write mixtral or qwen2_moe",
        ),
        (
            "hunyuan_v1_dense",
            {"shared": "dense", "granularity": 2},
            "cannot be narrower than the one that all tokens go through: write shared: none",
        ),
    ],
)
def test_impossible_wishes_are_refused_with_the_reason(
    tmp_path: Path, kind: str, settings: dict[str, Any], said: str
) -> None:
    base = dense(kind, tmp_path / "base", **(HEADS if kind == "hunyuan_v1_dense" else {}))
    with pytest.raises((PlanError, RecipeError), match=said):
        run_conversion(base, experts(**settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("init: {kind: dropp}", "drop"),
        ("init: {kind: drop, ratio: 1.5}", "ratio"),
        ("init: {kind: noise, scale: 0}", "scale"),
        ("layers: '3-1'", "3-1"),
        ("granularity: 0", "granularity"),
    ],
)
def test_a_recipe_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_recipe(f"name: a\nrewrite: [{{kind: experts, {text}}}]")


def test_parts_of_tensors_can_be_read_in_any_pieces() -> None:
    matrix = torch.arange(24.0).view(6, 4)
    whole = made("a", (6, 4), torch.float32, (), lambda: matrix)
    cases: list[tuple[Target, torch.Tensor]] = [
        (rows(whole, 2, 5), matrix[2:5]),
        (columns(whole, 1, 3), matrix[:, 1:3]),
        (columns(rows(whole, 1, 6), 3, 4), matrix[1:, 3:]),
        (
            joined("b", (3, 3, 4), [rows(whole, 0, 3), rows(whole, 3, 6), rows(whole, 1, 4)]),
            torch.stack([matrix[:3], matrix[3:], matrix[1:4]]),
        ),
        (mean([whole, rows(whole, 0, 6), made("c", (6, 4), torch.float32, (), lambda: matrix * 4)]), matrix * 2.0),
    ]
    for target, wanted in cases:
        assert torch.equal(target.read(), wanted)
        assert target.nbytes == 4 * target.numbers == 4 * wanted.numel()
        flat = wanted.reshape(-1)
        for start in range(0, target.numbers, 3):
            assert torch.equal(target.content.read(start, start + 2), flat[start : start + 2])
        pieces = [target.content.read(*piece) for piece in target.content.pieces(target.numbers, 4)]
        assert torch.equal(torch.cat(pieces), flat)
    assert rows(whole, 0, 6) is whole
    assert columns(whole, 0, 4) is whole
    assert mean([whole]) is whole
    assert {type(cases[1][0].content), type(cases[3][0].content)} == {Columns, Joined}


def test_the_text_that_a_mixture_writes_is_the_dense_one_whatever_the_precision(tmp_path: Path) -> None:
    """Scaled by powers of two, nothing is rounded in bfloat16."""
    base = dense("qwen2", tmp_path / "base")
    cast = {"kind": "cast", "dtype": "bfloat16"}
    run_conversion(base, Recipe(name="a", rewrite=[cast]), tmp_path / "cast")
    run_conversion(tmp_path / "cast", experts(num_experts=4, active=4, granularity=2), tmp_path / "out")
    before = logits(loaded(tmp_path / "cast"))
    assert (logits(loaded(tmp_path / "out")) - before).abs().max() <= EXACT * before.abs().max()


@pytest.mark.parametrize(
    ("name", "kind", "model"),
    [
        ("upcycle-qwen3", "qwen3", "Qwen3Moe"),
        ("upcycle-granular", "llama", "Mixtral"),
        ("upcycle-granular", "qwen2", "Qwen2Moe"),
        ("drop-upcycle", "mistral", "Mixtral"),
    ],
)
def test_a_shipped_recipe_gives_an_ordinary_model(tmp_path: Path, name: str, kind: str, model: str) -> None:
    base = dense(kind, tmp_path / "base")
    result = run_conversion(base, load_recipe(name), tmp_path / "out")
    assert result.plan.is_native
    assert type(loaded(tmp_path / "out")).__name__ == f"{model}ForCausalLM"
    assert result.exactness is not None
    assert result.exactness.promised == (name != "drop-upcycle")
