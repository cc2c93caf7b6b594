"""Method by method: our row beside kvpress's at the same share kept, and whether they differ by more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.retention.methods import Method

from kvfold.quality.results import Row
from kvfold.quality.statistics import mean

__all__ = ["Comparison", "Figures", "compare", "paired"]

_Z95: Final = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One side at one share. ``score``: mean over tasks of their mean scores, 0 to 1, and its 95 % interval from
    ``low`` to ``high``; None without tasks. ``kl`` in nats; ``kv_bytes``: a token's, of what is allocated.
    """

    contestant: str
    score: float | None
    low: float | None
    high: float | None
    tasks: dict[str, float]
    kl: float
    kv_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A method at a share kept; a side that was not measured is None, and so is what needs both.

    ``difference``: our score less theirs. ``error``: its standard error, from the differences of single samples, each
    task by itself. ``level``: the difference is within its 95 % interval.
    """

    method: str
    keep: float
    ours: Figures | None
    theirs: Figures | None
    difference: float | None
    error: float | None
    level: bool | None

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare(
    rows: Sequence[Row], methods: Sequence[Method], keeps: Sequence[float], base: str = "raw"
) -> list[Comparison]:
    """A comparison for each method and share that at least one side of was measured, by method, then from much kept to
    little.
    """
    by_name = {row.contestant: row for row in rows}
    found = []
    for method in methods:
        for keep in sorted(keeps, reverse=True):
            ours, theirs = by_name.get(method.ours(keep, base)), by_name.get(method.theirs(keep) or "")
            if ours is not None or theirs is not None:
                found.append(_comparison(method.name, keep, ours, theirs))
    return found


def paired(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """The mean over tasks of ours less theirs, and its standard error. Scores of the same samples in the same order;
    ValueError if they cannot be.

    Samples of a task are alike, those of two tasks are not, so the variance is that of each task around its own mean.
    """
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError(f"tasks {sorted(ours)} and {sorted(theirs)} are not the same")
    means, variances = [], []
    for task, mine in ours.items():
        differences = [one - other for one, other in zip(mine, theirs[task], strict=True)]
        n, middle = len(differences), mean(differences)
        means.append(middle)
        spread = math.fsum((value - middle) ** 2 for value in differences)
        variances.append(spread / (n - 1) / n if n > 1 else math.inf)
    return mean(means), math.sqrt(math.fsum(variances)) / len(means)


def _comparison(method: str, keep: float, ours: Row | None, theirs: Row | None) -> Comparison:
    difference = error = level = None
    if ours is not None and theirs is not None and all(map(_scores, (ours, theirs))):
        difference, error = paired(_scores(ours), _scores(theirs))
        level = abs(difference) <= _Z95 * error
    sides = [None if row is None else _figures(row) for row in (ours, theirs)]
    return Comparison(
        method=method,
        keep=keep,
        ours=sides[0],
        theirs=sides[1],
        difference=difference,
        error=None if error is None or math.isinf(error) else error,
        level=level,
    )


def _scores(row: Row) -> dict[str, tuple[float, ...]]:
    """Of each sample, by task; empty for a result that does not tell them."""
    return {task: score.scores for task, score in row.tasks.items() if score.scores}


def _figures(row: Row) -> Figures:
    tasks = row.tasks.values()
    score = mean([task.score for task in tasks]) if tasks else None
    # Tasks are independent samples: what their intervals reach down and up adds up as squares.
    below = math.hypot(*(task.score - task.low for task in tasks))
    above = math.hypot(*(task.high - task.score for task in tasks))
    return Figures(
        contestant=row.contestant,
        score=score,
        low=None if score is None else score - below / len(tasks),
        high=None if score is None else score + above / len(tasks),
        tasks={task: score.score for task, score in row.tasks.items()},
        kl=row.kl_mean,
        kv_bytes=row.kv_bytes_per_token,
    )
