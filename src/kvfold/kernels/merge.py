"""Attention is a merge: pieces over disjoint keys combine exactly through their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Piece", "merge", "with_sinks"]

Piece = tuple[Tensor, Tensor]
"""``(o [..., Dv], lse [...])``: attention over some keys, and the log of the sum of its exponentials (float32)."""


def merge(pieces: Sequence[Piece]) -> Piece:
    """Attention over the union of the pieces' (disjoint) keys.

    ``o = sum_i o_i * exp(lse_i - lse)`` with ``lse = log(sum_i exp(lse_i))``, in float32; ``o`` keeps its dtype.
    """
    out, total = pieces[0]
    if len(pieces) == 1:
        return out, total
    dtype = out.dtype
    for o, lse in pieces[1:]:
        # The share of two log-sum-exps is a logistic function of their difference: four calls for a pair, and pairs are
        # merged many times a step.
        share = torch.sigmoid(lse - total).unsqueeze(-1)
        out = torch.lerp(out.float(), o.float(), share)
        total = torch.logaddexp(total, lse)
    return out.to(dtype), total


def with_sinks(piece: Piece, sinks: Tensor) -> Piece:
    """Adds a learned sink logit per head, which takes probability and carries no value.

    ``sinks`` must broadcast against ``lse``. Shrinks ``o`` by the share that the sinks take.
    """
    o, lse = piece
    sinks = sinks.float()
    return (o * torch.sigmoid(lse - sinks).unsqueeze(-1)).to(o.dtype), torch.logaddexp(lse, sinks)
