"""How far one set of next-token distributions is from another, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = ["Agreement", "agreement", "divergence", "surprise"]

_ROWS: Final = 64
"""Rows at a time: with a vocabulary of 128k, all at once would take several copies of the logits."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over ``positions``: mean and 99th-percentile KL divergence in nats, and how often the most likely token is the
    same.
    """

    positions: int
    kl_mean: float
    kl_p99: float
    top1: float


def agreement(reference: Tensor, logits: Tensor) -> Agreement:
    """KL(reference ‖ logits) and top-1 agreement of logits ``[N, V]`` against ``reference [N, V]``."""
    kl, same = divergence(reference, logits)
    return Agreement(
        positions=int(kl.numel()),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1=float(same.float().mean()),
    )


def divergence(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of logits ``[N, V]``: KL(reference ‖ logits) in nats ``[N]``, and whether the most likely token is
    the same ``[N]``.
    """
    kl, same = [], []
    for p, q in zip(reference.split(_ROWS), logits.split(_ROWS), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))
        same.append(p.argmax(-1) == q.argmax(-1))
    return torch.cat(kl), torch.cat(same)


def surprise(logits: Tensor, following: Sequence[int]) -> Tensor:
    """Negative log-likelihoods in nats ``[n]`` of the ``n`` tokens that follow the first ``n`` rows of logits."""
    targets = torch.as_tensor(following, device=logits.device)
    rows = logits[: len(following)].split(_ROWS)
    parts = [
        -row.float().log_softmax(-1).gather(-1, target[:, None])[:, 0]
        for row, target in zip(rows, targets.split(_ROWS), strict=True)
    ]
    return torch.cat(parts)
