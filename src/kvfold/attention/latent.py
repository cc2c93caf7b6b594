"""Multi-head latent attention in absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache holds one latent ``c [rank]`` and one rotary key ``r [rope]`` for each token. A head's key is ``W_uk c ⊕ r``
and its value ``W_uv c``, so ``q_nope · W_uk c = (W_uk^T q_nope) · c``: the query goes to the latent space once, and no
key is ever expanded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvfold.errors import UnsupportedError

__all__ = ["LatentProjection"]


@dataclass(frozen=True, slots=True)
class LatentProjection:
    """``w_uk [Hq, nope, rank]`` and ``w_uv [Hq, v, rank]``: views of the layer's ``kv_b_proj`` weight."""

    w_uk: Tensor
    w_uv: Tensor
    rope: int

    @property
    def rank(self) -> int:
        """Width of the latent."""
        return int(self.w_uk.shape[-1])

    @classmethod
    def of(cls, module: nn.Module, *, q_heads: int, nope: int, rope: int, rank: int) -> LatentProjection:
        """Reads the projections of a transformers attention module that has a ``kv_b_proj`` linear layer without bias.

        Raises UnsupportedError if its weight does not have the shape ``[Hq * (nope + v), rank]``.
        """
        projection = getattr(module, "kv_b_proj", None)
        weight = getattr(projection, "weight", None)
        name = type(module).__name__
        if weight is None or weight.dim() != 2 or weight.shape[1] != rank or weight.shape[0] % q_heads:
            raise UnsupportedError(
                f"latent attention of {name}", why="it has no kv_b_proj weight of [heads * dims, rank]"
            )
        if getattr(projection, "bias", None) is not None:
            raise UnsupportedError(
                f"latent attention of {name}", why="its kv_b_proj has a bias, which cannot be absorbed"
            )
        per_head = weight.view(q_heads, -1, rank)
        return cls(w_uk=per_head[:, :nope], w_uv=per_head[:, nope:], rope=rope)

    def query(self, q: Tensor) -> Tensor:
        """``q [T, Hq, nope + rope]`` to the latent space: ``[T, Hq, rank + rope]``."""
        nope = self.w_uk.shape[1]
        absorbed = torch.einsum("thn,hnr->thr", q[..., :nope], self.w_uk)
        return torch.cat((absorbed, q[..., nope:]), dim=-1)

    def output(self, o: Tensor) -> Tensor:
        """Attention over latents ``[T, Hq, rank]`` to value heads ``[T, Hq, v]``."""
        return torch.einsum("thr,hvr->thv", o.to(self.w_uv.dtype), self.w_uv)
