"""The sizes of tiny models, and what the mechanics of ``families`` cannot know about single families. Data only.

In an override, ``_layers`` is the number of layers, ``_drop`` names sizes that the config must compute itself, and a dict under
the name of a config part (``text_config``) holds overrides of that part.
"""

from __future__ import annotations

from typing import Any

__all__ = ["LAYERS", "OVERRIDES", "PART_SIZES", "SIZES", "VARIANTS"]

LAYERS = 4

SIZES: dict[str, Any] = {
    "vocab_size": 99, "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8, "n_vocab": 99,
    "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "embedding_size": 64, "word_embed_proj_dim": 64,
    "intermediate_size": 64, "ffn_dim": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64, "n_inner": 64, "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 32, "shared_intermediate_size": 32, "intermediate_size_mlp": 64, "dff": 64,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 4, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "head_dim": 16, "dim_head": 16, "kv_channels": 16, "v_head_dim": 12, "qk_head_dim": 28, "rotary_dim": 8,
    "kv_lora_rank": 20, "q_lora_rank": 24, "qk_rope_head_dim": 16, "qk_nope_head_dim": 12,
    "swa_head_dim": 16, "swa_v_head_dim": 12, "swa_num_key_value_heads": 2, "swa_num_attention_heads": 4,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "top_k_experts": 2, "moe_k": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "zero_expert_num": 2, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "sliding_window": 6, "attention_chunk_size": 6, "use_sliding_window": True, "max_window_layers": 2,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "max_seq_len": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "is_decoder": True, "scale_embedding": False, "num_nextn_predict_layers": 0,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "lru_width": 64, "attention_window_size": 6, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 4,
    "ssm_state_size": 8, "state_size": 8, "time_step_rank": 8, "projection_dim": 64, "laurel_rank": 8, "altup_num_inputs": 2,
}  # fmt: skip
"""Attribute -> value, for every config that has the attribute."""

PART_SIZES: dict[str, Any] = {
    "num_hidden_layers": 1, "num_layers": 1, "n_layers": 1, "encoder_layers": 1, "image_size": 16, "patch_size": 8,
    "num_channels": 3, "is_decoder": False, "depth": 1,
}  # fmt: skip
"""Sizes of a wrapper's parts other than the text decoder: they are built, but no text passes through them."""

_SHARED_WITH_PRODUCERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 64, "moe_top_k": 2}},
    "falcon": {"_drop": ["head_dim"]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": _SHARED_WITH_PRODUCERS},
    "gemma4_text": {
        "num_kv_shared_layers": 2, "layer_types": _SHARED_WITH_PRODUCERS, "global_head_dim": 24, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
    "gemma4_unified_text": {"layer_types": _SHARED_WITH_PRODUCERS, "global_head_dim": 24, "num_global_key_value_heads": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "xlstm": {"_drop": ["v_head_dim", "qk_head_dim", "head_dim"]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {}
