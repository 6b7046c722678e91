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

from attnconv import convert_model
from attnconv.errors import CheckpointError, DataError, OutputError, PlanError
from attnconv.evaluate.diagnose import (
    Diagnosis,
    diagnose,
    diagnose_model,
    measures,
    plot_diagnosis,
    recommend,
)
from attnconv.evaluate.diagnose.maps import shrink_map, watch_tokens
from attnconv.evaluate.diagnose.roles import role_of
from attnconv.evaluate.tasks.packaged import data_file
from attnconv.evaluate.tasks.textfile import load_tokens
from attnconv.packaged.model import embedded_model_path

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
    seen: list[tuple[int, int, str]] = []
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


def test_the_picture(tmp_path: Path, diagnosis: Diagnosis) -> None:
    plot_diagnosis(diagnosis, tmp_path / "heads.png")
    content = (tmp_path / "heads.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000
    with pytest.raises(OutputError, match="picture .* cannot be written"):
        plot_diagnosis(diagnosis, tmp_path / "missing" / "heads.png")
