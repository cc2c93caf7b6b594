"""How far one set of next-token distributions is from another, on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Agreement", "agreement"]


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
    log_p, log_q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
    same = reference.argmax(-1) == logits.argmax(-1)
    return Agreement(
        positions=int(kl.numel()),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1=float(same.float().mean()),
    )
