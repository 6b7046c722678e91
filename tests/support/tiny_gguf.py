"""A tiny Llama written as a GGUF file, the way llama.cpp's converter would."""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from transformers import LlamaForCausalLM

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: LlamaForCausalLM, path: Path, *, quantise: bool = False) -> Path:
    """Write a model as a GGUF file of float32, or with its matrices in Q8_0."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    _add_tensor(writer, "token_embd.weight", model.model.embed_tokens.weight.detach().numpy(), False)
    _add_tensor(writer, "output.weight", model.lm_head.weight.detach().numpy(), quantise)
    _add_tensor(writer, "output_norm.weight", model.model.norm.weight.detach().numpy(), False)
    for index, layer in enumerate(model.model.layers):
        for name, short in NAMES.items():
            weight = layer.get_submodule(name).weight.detach().numpy()
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
            matrix = weight if heads is None else _interleave(weight, heads)
            _add_tensor(writer, f"blk.{index}.{short}.weight", matrix, quantise and weight.ndim == 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of each head as llama.cpp's rotary embedding takes them: pairs side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _add_tensor(writer: gguf.GGUFWriter, name: str, value: np.ndarray, quantise: bool) -> None:
    if quantise:
        writer.add_tensor(name, gguf.quants.quantize(value, Type.Q8_0), raw_dtype=Type.Q8_0)
    else:
        writer.add_tensor(name, np.ascontiguousarray(value))


def _add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    tokens = ["<unk>", "<s>", "</s>"] + [chr(ord("!") + index) for index in range(size - 3)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(index) for index in range(size)])
    writer.add_token_types([2, 3, 3] + [1] * (size - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
