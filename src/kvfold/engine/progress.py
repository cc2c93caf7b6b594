"""A line on a terminal that says how far a long `generate` is; nothing anywhere else."""

from __future__ import annotations

import sys
from typing import Final

from kvfold.telemetry import Stopwatch

__all__ = ["ProgressLine"]

_PATIENCE: Final = 2.0
"""Seconds before the line appears: short work needs none."""

_PAUSE: Final = 0.2
"""Seconds between two updates."""


class ProgressLine:
    """Requests done, tokens and speed, on stderr if that is a terminal."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._total = total
        self.enabled = enabled and sys.stderr.isatty()
        """Whether it shows anything, if it takes long enough."""
        self._watch = Stopwatch()
        self._next = _PATIENCE
        self._shown = False

    def update(self, done: int, tokens: int) -> None:
        """``done`` requests have finished, ``tokens`` have been generated."""
        if self.enabled and (seconds := self._watch.seconds) >= self._next:
            self._next = seconds + _PAUSE
            self._shown = True
            rate = tokens / seconds
            sys.stderr.write(f"\r\x1b[2K{done}/{self._total} requests, {tokens} tokens, {rate:.0f} tokens/s")
            sys.stderr.flush()

    def close(self) -> None:
        """Take the line away."""
        if self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
