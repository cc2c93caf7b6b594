"""Counters, a clock, and the one place where the environment is read.

Nothing here is global: a `Settings` is made by whoever stands at the top (the command line, the server) and handed
down; a `StepStats` belongs to the engine that counts in it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal, get_args

from kvfold.errors import KVFoldError

__all__ = ["LogLevel", "Settings", "StepStats", "Stopwatch", "calm_openmp"]

_SPINS = "2000"  # of libgomp: some tenth of a millisecond

LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(slots=True, kw_only=True)
class StepStats:
    """What the steps of an engine have done so far. All counts; ``seconds`` is wall time."""

    steps: int = 0
    """Forward passes of the model."""
    prefill_tokens: int = 0
    """Prompt tokens computed (those taken from the prefix index are not)."""
    decode_tokens: int = 0
    """Tokens computed one at a time, after the prompt."""
    prefix_hit_tokens: int = 0
    """Prompt tokens whose keys and values were found in the prefix index."""
    finished_requests: int = 0
    """Requests that ended, for whatever reason."""
    preemptions: int = 0
    """Requests that gave their blocks back and had to wait."""
    rope_rereads: int = 0
    """Completions that got over the limit of short rotary factors, and were read again under the long ones."""
    seconds: float = 0.0
    """Wall time."""

    @property
    def tokens(self) -> int:
        """Tokens that went through the model."""
        return self.prefill_tokens + self.decode_tokens

    @property
    def tokens_per_s(self) -> float:
        """Tokens through the model per second of wall time; 0 when no time passed."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Stopwatch:
    """Wall time in seconds since its making. The clock can be given, so that tests need not wait."""

    __slots__ = ("_began", "_clock")

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = clock()

    @property
    def seconds(self) -> float:
        """Seconds since the stopwatch was made."""
        return self._clock() - self._began


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a person may set outside of any call."""

    threads: int | None = None
    """CPU threads for the kernels (``KVFOLD_THREADS``); None leaves torch's own choice."""
    log: LogLevel = "warning"
    """Least severity that is logged (``KVFOLD_LOG``)."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read ``KVFOLD_THREADS`` and ``KVFOLD_LOG`` from ``environ`` (by default the process's), and nothing else.

        An unset or empty variable keeps its default; a value that makes no sense is an error, never a default.
        """
        source = os.environ if environ is None else environ
        return cls(threads=_threads(source.get("KVFOLD_THREADS", "")), log=_level(source.get("KVFOLD_LOG", "")))


def calm_openmp(environ: MutableMapping[str, str] | None = None) -> None:
    """Let torch's OpenMP threads spin for a fraction of a millisecond after their work, instead of some ten: they would
    hold the processors that the native kernels use next. For programs, before torch is imported; what a person has
    set stays.
    """
    target = os.environ if environ is None else environ
    if "OMP_WAIT_POLICY" not in target:
        target.setdefault("GOMP_SPINCOUNT", _SPINS)


def _threads(text: str) -> int | None:
    text = text.strip()
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise KVFoldError(
            f"KVFOLD_THREADS={text!r}",
            why="not a positive whole number",
            hint="set it to a number of threads, or unset it",
        )
    return int(text)


def _level(text: str) -> LogLevel:
    wanted = text.strip().lower()
    if not wanted:
        return "warning"
    for level in get_args(LogLevel):
        if level == wanted:
            found: LogLevel = level
            return found
    raise KVFoldError(f"KVFOLD_LOG={text!r}", why="not a log level", hint=f"one of {', '.join(get_args(LogLevel))}")
