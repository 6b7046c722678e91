import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from attnconv.errors import DataError
from attnconv.evaluate import perplexity as perplexity_function
from attnconv.evaluate.tasks.perplexity import perplexity

# The room exports the function under the module's own name.
MODULE = importlib.import_module("attnconv.evaluate.tasks.perplexity")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KEY_VALUE = {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": LlamaConfig(vocab_size=97, **SIZES, **KEY_VALUE),
    "gemma2": Gemma2Config(vocab_size=97, final_logit_softcapping=0.5, **SIZES, **KEY_VALUE),
    "cohere": CohereConfig(vocab_size=97, logit_scale=0.3, **SIZES, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
}


def tiny(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.eval()


@torch.no_grad()
def by_hand(model: PreTrainedModel, windows: list[list[int]]) -> tuple[float, int]:
    total, count = 0.0, 0
    for window in windows:
        log_p = model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        for position in range(1, len(window)):
            total -= float(log_p[position - 1, window[position]])
            count += 1
    return total / count, count


def test_the_room_exports_the_function() -> None:
    assert perplexity_function is perplexity


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("at_once", [1, 97 * 3, 2**24])
def test_equals_the_definition_however_the_head_is_cut(name: str, at_once: int, monkeypatch) -> None:
    monkeypatch.setattr(MODULE, "LOGITS_AT_ONCE", at_once)
    model = tiny(CONFIGS[name])
    ids = torch.randint(0, 97, (50,))
    expected, count = by_hand(model, [w.tolist() for w in ids.split(16)])
    result = perplexity(model, ids, context=16)
    assert count == result.tokens == 46
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.bits_per_character is None
    assert result.characters is None
    assert "forward" not in model.base_model.__dict__


class Mixing(LlamaForCausalLM):
    """Does something between its layers and its head that slices of positions do not give."""

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> SimpleNamespace:
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden + hidden.cumsum(1)))


class Choosy(LlamaForCausalLM):
    """Wants more of its layers' answer than the last hidden states."""

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> SimpleNamespace:
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        if hidden.shape[1] not in (4, 16):
            raise RuntimeError("shapes do not fit")
        return SimpleNamespace(logits=self.lm_head(hidden))


@pytest.mark.parametrize("model_class", [Mixing, Choosy])
def test_a_head_that_takes_no_slices_gives_all_logits_at_once(model_class: type, monkeypatch) -> None:
    monkeypatch.setattr(MODULE, "LOGITS_AT_ONCE", 97 * 3)
    model, ids = model_class(CONFIGS["llama"]).eval(), torch.randint(0, 97, (32,))
    expected, _ = by_hand(model, [w.tolist() for w in ids.split(16)])
    assert perplexity(model, ids, context=16).nll == pytest.approx(expected, rel=1e-5)


def test_the_limit_counts_tokens_of_the_stream() -> None:
    model, ids = tiny(CONFIGS["llama"]), torch.randint(0, 97, (50,))
    assert perplexity(model, ids, context=16, limit=33) == perplexity(model, ids[:32], context=16)
    assert perplexity(model, ids, context=16, limit=20) == perplexity(model, ids[:20], context=16)


def test_rows_are_separate_texts() -> None:
    model, ids = tiny(CONFIGS["llama"]), torch.randint(0, 97, (3, 20))
    windows = [part.tolist() for row in ids for part in row.split(16)]
    assert perplexity(model, ids, context=16).nll == pytest.approx(by_hand(model, windows)[0], rel=1e-5)
    assert perplexity(model, ids, context=20, limit=30).nll == pytest.approx(
        by_hand(model, [ids[0].tolist(), ids[1, :10].tolist()])[0], rel=1e-5
    )


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batches_change_nothing(batch_size: int) -> None:
    model, ids = tiny(CONFIGS["llama"]), torch.randint(0, 97, (100,))
    one = perplexity(model, ids, context=16)
    many = perplexity(model, ids, context=16, batch_size=batch_size)
    assert many.nll == pytest.approx(one.nll, rel=1e-6)
    assert many.tokens == one.tokens


def test_progress_and_training_mode() -> None:
    model, calls = tiny(CONFIGS["llama"]).train(), []
    perplexity(model, torch.randint(0, 97, (50,)), context=16, progress=lambda *done: calls.append(done))
    assert [call[:2] for call in calls] == [(16, 50), (32, 50), (48, 50), (50, 50)]
    assert model.training


def test_short_and_wrong_input() -> None:
    model, ids = tiny(CONFIGS["llama"]), torch.randint(0, 97, (50,))
    for arguments, match in [
        ({"token_ids": ids[:1], "context": 16}, "fewer than two tokens"),
        ({"token_ids": ids, "context": 16, "limit": 1}, "fewer than two tokens"),
        ({"token_ids": ids, "context": 1}, "context is 1"),
        ({"token_ids": ids[None, None], "context": 16}, "shape"),
        ({"token_ids": ids, "context": 16, "batch_size": 0}, "batch_size is 0"),
    ]:
        with pytest.raises(DataError, match=match):
            perplexity(model, **arguments)


def test_predictions_that_are_not_finite_are_said(caplog) -> None:
    model = tiny(CONFIGS["llama"])
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    assert math.isnan(perplexity(model, torch.randint(0, 97, (8,)), context=8).perplexity)
    assert "not finite" in caplog.text


def test_a_trained_model_on_its_own_samples(repository: Path) -> None:
    assets = repository / "packaged" / "assets"
    model = AutoModelForCausalLM.from_pretrained(assets / "stories260K")
    tokenizer = AutoTokenizer.from_pretrained(assets / "stories260K")
    rows = torch.from_numpy(np.load(assets / "samples.npz")["valid"][:16].astype(np.int64))
    result = perplexity(model, rows, context=384, batch_size=4, tokenizer=tokenizer)
    assert 3.2 < result.perplexity < 4.0
    assert result.tokens == 16 * 383
    assert result.bits_per_character == pytest.approx(result.nll * result.tokens / result.characters / math.log(2))
    text = "".join(tokenizer.decode(row[1:].tolist(), skip_special_tokens=True) for row in rows)
    assert abs(result.characters - len(text)) <= 16
