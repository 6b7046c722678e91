import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from attnconv import convert_model
from attnconv.errors import CheckpointError
from attnconv.evaluate import load_tokens
from attnconv.evaluate.engine.bootstrap import make_figures
from attnconv.evaluate.engine.items import Item
from attnconv.evaluate.engine.models import load_evaluated, open_evaluated
from attnconv.evaluate.tasks import agreement
from attnconv.evaluate.tasks.agreement import AgreementSettings, AgreementTask, compare_predictions
from attnconv.evaluate.tasks.base import EvaluatedModel, Scope
from attnconv.evaluate.tasks.packaged import packaged_file
from attnconv.packaged.model import embedded_model_path

BASE = str(embedded_model_path())


def evaluated_of(model: LlamaForCausalLM, folder: Path) -> EvaluatedModel:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    evaluated = open_evaluated("model", str(folder))
    load_evaluated(evaluated, device="cpu")
    return evaluated


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedModel:
    model = convert_model(AutoModelForCausalLM.from_pretrained(BASE), "lolcats", window=32)
    found = evaluated_of(model, tmp_path_factory.mktemp("model"))
    found.base = open_evaluated("base", BASE)
    load_evaluated(found.base, device="cpu")
    return found


@pytest.fixture
def other_base(evaluated: EvaluatedModel) -> Iterator[EvaluatedModel]:
    own = evaluated.base
    yield evaluated
    evaluated.base = own


def score(evaluated: EvaluatedModel, scope: Scope = Scope(), **settings: object) -> list[Item]:  # noqa: B008
    task = AgreementTask(AgreementSettings(**settings))
    with torch.inference_mode():
        return [item for unit in task.units(evaluated, scope) for item in task.measure(evaluated, unit).items]


@pytest.mark.parametrize("at_once", [512 * 8 * 3, 2**24])
@torch.inference_mode()
def test_equals_the_definition(evaluated: EvaluatedModel, at_once: int, monkeypatch) -> None:
    monkeypatch.setattr(agreement, "LOGITS_AT_ONCE", at_once)
    items = score(evaluated, tokens=500, context=200)
    stream = load_tokens(packaged_file("book"), evaluated.tokenizer, context=200, limit=500)
    expected = []
    for window in stream.split(200):
        logits = [each.model(window[None]).logits[0] for each in (evaluated.base, evaluated)]
        base, model = [each.double().log_softmax(-1) for each in logits]
        for block in torch.arange(len(window)).split(128):
            kl = functional.kl_div(model[block], base[block], log_target=True, reduction="sum")
            same = (logits[0][block].argmax(-1) == logits[1][block].argmax(-1)).sum()
            expected.append((float(kl), float(same), len(block)))
    assert [item.id for item in items[:3]] == ["window 0, 0-127", "window 0, 128-199", "window 1, 0-127"]
    assert [item.values["kl"] for item in items] == pytest.approx([kl for kl, _, _ in expected], rel=1e-4)
    assert [(item.values["same"], item.values["tokens"]) for item in items] == [row[1:] for row in expected]
    figures = {figure.metric: figure.model for figure in make_figures(items, None, AgreementTask.metrics, [()])}
    assert figures["KL divergence"] == pytest.approx(sum(kl for kl, _, _ in expected) / 500, rel=1e-4)
    assert figures["top-1 agreement"] == pytest.approx(sum(same for _, same, _ in expected) / 500)
    assert 0 < figures["top-1 agreement"] < 1


def test_a_model_agrees_with_itself(other_base: EvaluatedModel) -> None:
    other_base.base = other_base
    for item in score(other_base, tokens=256, context=128):
        assert item.values == {"kl": 0.0, "same": 128.0, "tokens": 128}


def test_batches_and_limits(evaluated: EvaluatedModel) -> None:
    one = score(evaluated, Scope(None, 1), tokens=300, context=64)
    many = score(evaluated, Scope(None, 4), tokens=300, context=64)
    assert [item.id for item in one] == [item.id for item in many]
    assert [i.values["kl"] for i in many] == pytest.approx([i.values["kl"] for i in one], rel=1e-4)
    assert score(evaluated, Scope(2, 1), tokens=300, context=64) == one[:2]


def test_a_padded_vocabulary_is_compared_over_what_both_have(evaluated: EvaluatedModel, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.resize_token_embeddings(520)
    with torch.no_grad():
        # Were the padding counted, it would take all probability.
        model.lm_head.weight[512:] = 100 * model.lm_head.weight[:8]
    padded = evaluated_of(model, tmp_path)
    padded.base = evaluated.base
    assert padded.model.config.vocab_size == 520
    for item in score(padded, tokens=128, context=64):
        assert item.values["kl"] == pytest.approx(0, abs=1e-3)
        assert item.values["same"] == 64


class Fixed(GPT2LMHeadModel):
    """Answers with the logits it was given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(GPT2Config(vocab_size=6, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0))
        self.given = logits

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = self.given[: input_ids.shape[1]].expand(len(input_ids), -1, -1)
        return output


def test_tokens_that_are_ruled_out() -> None:
    ruled_out = torch.tensor([[0.0, 0.0] + [-torch.inf] * 4])
    base, model = Fixed(ruled_out.expand(4, 6)), Fixed(torch.zeros(4, 6))
    ids = torch.zeros(1, 4, dtype=torch.long)
    # Two tokens at 1/2 each, against 1/6 each.
    assert compare_predictions(base, model, ids)[0].tolist() == [pytest.approx([math.log(3)] * 4, rel=1e-5)]
    assert compare_predictions(model, base, ids)[0].tolist() == [[torch.inf] * 4]
    assert compare_predictions(base, base, ids)[0].tolist() == [[0.0] * 4]


def test_rounding_makes_no_divergence_negative() -> None:
    logits = 3 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    base, model = Fixed(logits), Fixed(logits + 1e-6)
    divergence, _ = compare_predictions(base, model, torch.zeros(1, 64, dtype=torch.long))
    assert divergence.min() >= 0
    assert divergence.max() < 1e-6


def test_what_cannot_be_compared(other_base: EvaluatedModel, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.config.max_position_embeddings = 100
    short = evaluated_of(model, tmp_path / "short")
    other_base.base = short
    with pytest.raises(CheckpointError, match="has 100 positions, but 128 are compared"):
        score(other_base, tokens=256, context=128)
    assert score(other_base, tokens=100, context=100)
    short.tokenizer.add_tokens(["Lily"])
    with pytest.raises(CheckpointError, match="different tokens"):
        AgreementTask(AgreementSettings()).units(other_base, Scope())
    other_base.base = None
    task = AgreementTask(AgreementSettings(tokens=64, context=64))
    (unit,) = task.units(other_base, Scope())
    with pytest.raises(CheckpointError, match="no base was named"):
        task.measure(other_base, unit)
