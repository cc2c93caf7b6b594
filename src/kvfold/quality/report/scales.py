"""Scales with round ticks: bytes by powers of two, divergences by powers of ten with a lane for zero, scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "Scale",
    "byte_ticks",
    "bytes_text",
    "divergence_ticks",
    "number_text",
    "score_ticks",
    "share_ticks",
    "zero_lane",
]

_TINY = 1e-8  # a divergence below this is rounding, and drawn as zero
_LANE = 0.55  # decades from the smallest divergence to the lane of zero
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis from ``start`` to ``end`` (which may be less), with ticks (value, text)."""

    start: float
    end: float
    ticks: list[tuple[float, str]]

    def part(self, value: float) -> float:
        """Where ``value`` lies: 0 at the start, 1 at the end."""
        return (value - self.start) / (self.end - self.start)


def bytes_text(count: float) -> str:
    """``768 B``, ``1.5 KiB``."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit * 0.9995:
            return f"{count / unit:.3g} {name}"
    return f"{count:.3g} B"


def number_text(value: float) -> str:
    """Two significant digits: ``0.012``, and ``1.2·10⁻⁵`` where zeros would have to be counted."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:,.0f}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}·10{str(int(power)).translate(_SUPERSCRIPT)}"


def byte_ticks(low: float, high: float, *, most: int) -> Scale:
    """A scale of log2 bytes with at most ``most`` ticks."""
    start, end = math.log2(low), math.log2(high)
    room = max((end - start) * 0.07, 0.18)
    start, end = start - room, end + room
    octaves = range(math.floor(start) - 1, math.ceil(end) + 1)
    best: list[float] = []
    for parts in ((1.0, 1.25, 1.5, 1.75), (1.0, 1.5), (1.0,)):
        best = [2.0**octave * part for octave in octaves for part in parts]
        best = [value for value in best if start <= math.log2(value) <= end]
        if len(best) <= most:
            break
    every = math.ceil(len(best) / most) if best else 1
    return Scale(start, end, [(math.log2(value), bytes_text(value)) for value in best[::every]])


def zero_lane(values: Iterable[float]) -> float:
    """The divergence that stands for zero: below every one that is not."""
    seen = [value for value in values if value > _TINY]
    return 10 ** (math.log10(min(seen)) - _LANE) if seen else _TINY


def divergence_ticks(values: Sequence[float]) -> Scale:
    """A scale of log10 divergence that ends at the best value. Zero, if there is one, has a lane of its own there."""
    seen = [math.log10(value) for value in values if value > _TINY] or [math.log10(_TINY) + _LANE]
    has_zero = any(value <= _TINY for value in values)
    worst, best = max(seen), min(seen)
    room = max((worst - best) * 0.08, 0.22)  # from 1, 2 and 5 times a power of ten the next is never farther
    parts = (1, 2, 5) if worst - best < 1.2 else (1, 3) if worst - best < 2.6 else (1,)
    decades = range(math.floor(best) - 1, math.ceil(worst) + 1)
    ticks = [(decade + math.log10(part), _decimal(part, decade)) for decade in decades for part in parts]
    end = best - _LANE - 0.25 if has_zero else best - room
    shown = [tick for tick in ticks if best - room <= tick[0] <= worst + room]
    if has_zero:
        lane = best - _LANE
        shown = [tick for tick in shown if tick[0] > lane + 0.2] + [(lane, "0")]
    return Scale(worst + room, end, shown)


def _decimal(part: int, decade: int) -> str:
    if -3 <= decade <= 2:
        return f"{part * 10.0**decade:g}"
    power = f"10{str(decade).translate(_SUPERSCRIPT)}"
    return power if part == 1 else f"{part}·{power}"


def score_ticks(low: float, high: float) -> Scale:
    """A scale of scores that holds ``low`` to ``high``, with a margin for names above the best."""
    room = max((high - low) * 0.06, 0.01)
    start, end = max(low - room, -0.03), min(high, 1.0) + room * 2
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (end - start) / step <= 7)
    first = math.ceil(start / step)
    ticks = [
        (number * step, f"{number * step:.3g}") for number in range(first, math.floor(min(end, 1.0) / step + 1e-9) + 1)
    ]
    return Scale(start, end, ticks)


def share_ticks(low: float) -> Scale:
    """A scale of log2 shares from ``low`` up to all, with a tick at each halving."""
    start = math.log2(min(low, 0.5))
    ticks = [(-float(power), f"{2.0**-power:.4g}") for power in range(math.floor(-start + 1e-9), -1, -1)]
    return Scale(start - 0.2, 0.2, ticks)
