"""Tiny random models whose rotary factors depend on the length, and the logits that are right for them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

LIMIT = 40
"""Longest sequence under the short factors, or under the frequencies that dynamic NTK starts with."""
VOCAB = 97
CONTEXT = 160

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _longrope(dims: int, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": LIMIT,
        "attention_factor": 1.2,
        "short_factor": [1.0 + i / 10 for i in range(dims // 2)],
        "long_factor": [5.0 + i for i in range(dims // 2)],
        **more,
    }


def _gemma3() -> PreTrainedConfig:
    """Only layers of one type have factors that depend on the length."""
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    return Gemma3TextConfig(
        **_SMALL,
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=4,
        tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": plain, "full_attention": _longrope(16, factor=4.0)},
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "phi3": lambda: Phi3Config(**_SMALL, original_max_position_embeddings=LIMIT, rope_parameters=_longrope(16)),
    "phimoe": lambda: PhimoeConfig(
        **_SMALL,
        num_local_experts=2,
        num_experts_per_tok=1,
        router_jitter_noise=0.0,
        input_jitter_noise=0.0,
        rope_parameters=_longrope(16, short_mscale=1.0, long_mscale=1.5),
    ),
    "llama": lambda: LlamaConfig(**_SMALL, rope_parameters=_longrope(16, factor=4.0)),
    "gemma3": _gemma3,
    "dynamic": lambda: LlamaConfig(
        **{**_SMALL, "max_position_embeddings": LIMIT},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ),
}
READ_AGAIN = ("phi3", "phimoe", "llama", "gemma3")
"""Those that read everything anew at the limit; dynamic NTK leaves the keys that are there as they are."""


def rotary_model(name: str, *, limit: int = LIMIT) -> PreTrainedModel:
    """Float32, with weights large enough for attention to matter. ``limit``: in place of `LIMIT`."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    if name == "dynamic":
        config.max_position_embeddings = limit
    else:
        config.original_max_position_embeddings = limit
        for part in (config.rope_parameters, *config.rope_parameters.values()):
            if isinstance(part, dict) and "original_max_position_embeddings" in part:
                part["original_max_position_embeddings"] = limit
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 * weight.shape[-1] ** -0.5)
    return model


@torch.inference_mode()
def right_logits(model: PreTrainedModel, tokens: Sequence[int], prompt: int) -> Tensor:
    """float32 ``[len(tokens) - prompt, V]``: the logits that each token behind the first ``prompt`` ones was chosen by.

    longrope: those of a forward over all tokens before it, without a cache. Dynamic NTK: those of stock's own steps.
    """
    model, ids = copy.deepcopy(model), torch.tensor([list(tokens)])
    count = len(tokens) - prompt
    if any(getattr(module, "rope_type", None) == "dynamic" for module in model.modules()):
        cache = DynamicCache(config=model.config)
        parts = [model(ids[:, :prompt], past_key_values=cache).logits[0, -1:]]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(prompt, len(tokens) - 1)]
        return torch.cat(parts).float()
    whole = model(ids[:, :-1], use_cache=False).logits[0, -count:]
    if prompt <= LIMIT < len(tokens) - 1:
        short = model(ids[:, :LIMIT], use_cache=False).logits[0, prompt - 1 :]
        whole = torch.cat((short, whole[short.shape[0] :]))
    return whole.float()


def stock_greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    """The likeliest tokens, each by :func:`right_logits`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(right_logits(model, [*tokens, 0], len(tokens))[0].argmax()))
    return tokens[len(prompt) :]


def tokens_of(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
