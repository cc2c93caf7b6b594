"""Tiny random models of transformers, for the tests of the drop-in cache: text alone, and text with images."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    SiglipVisionConfig,
)

__all__ = ["IMAGE_TOKEN", "gemma3", "image_inputs", "llama", "llava", "prompt", "qwen2_vl", "redrawn"]

IMAGE_TOKEN = 98
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 99,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def redrawn(model: PreTrainedModel) -> PreTrainedModel:
    """Weights large enough for attention to matter."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def llama(**options: Any) -> PreTrainedModel:
    return redrawn(AutoModelForCausalLM.from_config(LlamaConfig(**{**TEXT, **options})))


def _with_images(config: PreTrainedConfig) -> PreTrainedModel:
    return redrawn(AutoModelForImageTextToText.from_config(config))


def llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(**VISION, projection_dim=32)
    return _with_images(
        LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**TEXT),
            image_token_id=IMAGE_TOKEN,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
    )


def qwen2_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "mlp_ratio": 2,
    }
    tokens = {"video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
    return _with_images(
        Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE_TOKEN, **tokens
        )
    )


def gemma3() -> PreTrainedModel:
    return _with_images(
        Gemma3Config(
            text_config=Gemma3TextConfig(
                **TEXT, sliding_window=12, layer_types=["sliding_attention", "full_attention"]
            ),
            vision_config=SiglipVisionConfig(**VISION),
            mm_tokens_per_image=4,
            image_token_id=IMAGE_TOKEN,
            boi_token_id=96,
            eoi_token_id=95,
        )
    )


def image_inputs(name: str) -> dict[str, torch.Tensor]:
    """A prompt with an image of four tokens, as the processor of a model would make it."""
    ids = torch.tensor([[5, 96, *(IMAGE_TOKEN,) * 4, 95, 7, 8, 11, 12, 13, 14, 15, 16, 17]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generator = torch.Generator().manual_seed(1)
    if name == "qwen2_vl":
        inputs["pixel_values"] = torch.randn(16, 96, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
        return inputs
    inputs["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator)
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return inputs


def prompt(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[batch, length]`` that mean nothing special."""
    return torch.randint(3, 94, (batch, length), generator=torch.Generator().manual_seed(seed))
