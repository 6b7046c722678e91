"""Tiny random models to rewrite, and what a rewritten one must have in common with them."""

import json
from pathlib import Path
from typing import Any

import fresh_process
import torch
from safetensors.torch import load_file
from tiny_models import save
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from attnconv.recipes import Recipe

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
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
LOAD = """
import sys
import torch
from safetensors.torch import save_file
sys.modules["attnconv"] = None
from transformers import AutoModelForCausalLM
prompts = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    save_file({"logits": AutoModelForCausalLM.from_pretrained(sys.argv[1])(prompts).logits}, sys.argv[2])
"""


def dense(kind: str, folder: Path, *, sizes: dict[str, Any] = SIZES, **settings: Any) -> Path:
    """A random model whose norms and biases are not what they would be at the start of a training."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **settings}))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return save(model, folder)


def word_tokenizer(folder: Path) -> Path:
    """A tokenizer with the words `w3` to `w95` beside a model, and a text of them; gives the text's file."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 96)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    drawn = torch.randint(3, 96, (30, 40), generator=torch.Generator().manual_seed(1)).tolist()
    text = folder.parent / "text.jsonl"
    lines = (json.dumps({"text": " ".join(f"w{number}" for number in row)}) for row in drawn)
    text.write_text("\n".join(lines), encoding="utf-8")
    return text


def rewriting(*steps: dict[str, Any]) -> Recipe:
    return Recipe(name="rewriting", rewrite=list(steps))


def loaded(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPTS).logits


def assert_same(before: PreTrainedModel, after: PreTrainedModel, bound: float = EXACT) -> None:
    """The same logits and the same greedy text, with a cache."""
    wanted = logits(before)
    assert (logits(after) - wanted).abs().max() <= bound * wanted.abs().max()
    texts = [model.generate(PROMPTS, max_new_tokens=6, do_sample=False) for model in (before, after)]
    assert torch.equal(*texts)


def assert_saved_alike(folder: Path, again: Path) -> None:
    """Saved by transformers, a written model has the same tensors under the same names."""
    loaded(folder).save_pretrained(again)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def logits_of_a_fresh_process(folder: Path, file: Path) -> torch.Tensor:
    """What a process without attnconv computes."""
    fresh_process.run("-c", LOAD, folder, file, check=True)
    return load_file(file)["logits"]
