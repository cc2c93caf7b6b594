"""Model shapes for benchmarks with random weights: the speed of a step does not depend on what the weights are."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from kvfold.errors import RequestError

__all__ = ["SHAPES", "random_model"]

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 64},
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "layers": 30,
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 64,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "layers": 28,
        "heads": 16,
        "kv_heads": 8,
        "head_dim": 128,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "layers": 16,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 64,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "layers": 28,
        "heads": 24,
        "kv_heads": 8,
        "head_dim": 128,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
    },
}
"""Public shapes by their usual names. The vocabulary is cut to 32,000, so that the head does not hide the cache."""

_VOCAB = 32_000


def random_model(shape: str, *, dtype: torch.dtype, max_positions: int, seed: int = 0) -> PreTrainedModel:
    """A Llama-architecture model of a named shape with random weights, on the GPU if there is one.

    RequestError names the known shapes.
    """
    if shape not in SHAPES:
        raise RequestError(f"unknown shape {shape!r}", hint="known: " + ", ".join(SHAPES))
    sizes = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        vocab_size=_VOCAB,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type] # as in engine/loading.py
    model.eval()
    return model
