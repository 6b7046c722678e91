"""Dense models with logits large enough to see an error in, and how a mixture made of one is compared with it."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import save
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from attnconv.recipes import Recipe

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large enough for logits in which an error would be seen.
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPTS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
EXACT = 2e-6
"""Relative to the largest logit, in float32."""


def dense(kind: str, folder: Path, **settings: Any) -> Path:
    """A random model whose norms and biases are not what they would be at the start of a training."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings}))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return save(model, folder)


def experts(**settings: Any) -> Recipe:
    return Recipe(name="experts", rewrite=[{"kind": "experts", **settings}])


def loaded(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPTS).logits


def assert_equal(base: Path, result: Path) -> PreTrainedModel:
    """The same logits and the same greedy text."""
    old, new = loaded(base), loaded(result)
    before = logits(old)
    assert (logits(new) - before).abs().max() <= EXACT * before.abs().max()
    texts = [model.generate(PROMPTS, max_new_tokens=12, do_sample=False) for model in (old, new)]
    assert torch.equal(*texts)
    return new
