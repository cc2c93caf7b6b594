"""Points of the frontier: which measure, who beats whom, and what may be said about the rivals. Pure arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvfold.quality.results import Row

__all__ = [
    "Measure",
    "Point",
    "Standing",
    "common_tasks",
    "drops_tokens",
    "frontier",
    "measures",
    "short_names",
    "standing",
    "verdict",
]

OURS = "kvfold"


@dataclass(frozen=True, slots=True)
class Point:
    """One contestant under one measure: what it costs and what it gives. ``low``, ``high``: 95 % interval. ``drops``:
    as `drops_tokens`.
    """

    name: str
    family: str
    bytes: float
    value: float
    loss: float
    low: float
    high: float
    drops: bool = False

    def beats(self, other: Point) -> bool:
        """No more bytes and no more loss, and less of one."""
        as_good = self.bytes <= other.bytes and self.loss <= other.loss
        return as_good and (self.bytes < other.bytes or self.loss < other.loss)


@dataclass(frozen=True, slots=True)
class Measure:
    """One way to say how good a cache is. ``log``: a divergence, from 0 up, less is better; else a score, more is.

    ``absent``: contestants without a finite value, which can be neither drawn nor compared.
    """

    key: str
    title: str
    axis: str
    log: bool
    points: list[Point]
    absent: list[str]


@dataclass(frozen=True, slots=True)
class Standing:
    """The kvfold points that a rival's point beats (``ahead``), is beaten by (``behind``) and is level with."""

    ahead: list[str]
    behind: list[str]
    same: list[str]

    @property
    def kind(self) -> str:
        """``behind`` if any kvfold point beats it: then it lies inside the frontier, whatever else it beats. Else
        ``ahead``, or ``same``, or ``between``: it neither beats nor is beaten, and lies beyond the line.
        """
        if self.behind:
            return "behind"
        if self.ahead:
            return "ahead"
        return "same" if self.same else "between"


def short_names(rows: Sequence[Row], limit: int = 26) -> dict[str, str]:
    """Contestant -> label: without the family (colour and shape tell it) and, of recipes that drop tokens, the options
    of what packs the others, where that tells them apart; cut in the middle if long, always unique.
    """
    names: dict[str, str] = {}
    bare = Counter(_bare(row.contestant) for row in rows)
    for row in rows:
        rest = row.contestant.removeprefix(f"{row.family}-")
        name = rest if rest[:1].isalpha() else row.contestant
        if drops_tokens(row) and bare[_bare(name)] == 1:
            name = _bare(name)
        if len(name) > limit:
            name = f"{name[: limit - 12]}…{name[-11:]}"
        if name in names.values():
            name = f"{name} #{sum(other.startswith(name) for other in names.values()) + 1}"
        names[row.contestant] = name
    return names


def _bare(recipe: str) -> str:
    """A recipe text without the options before its clauses, if it has clauses."""
    plain, plus, clauses = recipe.partition("+")
    return f"{plain.partition(',')[0]}+{clauses}" if plus else recipe


def drops_tokens(row: Row) -> bool:
    """Whether it is a recipe of ours that does not keep all tokens: drawn as an outline among those that do. Rivals'
    families are all of one kind.
    """
    return row.family == OURS and row.bits_per_value is None


def common_tasks(rows: Sequence[Row]) -> list[str]:
    """Tasks that every row with any task has, in the order of the first: what a mean may be taken over."""
    tested = [row.tasks for row in rows if row.tasks]
    return [task for task in tested[0] if all(task in tasks for tasks in tested)] if tested else []


