import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DiffLlamaConfig,
    Gemma2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from attnconv import convert_model, make_plan, probe
from attnconv.distill.embedded import embedded_model_path
from attnconv.errors import CheckpointError, DataError, OutputError, PlanError
from attnconv.evaluate.diagnostics import (
    Diagnosis,
    HeadProfile,
    LayerProfile,
    SkippedLayer,
    advice_yaml,
    diagnose,
    diagnose_model,
    measures,
    plot_diagnosis,
    recommend,
)
from attnconv.evaluate.diagnostics.maps import shrink_map, watch_tokens
from attnconv.evaluate.diagnostics.roles import role_of
from attnconv.evaluate.packaged import data_file
from attnconv.evaluate.textfile import load_tokens
from attnconv.recipes import load_recipe, parse_recipe

BASE = str(embedded_model_path())
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def diagonal(length: int, distance: int) -> Tensor:
    """Every query looks at one key, so many tokens back; at the first where there is none."""
    position = torch.arange(length)
    return torch.nn.functional.one_hot((position - distance).clamp_min(0), length).float()


def uniform(length: int) -> Tensor:
    rows = torch.ones(length, length).tril()
    return rows / rows.sum(-1, keepdim=True)


def part(weights: Tensor, start: int) -> Tensor:
    return weights[..., start:, :]


@pytest.mark.parametrize("distance", [0, 3, 11])
def test_distances_of_a_head_that_looks_back(distance: int) -> None:
    late = part(diagonal(40, distance), 20)
    assert measures.mean_distance(late).item() == distance
    assert measures.covering_distance(late).item() == distance
    assert [each.item() for each in measures.mean_distances(late)] == [distance, 0]
    assert measures.mass_ahead(late).item() == 0
    assert measures.entropy(late).item() == 0
    assert measures.local_mass(late, distance + 1).item() == 1
    assert measures.local_mass(late, distance).item() == 0
    assert measures.monotonicity(late).item() == 1


def test_distances_in_both_directions() -> None:
    """A quarter on the key two behind, the rest on the one four ahead."""
    length = 30
    gap = torch.arange(length)[:, None] - torch.arange(length)
    weights = (0.25 * (gap == 2) + 0.75 * (gap == -4))[4:26].float()
    # Queries must stand at the right end of the keys.
    weights = torch.nn.functional.pad(weights, (0, 0, 4, 4))
    weights[:4, 0], weights[26:, -1] = 1.0, 1.0
    behind, ahead = measures.mean_distances(weights[None])
    by_hand = [
        (weights * (gap * side).clamp_min(0)).sum() / (weights * (gap * side >= (side < 0))).sum() for side in (1, -1)
    ]
    torch.testing.assert_close(behind[0], by_hand[0])
    torch.testing.assert_close(ahead[0], by_hand[1])
    torch.testing.assert_close(measures.mass_ahead(weights), (weights * (gap < 0)).sum() / length)
    assert measures.covering_distance(weights, 0.9).item() == 4


def test_covering_distance_and_sinks() -> None:
    """Half on the first token, half spread over the last ten."""
    near = (torch.arange(100)[:, None] - torch.arange(100)).clamp_min(0)
    weights = 0.05 * ((near < 10) & torch.ones(100, 100).tril().bool())
    weights[:, 0] += 0.5
    late = part(weights, 60)[None]
    # 0.5 + 8 * 0.05 = 0.9 without a distance; with the sinks free that is 8 tokens, the query among them.
    assert 1 + measures.covering_distance(late, 0.9, num_sinks=4).item() == 8
    assert measures.covering_distance(late, 0.4).item() == 7
    assert measures.covering_distance(late, 0.9).item() > 60
    assert measures.covering_distance(late, 0.3, num_sinks=4).item() == 0
    torch.testing.assert_close(measures.sink_mass(late), torch.tensor([0.5]))
    torch.testing.assert_close(measures.local_mass(late, 4), torch.tensor([0.2]))
    torch.testing.assert_close(measures.streaming_mass(late, 4), torch.tensor([0.7]))


def test_entropy_and_monotonicity() -> None:
    flat = uniform(50)
    expected = sum(math.log(position + 1) for position in range(50)) / 50
    assert measures.entropy(flat).item() == pytest.approx(expected)
    assert measures.relative_entropy(flat, causal=True).item() == pytest.approx(1)
    both_ways = torch.full((50, 50), 0.5)
    assert measures.relative_entropy(both_ways, causal=False).item() == pytest.approx(1)
    assert measures.monotonicity(flat).item() == 1
    # Every other query looks back to the start, the first two look at it both.
    jumping = torch.where(torch.arange(51)[:, None] % 2 == 0, diagonal(51, 0), diagonal(51, 51))
    assert measures.monotonicity(jumping).item() == pytest.approx(26 / 50)
    # Only queries behind the sinks count: those before them cannot look elsewhere.
    assert measures.sink_mass(diagonal(50, 0), 4).item() == 0
    assert measures.sink_mass(diagonal(50, 50), 4).item() == 1


