"""What is timed: shapes of models and of attention, and the rivals beside them. Known without torch.

Models have random weights: the speed of a step does not depend on what the weights are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfold.errors import RequestError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["FILL_TOKENS", "RIVALS", "SHAPES", "AttentionShape", "check_rivals", "check_shape", "random_model"]

RIVALS = ("transformers",)
FILL_TOKENS = 1024
"""Tokens of every sequence that are filled in at a time."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """One layer's decode attention: ``batch`` sequences of ``context`` tokens, ``group`` query heads a KV head.

    With ``rope`` the pages are latent: one key of ``head_dim + rope`` dims for all heads, its first part the value.
    """

    context: int = 32768
    batch: int = 1
    head_dim: int = 128
    group: int = 4
    kv_heads: int = 8
    rope: int = 0

    def __post_init__(self) -> None:
        for name in ("context", "batch", "head_dim", "group", "kv_heads"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name}={getattr(self, name)}", why="it must be at least 1")
        if self.rope < 0 or (self.rope and self.kv_heads > 1):
            raise RequestError(f"rope={self.rope}", why="latent pages have one KV head", hint="set --kv-heads 1")

    @property
    def query_dim(self) -> int:
        """Dims of a query, and of the keys it meets."""
        return self.head_dim + self.rope

    @property
    def scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.query_dim**-0.5)

    @property
    def stored_dims(self) -> tuple[int, int]:
        """What is stored of a token: dims of a key and of a value, or of a latent and its rotary key."""
        return self.head_dim, self.rope or self.head_dim

    @property
    def bf16_bytes(self) -> int:
        """What any kernel has to read that keeps keys and values in bfloat16."""
        return 2 * self.batch * self.kv_heads * self.context * sum(self.stored_dims)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the two products."""
        return 2 * self.batch * self.kv_heads * self.group * self.context * (self.query_dim + self.head_dim)


def check_shape(shape: str) -> None:
    """RequestError, which names the known ones, for a shape that is not known."""
    if shape not in SHAPES:
        raise RequestError(f"unknown shape {shape!r}", hint="known: " + ", ".join(SHAPES))


def check_rivals(rivals: Sequence[str]) -> None:
    """RequestError, which names the known ones, for a rival that is not known."""
    for rival in rivals:
        if rival not in RIVALS:
            raise RequestError(f"unknown rival {rival!r}", hint="known: " + ", ".join(RIVALS))


def random_model(shape: str, *, dtype: torch.dtype, max_positions: int, seed: int = 0) -> PreTrainedModel:
    """A Llama-architecture model of a named shape with random weights, on the GPU if there is one.

    RequestError names the known shapes.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    check_shape(shape)
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