def measures(rows: Sequence[Row]) -> list[Measure]:
    """Every measure that at least one row has."""
    tasks = common_tasks(rows)

    def kl(row: Row) -> tuple[float, float, float] | None:
        return None if row.kl_mean is None else (row.kl_mean,) * 3

    def generated(row: Row) -> tuple[float, float, float] | None:
        mean = None if row.generation is None else row.generation.kl_mean
        return None if mean is None else (mean,) * 3

    def scored(row: Row) -> tuple[float, float, float] | None:
        if not tasks or not row.tasks:
            return None
        scores = [row.tasks[task] for task in tasks]
        mean = sum(score.score for score in scores) / len(scores)
        # Tasks are independent samples: the half widths of their intervals add up as squares.
        below = math.hypot(*(score.score - score.low for score in scores)) / len(scores)
        above = math.hypot(*(score.high - score.score for score in scores)) / len(scores)
        return mean, mean - below, mean + above

    axis = "mean KL against raw, nats"
    found = []
    for key, title, what, log, read in (
        ("kl", "Text", axis, True, kl),
        ("generation", "Long generation", axis, True, generated),
        ("tasks", "Tasks", f"mean score of {len(tasks)} tasks", False, scored),
    ):
        if points := _points(rows, read, log=log):
            drawn = {point.name for point in points}
            absent = [row.contestant for row in rows if row.contestant not in drawn]
            found.append(Measure(key, title, what, log, points, absent))
    return found


def _points(rows: Sequence[Row], read: Callable[[Row], tuple[float, float, float] | None], *, log: bool) -> list[Point]:
    points = []
    for row in rows:
        values = read(row)
        if values is None or not all(map(math.isfinite, (*values, row.kv_bytes_per_token))):
            continue
        if row.kv_bytes_per_token > 0:
            loss = max(values[0], 0.0) if log else -values[0]
            size, drops = row.kv_bytes_per_token, drops_tokens(row)
            points.append(Point(row.contestant, row.family, size, values[0], loss, *values[1:], drops))
    return points


def frontier(points: Sequence[Point]) -> list[Point]:
    """kvfold's points that no other kvfold point beats, by bytes; of equal ones the first."""
    ours = [point for point in points if point.family == OURS]
    kept = [point for point in ours if not any(other.beats(point) for other in ours)]
    places = {(point.bytes, point.loss): point for point in reversed(kept)}
    return sorted(places.values(), key=lambda point: point.bytes)


def standing(point: Point, points: Sequence[Point]) -> Standing:
    """Where ``point`` lies among kvfold's points, which are named from the smallest up."""
    ours = sorted((other for other in points if other.family == OURS), key=lambda other: (other.bytes, other.loss))
    return Standing(
        ahead=[other.name for other in ours if point.beats(other)],
        behind=[other.name for other in ours if other.beats(point)],
        same=[other.name for other in ours if (other.bytes, other.loss) == (point.bytes, point.loss)],
    )


def verdict(measure: Measure) -> tuple[bool | None, str]:
    """Whether kvfold holds the frontier under ``measure`` (None: nobody to compare), and that in words."""
    held, text = _compared(measure)
    return held, f"{text} Not compared, without a value: {', '.join(measure.absent)}." if measure.absent else text


def _compared(measure: Measure) -> tuple[bool | None, str]:
    rivals = [point for point in measure.points if point.family != OURS]
    if not rivals:
        return None, "No rival to compare with."
    if len(rivals) == len(measure.points):
        return None, "No kvfold recipe to compare with."
    kinds = [(point.name, standing(point, measure.points)) for point in rivals]
    inside = [f"{name} beats {', '.join(found.ahead)}" for name, found in kinds if found.behind and found.ahead]
    aside = f" Inside it, {'; '.join(inside)}." if inside else ""
    told = []
    if ahead := [f"{name} (beats {', '.join(found.ahead)})" for name, found in kinds if found.kind == "ahead"]:
        told.append(f"Above and left of kvfold's points: {'; '.join(ahead)}.")
    if between := [name for name, found in kinds if found.kind in ("between", "same")]:
        told.append(f"On or beyond the frontier, though no kvfold point is beaten: {', '.join(between)}.")
    if told:
        return False, " ".join(told) + aside.replace("Inside it", "Inside the frontier")
    return True, f"No rival's point lies on or beyond the frontier of kvfold's points.{aside}"
