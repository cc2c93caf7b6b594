"""The speed of memory: what a walk over bytes can reach at best on this machine, measured beside every benchmark."""

from __future__ import annotations

import time

import torch

__all__ = ["stream_read_gb_s"]

_BYTES = 256 << 20


def stream_read_gb_s(repeats: int = 5) -> float:
    """Plain read bandwidth in GB/s: the best of ``repeats`` sums over a buffer far larger than any cache."""
    buffer = torch.ones(_BYTES // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - begin)
    return _BYTES / best / 1e9
