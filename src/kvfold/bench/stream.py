"""The speed of memory: what a walk over bytes can reach at best on this machine, measured beside every benchmark."""

from __future__ import annotations

import time

import torch

__all__ = ["stream_read_gb_s", "wait_for"]

_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # a GPU is done with the smaller one before its start is paid for


def wait_for(device: torch.device) -> None:
    """Returns when all work given to ``device`` is done; a clock beside a GPU tells nothing before that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stream_read_gb_s(device: torch.device, repeats: int = 5) -> float:
    """Plain read bandwidth of the memory of ``device`` in GB/s: the best of ``repeats`` sums over a buffer far larger
    than any cache.
    """
    size = _BYTES.get(device.type, _BYTES["cpu"])
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    wait_for(device)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        buffer.sum()
        wait_for(device)
        best = min(best, time.perf_counter() - begin)
    return size / best / 1e9
