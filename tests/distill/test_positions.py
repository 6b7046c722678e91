"""Perplexity by position, which a recipe asks for: measured before and at the end, kept, and warned about."""

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from attnconv.distill.health import warn_if_lost_behind
from attnconv.distill.measuring import perplexity_by_position
from attnconv.errors import RecipeError
from attnconv.packaged.model import embedded_model_path, embedded_tokens
from attnconv.recipes import load_recipe
from attnconv.runs import run_conversion

RECIPE = """
name: near
attention: [{layers: all, method: sliding_window, options: {window: 8}}]
evaluate: {embedded: true, tokens: 200, context: 100, by_position: [16, 64, 4096]}
"""


@pytest.fixture
def recipe(tmp_path):
    def load(text=RECIPE):
        (tmp_path / "near.yaml").write_text(text)
        return load_recipe(tmp_path / "near.yaml")

    return load


def test_each_token_counts_where_it_stands():
    model = AutoModelForCausalLM.from_pretrained(embedded_model_path()).eval()
    tokens = embedded_tokens("valid").flatten()[:130]
    found = perplexity_by_position(model, tokens, [16, 64])
    windows = tokens[:128].long().view(2, 64)
    with torch.no_grad():
        log_shares = model(windows).logits.log_softmax(-1)
    losses = -log_shares[:, :-1].gather(-1, windows[:, 1:, None])[..., 0]
    expected = {"0-16": losses[:, :15].mean().exp(), "16-64": losses[:, 15:].mean().exp()}
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


def test_metrics_receipt_and_card_carry_it(recipe, tmp_path):
    result = run_conversion(embedded_model_path(), recipe(), tmp_path / "model", device="cpu")
    teacher, swap = result.metrics
    # The model has 512 positions.
    names = [f"novel_perplexity_at_{stretch}" for stretch in ("0-16", "16-64", "64-512")]
    assert [name for name in teacher if "novel" in name] == [name for name in swap if "novel" in name] == names
    # Eight tokens are all there is at first, and too few later.
    assert swap[names[0]] / teacher[names[0]] < swap[names[2]] / teacher[names[2]]
    receipt = json.loads((tmp_path / "model" / "receipt.json").read_text())
    assert receipt["metrics"] == [dict(row) for row in result.metrics]
    assert "| novel perplexity at 64-512 |" in (tmp_path / "model" / "README.md").read_text()


def test_a_recipe_that_does_not_ask_for_it_gets_none(recipe, tmp_path):
    plain = recipe(RECIPE.replace(", by_position: [16, 64, 4096]", ""))
    result = run_conversion(embedded_model_path(), plain, tmp_path / "model", device="cpu")
    assert not any("novel" in key for row in result.metrics for key in row)


def test_what_falls_apart_behind_a_position_is_told(caplog):
    base = {"0-512": 10.0, "512-1024": 9.0, "1024-4096": 8.0}
    with caplog.at_level(logging.WARNING, "attnconv"):
        warn_if_lost_behind(base, {"0-512": 20.0, "512-1024": 18.0, "1024-4096": 17.0})
        assert not caplog.records
        warn_if_lost_behind(base, {"0-512": 11.0, "512-1024": 9.9, "1024-4096": 32.0})
    (record,) = caplog.records
    assert "falls apart behind position 1,024" in record.getMessage()
    assert "4.00 x the base's at positions 1024-4096, and 1.10 x at 0-512" in record.getMessage()
    warn_if_lost_behind(base, {"0-512": 11.0, "512-1024": float("nan"), "1024-4096": 32.0})
    assert "behind position 512" in caplog.records[-1].getMessage()


def test_positions_must_rise(recipe):
    with pytest.raises(RecipeError, match=r"must rise, such as \[512, 2048\], got \[64, 16\]"):
        recipe(RECIPE.replace("[16, 64, 4096]", "[64, 16]"))
