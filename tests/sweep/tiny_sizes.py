"""The numbers of a tiny model: what a config field of a given name becomes, and what single config classes demand."""

import re
from typing import Any

VOCAB = 128
HIDDEN = 32
IMAGE = 32


def _table(*rows: tuple[int, str]) -> dict[str, int]:
    """Return `{field: value}` from rows of a value and the names of the fields that take it."""
    return {name: value for value, names in rows for name in names.split()}


# By exact name; a field is touched only where the config has it and does not leave it None.
SIZES = _table(
    (VOCAB, "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input entity_vocab_size"),
    (VOCAB, "composer_vocab_size t2u_vocab_size unit_hifi_gan_vocab_size char_vocab_size shape_vocab_size"),
    (VOCAB, "pronunciation_vocab_size unpadded_vocab_size codebook_vocab_size audio_vocab_size codebook_size"),
    (128, "max_position_embeddings n_positions max_seq_len n_ctx model_max_length max_2d_position_embeddings"),
    (128, "max_encoder_position_embeddings max_decoder_position_embeddings context_length"),
    (128, "original_max_position_embeddings"),
    (64, "max_source_positions max_target_positions max_text_positions max_speech_positions"),
    (64, "t2u_max_position_embeddings"),
    (48, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner dim_ff dff d_inner ffn_hidden_size"),
    (48, "expert_ffn_hidden_size dense_intermediate_size feed_forward_size intermediate_size_mlp hidden_dim mlp_dim"),
    (48, "shared_intermediate_size speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim"),
    (HIDDEN, "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size word_embed_proj_dim entity_emb_size"),
    (HIDDEN, "attention_hidden_size backbone_hidden_size out_hidden_size output_hidden_size cross_hidden_size"),
    (HIDDEN, "encoder_hidden_size pooler_hidden_size projection_dim projection_size lru_width embedding_dim"),
    (HIDDEN, "input_embedding_size output_embedding_size image_text_hidden_size hidden_size_global true_hidden_size"),
    (HIDDEN, "text_embed_dim project_dim pooler_output_size mamba_d_ssm upsample_groups prompt_mid_dim"),
    (HIDDEN, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size moe_latent_size"),
    (HIDDEN, "moe_shared_expert_intermediate_size"),
    (IMAGE, "image_size pretrain_image_size"),
    (16, "qk_head_dim q_lora_rank kv_lora_rank o_lora_rank adapter_rank embedding_rank laurel_rank hc_lowrank"),
    (16, "hidden_size_per_layer_input router_hidden_size rel_extent"),
    (8, "head_dim d_kv dim_head d_head kv_channels rotary_dim swa_head_dim linear_key_head_dim linear_value_head_dim"),
    (8, "linear_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim attention_head_dim attention_head_size"),
    (8, "index_head_dim cross_head_dim query_pre_attn_scalar mamba_d_head d_rel mamba_head_dim mamba_headdim"),
    (8, "local_attention num_mel_bins mamba_d_state state_size ssm_state_size input_feat_per_channel input_feat_size"),
    (8, "mamba_n_heads mamba_chunk_size chunk_size patch_size crop_size"),
    (4, "num_attention_heads n_head n_heads num_heads n_mamba_heads mamba_num_heads linear_num_value_heads"),
    (4, "linear_num_heads num_query_groups num_filters num_groups mamba_dt_rank time_step_rank"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    (4, "sliding_window sliding_window_size attention_window_size attention_chunk_size attention_window"),
    (2, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads"),
    (2, "encoder_num_key_value_heads decoder_num_key_value_heads cross_num_key_value_heads"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts num_selected_experts top_k"),
    (2, "mamba_expand expand cross_attention_frequency attn_layer_period expert_layer_period layer_group_size"),
    (2, "global_attn_every_n_layers sliding_window_pattern"),
    (1, "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    (1, "first_k_dense_replace moe_layer_start_index num_dense_layers num_mem_blocks expert_layer_offset"),
    (1, "attn_layer_offset mamba_n_groups n_groups mamba_ngroups"),
)

# Fields that get their size even where the class leaves them None.
OPTIONAL = ("num_key_value_heads", "head_dim")

# By the end of the name, for whatever the table does not list. A width above `CAP` is none that a test needs.
LAYERS = re.compile(r"^(\w+_)?(num_(\w+_)?layers|n_layers?|layers|num_layers_per_stack|depth)$")
HEADS = re.compile(r"(^|_)heads$")
WIDTH = re.compile(r"(dims?|sizes?|channels|units|ranks?|latents|filters|features|size_base)$(?<!chunk_size)")
TOKEN_ID = re.compile(r"_(token_id|token_index|index)$")
CAP = 64

TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")

_ONE_GROUP = {"n_group": 1, "topk_group": 1}
_SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]

# What single config classes demand beyond the rules, most of it said by their own validation; wherever they stand in a
# composite.
OVERRIDES: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "Blip2QFormerConfig": {"use_qformer_text_input": True},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    # The modelling code reads a field that the config class does not have.
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "DeepseekV2Config": {"num_experts_per_tok": 2} | _ONE_GROUP,
    "DepthProConfig": {"patch_size": IMAGE},
    # A window of selected keys shorter than the prompt makes the dense model disagree with its own cache.
    "DogeConfig": {"keep_window_size": 128},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2} | _ONE_GROUP,
    "Dots3NoteAudioConfig": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "Dots3NoteTextConfig": {"num_key_value_heads": 4},
    "Dots3NoteVisionConfig": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "EsmConfig": {"vocab_size": VOCAB},
    "EsmcConfig": {"num_key_value_heads": 4},
    "FalconH1Config": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 8},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "HrmTextConfig": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "full_attention"], "num_hidden_layers": 3},
    "Mamba2Config": {"num_heads": 8},
    "MoonshineConfig": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    # No sliding mask is made, but the cache would drop what left the window.
    "MoshiConfig": {"sliding_window": 128},
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
    # Their query, key and value are one tensor on disk, cut into equal parts.
    "Nemotron3_5TranscribeWordTimestampConfig": {"num_key_value_heads": 4},
    "Nemotron3DiarizationAudioConfig": {"num_key_value_heads": 4},
    "Nemotron3_5TranscribeAsrAudioConfig": {"num_key_value_heads": 4},
    "NeoMMEConfig": {"head_dim": 16},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaConfig": {"block_types": ("recurrent", "attention")},
    "ReformerConfig": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "SwinConfig": _SWIN,
    "DonutSwinConfig": _SWIN,
    "Swinv2Config": _SWIN,
    "Swin2SRConfig": _SWIN,
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        "layers_block_type": _HYBRID,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "Zamba2Config": {"layers_block_type": _HYBRID, "num_hidden_layers": 4},
    "ZayaConfig": {"num_experts_per_tok": 1},
}