def test_induction_score() -> None:
    """Tokens 1 to 10 twice: the second time each query looks at what came after its own token the first time."""
    copying = diagonal(21, 9)
    assert measures.induction_score(copying, 10).item() == 1
    assert measures.induction_score(diagonal(21, 10), 10).item() == 0
    assert measures.induction_score(uniform(21), 10).item() == pytest.approx(
        sum(1 / (position + 1) for position in range(11, 21)) / 10
    )


def test_measures_are_of_proportions_and_of_every_head() -> None:
    weights = torch.rand(2, 3, 30, 30).tril()
    alone = torch.stack([torch.stack([measures.entropy(head) for head in row]) for row in weights])
    torch.testing.assert_close(measures.entropy(7 * weights), alone)
    assert measures.covering_distance(weights).shape == measures.monotonicity(weights).shape == (2, 3)
    empty = measures.normalised(torch.zeros(2, 2))
    assert (empty == 0).all()


def test_maps_are_shrunk_by_their_largest_weight() -> None:
    weights = uniform(12).expand(2, 3, 12, 12)
    assert shrink_map(weights, 12) is weights
    small = shrink_map(weights, 4)
    assert small.shape == (2, 3, 4, 4)
    expected = uniform(12).view(4, 3, 4, 3).amax((1, 3))
    torch.testing.assert_close(small[0, 0], expected)


@pytest.mark.parametrize(
    ("induction", "local", "streaming", "role"),
    [
        (0.5, 0.99, 0.99, "retrieval"),
        (0.1, 0.99, 0.99, "local"),
        (None, 0.5, 0.96, "streaming"),
        (0.0, 0.5, 0.9, "global"),
    ],
)
def test_roles(induction: float | None, local: float, streaming: float, role: str) -> None:
    assert role_of(induction=induction, local=local, streaming=streaming) == role


@pytest.fixture(scope="module")
def diagnosis() -> Diagnosis:
    return diagnose_model(BASE, text="book", tokens=256, context=128, window=16)


def test_a_real_model(diagnosis: Diagnosis) -> None:
    assert (diagnosis.model_type, diagnosis.tokens, diagnosis.context) == ("llama", 256, 128)
    assert [layer.name for layer in diagnosis.layers] == [f"model.layers.{n}.self_attn" for n in range(5)]
    assert diagnosis.skipped == ()
    assert sum(diagnosis.role_counts.values()) == 5 * 8
    for layer in diagnosis.layers:
        for head in layer.heads:
            masses = (head.sink_mass, head.local_mass, head.streaming_mass, head.relative_entropy, head.monotonicity)
            assert all(0 <= mass <= 1 for mass in masses)
            assert head.local_mass <= head.streaming_mass
            assert 0 < head.mean_distance < 128
            assert (head.ahead, head.mass_ahead) == (0, 0)
            assert head.behind == pytest.approx(head.mean_distance)
            assert head.induction is not None
    saved = json.loads(json.dumps(diagnosis.to_dict()))
    assert saved["layers"][0]["role_counts"] == diagnosis.layers[0].role_counts


def test_it_is_what_transformers_returns(diagnosis: Diagnosis) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE, attn_implementation="eager")
    stream = load_tokens(data_file("book"), AutoTokenizer.from_pretrained(BASE), context=128, limit=256)
    with torch.no_grad():
        rows = [model(input_ids=window[None], output_attentions=True).attentions for window in stream.split(128)]
    for layer, profile in enumerate(diagnosis.layers):
        late = torch.cat([attentions[layer] for attentions in rows])[:, :, 64:].double()
        distance = (torch.arange(64, 128)[:, None] - torch.arange(128)).abs()
        mean = (late * distance).sum(-1).mean((0, 2))
        assert [head.mean_distance for head in profile.heads] == pytest.approx(mean.tolist(), rel=1e-4)
        sinks = late[..., :4].sum(-1).mean((0, 2))
        assert [head.sink_mass for head in profile.heads] == pytest.approx(sinks.tolist(), rel=1e-4)


def test_a_loaded_model_is_left_as_it_was() -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE).train()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[tuple[int, int]] = []
    arguments: dict[str, Any] = {"text": "book", "tokens": 64, "context": 64, "window": 8}
    found = diagnose_model(model, tokenizer=tokenizer, progress=lambda *done: seen.append(done), **arguments)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(found.layers) == 5
    assert seen[-1][0] == seen[-1][1] > 64
    assert sorted(seen) == seen


