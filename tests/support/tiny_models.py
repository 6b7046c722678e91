"""Tiny pretrained models, as folders on disk, that take milliseconds to write and to load."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama of two layers with grouped heads."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """A GPT-2 of two layers."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=128)).eval()


def save(model: PreTrainedModel, folder: Path, *, shards: bool = False) -> Path:
    """Save a model as transformers does, in one file or in several."""
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    return folder


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer, as files."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_header(path: Path, change: Any) -> None:
    """Let `change` alter the header of a safetensors file, whose data stays as it is."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
