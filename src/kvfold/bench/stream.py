"""The speed of memory: what a walk over bytes can reach at best on this machine, measured beside every benchmark."""

from __future__ import annotations

import time

import torch

__all__ = ["Stream", "wait_for"]

# Larger than the caches of today's servers; a GPU is done with less before its start is paid for.
_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}


def wait_for(device: torch.device) -> None:
    """Returns when all work given to ``device`` is done; a clock beside a GPU tells nothing before that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stream:
    """Plain reads of a buffer larger than any cache, with all threads: the yardstick of a benchmark.

    A read before each contestant's turn serves twice: it says how fast memory is *now*, on a machine that others may
    share, and it leaves nothing of what the contestant is about to read in a cache.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.ones(_BYTES.get(device.type, _BYTES["cpu"]) // 4, dtype=torch.float32, device=device)
        self.read()  # the first one wakes the threads up

    def read(self) -> float:
        """GB/s of one sum over the buffer."""
        wait_for(self._device)
        begin = time.perf_counter()
        self._buffer.sum()
        wait_for(self._device)
        return self._buffer.nbytes / (time.perf_counter() - begin) / 1e9
