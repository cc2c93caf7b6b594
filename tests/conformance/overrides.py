"""The sizes of tiny models, and what the mechanics of ``families`` cannot know about single families. Data only.

In an override, ``_layers`` is the number of layers, ``_drop`` names sizes that the config must compute itself, and a
dict under the name of a config part (``text_config``) holds overrides of that part.
"""

from __future__ import annotations

from typing import Any

__all__ = ["LAYERS", "NOT_DECODERS", "OVERRIDES", "PART_SIZES", "SIZES", "STEPWISE", "TOLERANCES", "VARIANTS"]

LAYERS = 4

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 8,
    "n_vocab": 99,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "dim": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "n_inner": 64,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 32,
    "shared_intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "dff": 64,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "decoder_layers": 4,
    "encoder_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "head_dim": 16,
    "dim_head": 16,
    "kv_channels": 16,
    "v_head_dim": 12,
    "qk_head_dim": 28,
    "rotary_dim": 8,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 12,
    "swa_head_dim": 16,
    "swa_v_head_dim": 12,
    "swa_num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "zero_expert_num": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "sliding_window": 6,
    "attention_chunk_size": 6,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_multiplier": 0.25,
    "tie_word_embeddings": False,
    "is_decoder": True,
    "scale_embedding": False,
    "num_nextn_predict_layers": 0,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "lru_width": 64,
    "attention_window_size": 6,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 4,
    "ssm_state_size": 8,
    "state_size": 8,
    "time_step_rank": 8,
    "projection_dim": 64,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
}
"""Attribute -> value, for every config that has the attribute."""

PART_SIZES: dict[str, Any] = {
    "num_hidden_layers": 1,
    "num_layers": 1,
    "n_layers": 1,
    "encoder_layers": 1,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "is_decoder": False,
    "depth": 1,
}
"""Sizes of a wrapper's parts other than the text decoder: they are built, but no text passes through them."""

_SLIDING_FULL = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_nb_functions": 1},
    "cohere_compass_text": {
        "layer_types": _SLIDING_FULL * 2,
        "rope_parameters": {kind: _ROPE | {"mrope_section": [4, 2, 2]} for kind in _SLIDING_FULL},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 20,
        "swa_head_dim": 28,
        "swa_qk_nope_head_dim": 12,
        "swa_v_head_dim": 12,
    },
    "falcon": {"_drop": ["head_dim"]},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": _SLIDING_FULL * 2},
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "layer_types": _SLIDING_FULL * 2,
        "global_head_dim": 24,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
    "gemma4_unified_text": {"layer_types": _SLIDING_FULL * 2, "global_head_dim": 24, "num_global_key_value_heads": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"_layers": 2, "H_cycles": 1, "L_cycles": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "moshi": {"sliding_window": 128},
    "prophetnet": {"_drop": ["num_hidden_layers"], "num_encoder_layers": 2, "num_decoder_layers": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False},
    "xlnet": {"_drop": ["max_position_embeddings"]},
    "xlstm": {"_drop": ["v_head_dim", "qk_head_dim", "head_dim"]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "gemma3_text+longrope": {
        "rope_parameters": {
            "sliding_attention": _ROPE,
            "full_attention": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 10,
                "factor": 4.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
            },
        }
    },
    "granitemoehybrid+attention": {"layer_types": ["attention"] * 4},
    "llama+dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        "max_position_embeddings": 10,
    },
    "llama4_text+tuned": {"floor_scale": 4, "attn_scale": 0.5},
    "phi3+longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 10,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
        "original_max_position_embeddings": 10,
    },
}
"""Further configs of a family that take another path through it: family+name -> overrides on top of the family's."""

NOT_DECODERS: dict[str, str] = {
    "gemma4_assistant": "a draft model that reads the cache of another model",
    "gemma4_unified_assistant": "a draft model that reads the cache of another model",
    "musicgen": "an audio decoder: each step takes several codebooks and an encoder's states",
    "musicgen_melody": "an audio decoder: each step takes several codebooks and an encoder's states",
}
"""Families that ``AutoModelForCausalLM`` lists although they are no text decoders of their own."""

STEPWISE = frozenset({"llama+dynamic"})
"""Where stock itself gives other logits in steps than at once (a key is rotated by the length at its time): packed
steps are compared with stock steps, and packed wholes with stock wholes.
"""

_ROUNDING = "float32 rounding: from float64 logits, stock is {} away and kvfold {}"

TOLERANCES: dict[str, tuple[float, str]] = {
    "gemma3n_text": (1.5e-4, _ROUNDING.format("8e-5", "7e-5")),
    "gemma4": (3e-5, _ROUNDING.format("1.2e-5", "6e-6")),
    "gemma4_text": (3e-5, _ROUNDING.format("1.2e-5", "6e-6")),
    "gemma4_unified": (3e-5, _ROUNDING.format("8e-6", "6e-6")),
    "gemma4_unified_text": (3e-5, _ROUNDING.format("8e-6", "6e-6")),
}
"""Families whose logits need more than 1e-5, how much, and why."""
