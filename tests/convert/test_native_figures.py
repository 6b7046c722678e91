"""SmolLM2 with pooled and latent attention, before any healing: perplexities that are not to get worse."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnconv.evaluate import load_tokens, perplexity
from attnconv.recipes import Recipe
from attnconv.runs import run_conversion

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(repository: Path) -> Path:
    folder = Path(os.environ.get("ATTNCONV_MODELS") or repository.parent / "models") / "smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        pytest.skip(f"needs SmolLM2-135M-Instruct, and {folder} is none; ATTNCONV_MODELS names the folder above it")
    return folder


@pytest.mark.parametrize(
    ("step", "bound"),
    [
        ({"kind": "pool_heads", "kv_heads": 1}, 190),
        ({"kind": "latent", "numbers": 256}, 18.5),
        ({"kind": "latent", "numbers": 192}, 27),
    ],
)
def test_perplexity_before_healing(
    smollm2: Path, shared: Path, tmp_path: Path, step: dict[str, Any], bound: float
) -> None:
    text = shared / "data" / "train" / "wikipedia_paragraphs.jsonl.gz"
    calibrate = {"path": str(text), "tokens": 4096, "sequence_length": 1024}
    steps = [{"kind": "cast", "dtype": "float32"}, {**step, "calibrate": calibrate}]
    run_conversion(smollm2, Recipe(name="native", rewrite=steps), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    valid = shared / "data" / "eval" / "wikitext2_valid_detok.txt.gz"
    tokens = load_tokens(valid, tokenizer, context=1024, limit=5120)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert perplexity(model, tokens, context=1024, limit=5120, tokenizer=tokenizer).perplexity <= bound