def test_repeated_tokens_and_their_score() -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), AutoModelForCausalLM.from_pretrained(BASE)
    parts, period = diagnose._repeated(tokenizer, model, 64)
    assert period == 31
    assert len({tuple(part.tolist()) for part in parts}) == len(parts) == diagnose.REPETITIONS
    for ids in parts:
        assert ids[0] == tokenizer.bos_token_id
        assert torch.equal(ids[1:32], ids[32:])
        assert len(set(ids[1:32].tolist())) == 31
    calls = []
    watch_tokens(model, parts[0][None], lambda call: calls.append(call.weights()), ["model.layers.0.self_attn"])
    (weights,) = calls
    # By index: the query at 32 + i holds token i, whose first copy at 1 + i is followed by the key 2 + i.
    expected = torch.stack([weights[0, :, 32 + i, 2 + i] for i in range(31)]).mean(0)
    torch.testing.assert_close(measures.induction_score(weights, 31)[0], expected)


def test_a_bidirectional_model_is_seen_both_ways(tmp_path: Path) -> None:
    words = ["the", "first", "objects", "that", "assume", "a", "presence", "before", "me", "as", "i", "look", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES))
    found = diagnose_model(model, tokenizer=tokenizer, text="book", tokens=128, context=64, window=8)
    assert len(found.layers) == 2
    for layer in found.layers:
        assert not layer.causal
        for head in layer.heads:
            assert head.induction is None
            assert 0.3 < head.mass_ahead < 0.7
            assert head.ahead > 10
            assert head.behind > 10
    plot_diagnosis(found, tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000


def test_what_cannot_be_diagnosed(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    small: dict[str, Any] = {"text": "book", "tokens": 64, "context": 64, "window": 8}
    model = convert_model(AutoModelForCausalLM.from_pretrained(BASE), "lolcats")
    with pytest.raises(CheckpointError, match="is a conversion already"):
        diagnose_model(model, tokenizer=tokenizer, **small)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a conversion already"):
        diagnose_model(tmp_path, **small)
    with pytest.raises(CheckpointError, match="without a tokenizer"):
        diagnose_model(AutoModelForCausalLM.from_pretrained(BASE), **small)
    twice = AutoModelForCausalLM.from_config(DiffLlamaConfig(vocab_size=512, num_key_value_heads=2, **SIZES))
    with pytest.raises(PlanError, match="runs 2 times"):
        diagnose_model(twice, tokenizer=tokenizer, **small)
    with pytest.raises(DataError, match="at most a quarter"):
        diagnose_model(BASE, text="book", context=64, window=17)
    with pytest.raises(DataError, match="at least the context"):
        diagnose_model(BASE, text="book", tokens=63, context=64, window=8)
    (tmp_path / "short.txt").write_text("Once upon a time.")
    with pytest.raises(DataError, match="needs four times as many"):
        diagnose_model(BASE, **{**small, "text": tmp_path / "short.txt"})
    t5 = T5Config(vocab_size=512, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2)
    with pytest.raises(CheckpointError, match="takes one text"):
        diagnose_model(T5ForConditionalGeneration(t5), tokenizer=tokenizer, **small)


def test_layers_with_a_window_of_their_own_keep_it() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=512, sliding_window=16, num_key_value_heads=2, head_dim=8, **SIZES)
    found = diagnose_model(
        AutoModelForCausalLM.from_config(config),
        tokenizer=AutoTokenizer.from_pretrained(BASE),
        text="book",
        tokens=128,
        context=128,
        window=16,
    )
    assert [layer.native_window for layer in found.layers] == [16, None]
    assert all(head.local_mass == pytest.approx(1) for head in found.layers[0].heads)
    first, second = recommend(found)
    assert (first.method, first.reason) == ("softmax", "it sees no more than 16 tokens by itself")
    assert second.method != "softmax"


def head(number: int, role: str = "global", window_90: float = 300.0, induction: float = 0.0) -> HeadProfile:
    return HeadProfile(number, role, 50, 60, window_90, 2, 0.5, 0.1, 0.5, 0.6, 0.7, induction, 50, 0, 0)  # type: ignore[arg-type]


def layer(index: int, *heads: HeadProfile, **more: Any) -> LayerProfile:
    return LayerProfile(index, f"model.layers.{index}.self_attn", heads, **more)


def advised(*layers: LayerProfile, skipped: tuple[SkippedLayer, ...] = ()) -> Diagnosis:
    return Diagnosis("some/model", "llama", "book", 1024, 512, 64, layers, skipped)


def test_advice() -> None:
    narrow = [head(number, "streaming", window) for number, window in enumerate((10, 60, 100.5, 5, 7))]
    wide = [head(number) for number in range(5)]
    copying = [head(0, "retrieval", induction=0.8), *(head(number) for number in range(1, 5))]
    one_of_many = [head(0, "retrieval", 20, induction=0.3), *(head(number, "local", 20) for number in range(1, 6))]
    found = recommend(
        advised(
            layer(0, *wide),
            layer(1, *narrow),
            layer(2, *copying),
            layer(3, *one_of_many),
            layer(5, *wide, native_window=32),
            skipped=(SkippedLayer(4, "model.layers.4.self_attn", "it runs 2 times"),),
        )
    )
    assert [(one.layer, one.method) for one in found] == [
        (0, "lolcats"),
        (1, "sliding_window"),
        (2, "softmax"),
        (3, "lolcats"),
        (4, "softmax"),
        (5, "softmax"),
    ]
    assert found[0].options == load_recipe("hybrid").attention[-1].options
    assert "5 of 5 heads need more than 128 tokens" in found[0].reason
    assert found[1].options == {"window": 128, "num_sinks": 4}
    assert "101 newest" in found[1].reason
    assert found[2].reason.startswith("1 of 5 heads retrieve, the best with 80 %")
    assert found[3].reason == "1 of 6 heads retrieve, which a window would end"
    assert found[4].reason == "it runs 2 times"


def test_the_quarter_that_retrieves_best_keeps_softmax() -> None:
    inductions = {1: 0.3, 4: 0.9, 6: 0.5}
    layers = (
        layer(n, head(0, "retrieval" if n in inductions else "global", induction=inductions.get(n, 0.05)))
        for n in range(8)
    )
    found = recommend(advised(*layers))
    assert [one.layer for one in found if one.method == "softmax"] == [4, 6]


@pytest.mark.parametrize(("needed", "window"), [(1, 16), (16, 16), (16.2, 32), (64, 64), (128, 128)])
def test_windows_are_powers_of_two(needed: float, window: int) -> None:
    (advice,) = recommend(advised(layer(0, head(0, "local", needed))))
    assert (advice.method, advice.options["window"]) == ("sliding_window", window)


def test_the_recipe_of_an_advice(tmp_path: Path, diagnosis: Diagnosis) -> None:
    narrow, wide = head(0, "local", 20), head(0)
    found = recommend(advised(*(layer(n, wide if n in (2, 3, 6) else narrow) for n in range(7))))
    text = advice_yaml(found, source="some/model: a test")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    assert [(str(rule.layers), rule.method) for rule in recipe.attention] == [
        ("0-1", "sliding_window"),
        ("2-3", "lolcats"),
        ("4-5", "sliding_window"),
        ("6", "lolcats"),
    ]
    shipped = load_recipe("lolcats-plus")
    assert (recipe.stages, recipe.data) == (shipped.stages, shipped.data)
    assert "some/model: a test" in recipe.description
    for one in found:
        assert f"# {one.layer}: {one.reason}." in text
    model = AutoModelForCausalLM.from_pretrained(BASE)
    own = parse_recipe(advice_yaml(recommend(diagnosis)))
    plan = make_plan(own.attention, probe(model.config, type(model)))
    assert [entry.method for entry in plan.entries] == [one.method for one in recommend(diagnosis)]


def test_softmax_layers_are_healed_around_as_in_a_hybrid() -> None:
    copying = layer(0, head(0, "retrieval", induction=0.9))
    mixed = parse_recipe(advice_yaml(recommend(advised(copying, *(layer(n, head(0)) for n in range(1, 4))))))
    assert [rule.method for rule in mixed.attention] == ["softmax", "lolcats"]
    assert mixed.attention[1].options == load_recipe("hybrid").attention[-1].options
    assert mixed.stages == load_recipe("hybrid").stages
    assert [stage.kind for stage in mixed.stages] == ["attention_transfer"]


def test_recipes_that_train_nothing() -> None:
    narrow = recommend(advised(layer(0, head(0, "local", 20))))
    assert parse_recipe(advice_yaml(narrow, name="narrow")).stages == []
    kept = advice_yaml(recommend(advised(layer(0, head(0, "retrieval", induction=0.9)))))
    recipe = parse_recipe(kept)
    assert [rule.method for rule in recipe.attention] == ["softmax"]
    assert "softmax kept" in recipe.description


def test_the_picture(tmp_path: Path, diagnosis: Diagnosis) -> None:
    plot_diagnosis(diagnosis, tmp_path / "heads.png")
    content = (tmp_path / "heads.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
    with pytest.raises(OutputError, match="picture .* cannot be written"):
        plot_diagnosis(diagnosis, tmp_path / "missing" / "heads.png")
