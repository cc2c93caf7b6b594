"""Calibrations for tests: made of random moments, or of tiny random models."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, PreTrainedModel

from kvfold.quality.calibrate import calibrate
from kvfold.quality.calibrate.fit import fit
from kvfold.quality.calibrate.observe import Moments

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 99,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "eos_token_id": 98,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "gemma3": Gemma3TextConfig(
        **SMALL, sliding_window=40, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "mistral": MistralConfig(**SMALL, sliding_window=40),
}


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of `CONFIGS` with weights large enough for attention to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random tokens of `SMALL`'s vocabulary."""
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def calibrated(model: PreTrainedModel, file: Path) -> Path:
    """``file``, in which a short calibration of ``model`` is written."""
    calibrate(model, [tokens(150, seed) for seed in range(6)], file)
    return file


def random_moments(heads: int, dim: int, seed: int = 0, weight: float = 1.0, rows: int = 600) -> Moments:
    """Vectors and gradients whose variances fall over some orders of magnitude, in directions of their own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(spread: float) -> Tensor:
        basis = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator))[0]
        return torch.randn(heads, rows, dim, generator=generator) * torch.logspace(0, -spread, dim) @ basis

    moments = Moments.zero(heads, dim, torch.device("cpu"))
    moments.add(draw(1.0), draw(1.5) * weight)
    return moments


def arrays_of(shapes: Sequence[tuple[int, int, int]], seed: int = 0) -> dict[str, Tensor]:
    """The arrays of a calibration of layers with (KV heads, key dim, value dim); later layers matter less."""
    return {
        f"{layer}.{side}.{name}": tensor
        for layer, (heads, *dims) in enumerate(shapes)
        for side, dim in zip("kv", dims, strict=True)
        for name, tensor in fit(random_moments(heads, dim, 2 * layer + (side == "v") + 1000 * seed, 0.8**layer)).items()
    }


def write(file: Path, shapes: Sequence[tuple[int, int, int]], seed: int = 0) -> Path:
    """``file``, in which such a calibration is written."""
    save_file(arrays_of(shapes, seed), file)
    return file


def write_white(file: Path, layers: int, heads: int, dim: int) -> Path:
    """A calibration for vectors of independent standard normal numbers that all matter alike."""
    arrays = {}
    for layer in range(layers):
        for side in "kv":
            moments = Moments.zero(heads, dim, torch.device("cpu"))
            generator = torch.Generator().manual_seed(layer)
            moments.add(*(torch.randn(heads, 2000, dim, generator=generator) for _ in range(2)))
            arrays |= {f"{layer}.{side}.{name}": tensor for name, tensor in fit(moments).items()}
    save_file(arrays, file)
    return file
