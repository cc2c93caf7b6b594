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
    if len(pieces) == 1:
        return pieces[0]
    total = pieces[0][1]
    for _, lse in pieces[1:]:
        total = torch.logaddexp(total, lse)  # pairs are merged many times a step: a tenth of logsumexp's time
    out = pieces[0][0] * torch.exp(pieces[0][1] - total).unsqueeze(-1)
    for o, lse in pieces[1:]:
        out = out + o * torch.exp(lse - total).unsqueeze(-1)
    return out.to(pieces[0][0].dtype), total


def with_sinks(piece: Piece, sinks: Tensor) -> Piece:
    """Adds a learned sink logit per head, which takes probability and carries no value.

    ``sinks`` must broadcast against ``lse``. Shrinks ``o`` by the share that the sinks take.
    """
    o, lse = piece
    total = torch.logaddexp(lse, sinks.float())
    return (o * torch.exp(lse - total).unsqueeze(-1)).to(o.dtype), total
