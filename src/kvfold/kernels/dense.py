"""Attention over keys and values that lie densely in memory, with its log-sum-exp.

Two implementations of one operation, chosen by :mod:`kvfold.kernels.registry`: PyTorch's fused CPU kernel, and plain
matmul-softmax-matmul, which runs anywhere and knows soft-capping. Both return ``(o, lse)`` so that pieces can be
merged.

Masks are additive and finite (``finfo.min`` rather than minus infinity): a query that sees nothing then comes out as a
finite ``o`` with an ``lse`` near ``finfo.min``, which weighs nothing in a merge, instead of NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.kernels.reference import attend as reference_attend
from kvfold.kernels.registry import OpRegistry

__all__ = ["DenseCall", "dense_registry"]


@dataclass(frozen=True, slots=True)
class DenseCall:
    """One dense attention: ``q [B, H, T, D]``, ``k [B, H, S, D]``, ``v [B, H, S, Dv]``; every query head has its own
    keys.

    ``bias`` is additive, of the dtype of ``q`` or float32, broadcastable to ``[B, H, T, S]``; ``causal`` (only without
    ``bias``) lets query ``i`` see keys ``<= i`` and needs ``T == S``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool = False
    bias: Tensor | None = None
    softcap: float | None = None


def _flash_cpu(call: DenseCall) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    dim, value_dim = q.shape[-1], v.shape[-1]
    if value_dim < dim:  # the fused kernel wants one head size: zeros change neither scores nor the leading outputs
        v = torch.nn.functional.pad(v, (0, dim - value_dim))
    elif value_dim > dim:
        q = torch.nn.functional.pad(q, (0, value_dim - dim))
        k = torch.nn.functional.pad(k, (0, value_dim - dim))
    bias = call.bias
    if bias is not None:
        bias = bias.expand(q.shape[0], bias.shape[1], q.shape[2], k.shape[2])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, call.causal, attn_mask=bias, scale=call.scale
    )
    return out[..., :value_dim], lse


def _flash_cpu_refuses(call: DenseCall) -> str | None:
    if call.q.device.type != "cpu":
        return f"needs tensors on the CPU, got {call.q.device.type}"
    if call.softcap is not None:
        return "does not know soft-capping"
    if call.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"does not know {call.q.dtype}"
    return None


def _matmul(call: DenseCall) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(call.q, call.k.transpose(-1, -2)).float().mul_(call.scale)
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap).mul_(call.softcap)
    if call.bias is not None:
        scores = scores + call.bias.float()
    if call.causal:
        rows = torch.arange(scores.shape[-2], device=scores.device)
        hidden = rows[:, None] < rows[None, :]
        scores.masked_fill_(hidden, torch.finfo(torch.float32).min)
    peak = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights.to(call.v.dtype), call.v) / total.to(call.v.dtype)
    return out, (peak + total.log()).squeeze(-1)


def _runs_anywhere(call: DenseCall) -> str | None:
    return None


def dense_registry() -> OpRegistry:
    """A registry that knows the op ``attend_dense`` (reference: :func:`kvfold.kernels.reference.attend`)."""
    registry = OpRegistry()
    registry.register_reference("attend_dense", reference_attend)
    registry.register("attend_dense", "flash_cpu", _flash_cpu_refuses, _flash_cpu, priority=10)
    registry.register("attend_dense", "matmul", _runs_anywhere, _matmul, priority=0)
    return registry
