"""Models small enough to widen, and one attention of them run by itself."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnconv.recipes import Recipe

LAYERS = {"num_hidden_layers": 2}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large enough for logits in which an error would be seen.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def widened(num_experts: int, *, share_kv: bool = False, active: int | None = None) -> Recipe:
    options = {"num_experts": num_experts, "share_kv": share_kv, "active": active}
    return Recipe(
        name="moa",
        rewrite=[{"kind": "widen", "num_experts": num_experts, "share_kv": share_kv}],
        attention=[{"layers": "all", "method": "moa", "options": options}],
    )


def attend(model: PreTrainedModel, attention: Any, hidden: Tensor) -> Tensor:
    embeddings = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    with torch.no_grad():
        out: Tensor = attention(hidden, position_embeddings=embeddings, attention_mask=None)[0]
    return out
