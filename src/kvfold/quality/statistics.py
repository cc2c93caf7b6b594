"""Means with their intervals, quantiles and bins. Plain Python: figures are the same wherever they are computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from kvfold.quality.results import TaskScore

__all__ = ["binned", "mean", "median", "quantile", "task_score"]

_Z95: Final = 1.959963984540054


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean, summed without loss."""
    return math.fsum(values) / len(values)


def quantile(values: Sequence[float], q: float) -> float:
    """The ``q`` quantile, between neighbours by their distance."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of both."""
    return quantile(values, 0.5)


def task_score(scores: Sequence[float]) -> TaskScore:
    """The mean of scores from 0 to 1 with Wilson's 95 % interval, which stays within 0 and 1 and has a width even where
    all scores are equal. For scores between 0 and 1 it is wider than it need be.
    """
    n, p = len(scores), mean(scores)
    spread = _Z95 * math.sqrt(p * (1 - p) / n + _Z95**2 / (4 * n * n))
    low, high = ((p + _Z95**2 / (2 * n) + sign * spread) / (1 + _Z95**2 / n) for sign in (-1, 1))
    return TaskScore(score=p, low=max(0.0, min(low, p)), high=min(1.0, max(high, p)), n=n, scores=tuple(scores))


def binned(values: Sequence[Sequence[float]], first: int, bins: int) -> list[tuple[int, float]]:
    """Means over equally long rows of ``values``, in at most ``bins`` equal bins of their positions: (first position of
    the bin, mean). ``first``: the position of column 0.
    """
    columns = len(values[0])
    count = min(bins, columns)
    edges = [i * columns // count for i in range(count + 1)]
    return [(first + low, mean([value for row in values for value in row[low:high]])) for low, high in pairwise(edges)]
