"""Progress on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Final, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

__all__ = ["Counter", "PlainLines", "counted_progress", "share_progress"]

_ESTIMATE_SECONDS: Final = 3600.0  # units of work differ in length, so that only a long look back tells the speed
_LINE_SECONDS: Final = 3.0
_STILL_SECONDS: Final = 30.0
_TICK_SECONDS: Final = 0.5

Update = Callable[[str, float], None]
"""Told what is done now, and which share of everything is done."""


class PlainLines:
    """Writes what is being done as lines: at most one in three seconds, and one in thirty while nothing changes.

    `tick` is to be called again and again; ``clock`` can be given, so that tests need not wait.
    """

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._began = clock()
        self._written_at: float | None = None
        self._state: tuple[str, float] | None = None
        self._written: tuple[str, float] | None = None

    def update(self, what: str, share: float) -> None:
        """What is done now, and which share of everything is done."""
        self._state = what, share
        self.tick()

    def tick(self) -> None:
        """Writes a line if it is time for one."""
        if self._state is None:
            return
        wait = _LINE_SECONDS if self._state != self._written else _STILL_SECONDS
        now = self._clock()
        if self._written_at is None or now - self._written_at >= wait:
            state = self._state
            self._written_at, self._written = now, state
            print(f"kvfold: {now - self._began:4.0f} s {state[1]:4.0%}  {state[0]}", file=self._out, flush=True)


@contextmanager
def share_progress() -> Iterator[Update]:
    """Progress of work that knows which share of it is done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        with _plain() as update:
            yield update
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, speed_estimate_period=_ESTIMATE_SECONDS) as progress:
        task = progress.add_task("loading", total=1.0)
        yield lambda what, share: progress.update(task, completed=share, description=what)


@contextmanager
def _plain() -> Iterator[Update]:
    lines, done = PlainLines(sys.stderr), Event()
    lines.update("loading", 0.0)

    def watch() -> None:
        while not done.wait(_TICK_SECONDS):
            lines.tick()

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lines.update
    finally:
        done.set()
        thread.join()


class Counter:
    """Says what begins, and counts it: one of ``steps``, which may become known only later."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self._begun = 0
        self.steps = 0

    def __call__(self, what: str) -> None:
        """``what`` begins now."""
        self._begun += 1
        self._update(what, min(1.0, self._begun / (self.steps + 1)) if self.steps else 0.0)


@contextmanager
def counted_progress(steps: int = 0) -> Iterator[Counter]:
    """The same for work that is counted in ``steps``; 0: set `Counter.steps` once they are known."""
    with share_progress() as update:
        counter = Counter(update)
        counter.steps = steps
        yield counter
