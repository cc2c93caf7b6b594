"""Tiny configs of many model families, for the tests of geometry: what their layers are, in one letter each.

F full, S sliding, C chunked, M latent (MLA); small letters: the layer reads the pages of an earlier one.
"""

from transformers import CONFIG_MAPPING

SLIDING_FULL = ["sliding_attention", "full_attention"]

BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}
MLA = {"kv_lora_rank": 24, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20}
MOE = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
MLA_MOE = MLA | MOE | {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

GEMMA3N = {
    "layer_types": SLIDING_FULL * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": [48] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "head_dim": 16,
    "sliding_window": 8,
}
GEMMA4 = {
    "num_hidden_layers": 5,
    "layer_types": [*SLIDING_FULL, "sliding_attention", *SLIDING_FULL],
    "num_kv_shared_layers": 2,
    "attention_k_eq_v": True,
    "head_dim": 16,
    "global_head_dim": 24,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
    "sliding_window": 8,
}

FAMILIES = {
    "llama": ("llama", "FFFF", {}),
    "llama, own head dim": ("llama", "FFFF", {"head_dim": 24}),
    "qwen2, sliding unused": ("qwen2", "FFFF", {"use_sliding_window": False, "sliding_window": 8}),
    "qwen2, upper layers slide": (
        "qwen2",
        "FFSS",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", "FFFF", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", "FFFF", EXPERTS | {"head_dim": 16}),
    "mistral, sliding": ("mistral", "SSSS", {"sliding_window": 8, "head_dim": 16}),
    "mistral": ("mistral", "FFFF", {"sliding_window": None, "head_dim": 16}),
    "mixtral": ("mixtral", "FFFF", LOCAL_EXPERTS),
    "gemma2": ("gemma2", "SFSF", {"sliding_window": 8, "head_dim": 16}),
    "gemma3": ("gemma3_text", "SSSSSF", {"sliding_window": 8, "head_dim": 16, "num_hidden_layers": 6}),
    "gemma3n": ("gemma3n_text", "SFsf", GEMMA3N),
    "gemma4": ("gemma4_text", "SFSsf", GEMMA4),
    "gpt_oss": ("gpt_oss", "SFSF", LOCAL_EXPERTS | {"sliding_window": 8, "head_dim": 16}),
    "llama4": (
        "llama4_text",
        "CCCF",
        LOCAL_EXPERTS | {"attention_chunk_size": 8, "head_dim": 16, "intermediate_size_mlp": 48},
    ),
    "cohere2": ("cohere2", "SSSF", {"sliding_window": 8}),
    "gpt_neox": ("gpt_neox", "FFFF", {}),
    "phi3": ("phi3", "SSSS", {"sliding_window": 8}),
    "smollm3": ("smollm3", "FFFF", {}),
    "exaone4": ("exaone4", "SSSF", {"sliding_window": 8, "sliding_window_pattern": 4}),
    "olmo3": ("olmo3", "SSSF", {"sliding_window": 8}),
    "starcoder2": ("starcoder2", "FFFF", {"sliding_window": None}),
    "mimo_v2_flash": ("mimo_v2_flash", "FSSS", MOE | {"sliding_window": 8, "head_dim": 16, "v_head_dim": 12}),
    "granitemoe_swa": ("granitemoe_swa", None, LOCAL_EXPERTS | {"sliding_window": 8}),
    "deepseek_v2": ("deepseek_v2", "MMMM", MLA_MOE),
    "deepseek_v3": ("deepseek_v3", "MMMM", MLA_MOE),
    "glm4_moe_lite": ("glm4_moe_lite", "MMMM", MLA_MOE),
    "minicpm3": ("minicpm3", "MMMM", MLA | {"num_key_value_heads": 4}),
    "gpt2": ("gpt2", "FFFF", GPT2),
    "gpt_bigcode, one KV head": ("gpt_bigcode", "FFFF", GPT2 | {"multi_query": True}),
    "gpt_bigcode": ("gpt_bigcode", "FFFF", GPT2 | {"multi_query": False}),
    "falcon, one KV head": ("falcon", "FFFF", {"multi_query": True, "alibi": False}),
    "falcon, new": ("falcon", "FFFF", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "jetmoe": ("jetmoe", "FFFF", LOCAL_EXPERTS | {"kv_channels": 16}),
}
"""Name -> (model type, letters of the layers or None if only the stock cache is asked, options beside BASE)."""


def tiny_config(name):
    """The tiny config of one family."""
    model_type, _, options = FAMILIES[name]
    config_class = CONFIG_MAPPING[model_type]
    renamed = set(config_class.attribute_map) if "n_head" in options else set()
    unused = {"num_key_value_heads"} if model_type in ("gpt2", "gpt_bigcode", "falcon", "gpt_neox") else set()
    base = {key: value for key, value in BASE.items() if key not in renamed | unused}
    return config_class(**{**base, **options})
