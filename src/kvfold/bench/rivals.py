"""Decode attention as it is done without kvfold: three ways, each on dense bfloat16 keys and values."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvfold.bench.pages import Drawn, layers_for
from kvfold.bench.shapes import AttentionShape

__all__ = ["STOCK", "DenseCache", "Rival", "rivals"]

STOCK = "stock sdpa"


class DenseCache:
    """Keys and values ``[layers, B, Hkv, S, D]`` in bfloat16, as transformers' dynamic cache holds them.

    Latents are attended as they are: transformers would make keys and values of all of them again at every step.
    """

    def __init__(self, shape: AttentionShape, drawn: Drawn) -> None:
        self.shape = shape
        self.layers = layers_for(shape.bf16_bytes, drawn.k.device)
        self.q = drawn.q.to(torch.bfloat16)
        # Latents and rotary keys as one wide key, whose first dims are the values.
        parts = (torch.cat((drawn.k, drawn.v), dim=-1),) if shape.rope else (drawn.k, drawn.v)
        held = [x.to(torch.bfloat16).expand(self.layers, shape.batch, *x.shape).contiguous() for x in parts]
        self.k, self.v = held[0], held[-1][..., : shape.head_dim]
        self.scale = shape.scale
        self.module = cast("nn.Module", SimpleNamespace(num_key_value_groups=shape.group, is_causal=True))


class Rival:
    """One way to attend over a `DenseCache`: layer -> ``[B, Hq, D]``, bfloat16."""

    def __init__(self, name: str, cache: DenseCache, way: Callable[[DenseCache, Tensor, Tensor], Tensor]) -> None:
        self.name = name
        self.cache = cache
        self.layers = cache.layers
        self.bytes_read = cache.shape.bf16_bytes
        self.variant = f"torch {torch.__version__}"
        self._way = way

    def __call__(self, layer: int) -> Tensor:
        """A layer's attention."""
        return self._way(self.cache, self.cache.k[layer], self.cache.v[layer])


def rivals(cache: DenseCache) -> list[Rival]:
    """All of them, on the same memory."""
    ways = {STOCK: _stock, "packed sdpa": _packed_sdpa, "packed matmul": _packed_matmul}
    return [Rival(name, cache, way) for name, way in ways.items()]


def _stock(cache: DenseCache, k: Tensor, v: Tensor) -> Tensor:
    """The function that transformers' models call, with the arguments of a decode step (no mask)."""
    out: Any = sdpa_attention_forward(cache.module, cache.q[:, :, None], k, v, None, scaling=cache.scale)
    found: Tensor = out[0][:, 0]
    return found


def _packed_sdpa(cache: DenseCache, k: Tensor, v: Tensor) -> Tensor:
    """The query heads of a KV head as rows, so that nothing is repeated."""
    q = cache.q.unflatten(1, (cache.shape.kv_heads, -1))
    return scaled_dot_product_attention(q, k, v, scale=cache.scale).flatten(1, 2)


def _packed_matmul(cache: DenseCache, k: Tensor, v: Tensor) -> Tensor:
    """Matmul, softmax in float32, matmul, on the same rows."""
    q = cache.q.unflatten(1, (cache.shape.kv_heads, -1))
    weights = ((q @ k.mT) * cache.scale).float().softmax(-1).to(v.dtype)
    found: Tensor = (weights @ v).flatten(1, 2)
    return found
