"""Dense models with logits large enough to see an error in, and how a mixture made of one is compared with it."""

from pathlib import Path
from typing import Any

import rewritten
import torch
from rewritten import EXACT, PROMPTS, loaded, logits
from transformers import AutoModelForCausalLM, PreTrainedModel

from attnconv.recipes import Recipe

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": rewritten.SIZES["initializer_range"],
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def dense(kind: str, folder: Path, **settings: Any) -> Path:
    return rewritten.dense(kind, folder, sizes=SIZES, **settings)


def branch(base: Path, folder: Path, *, seed: int) -> Path:
    """The model after some training: every weight is a little off."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def experts(**settings: Any) -> Recipe:
    return Recipe(name="experts", rewrite=[{"kind": "experts", **settings}])


def assert_equal(base: Path, result: Path) -> PreTrainedModel:
    """The same logits and the same greedy text."""
    old, new = loaded(base), loaded(result)
    before = logits(old)
    assert (logits(new) - before).abs().max() <= EXACT * before.abs().max()
    texts = [model.generate(PROMPTS, max_new_tokens=12, do_sample=False) for model in (old, new)]
    assert torch.equal(*texts)
    return new
