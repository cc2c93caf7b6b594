"""The report's tables, as HTML: all rows with the best values marked, where each rival stands, facts about the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from kvfold.quality.report.points import OURS, Measure, Standing, common_tasks, frontier, standing
from kvfold.quality.report.scales import number_text

if TYPE_CHECKING:
    from kvfold.quality.results import Row

__all__ = ["facts_table", "standing_table", "summary_table", "task_table"]

_LONG = 36  # a name of more letters is broken into lines
_NOTHING = '<td class="none">–</td>'
_NOT_MEASURED = '<td class="none" title="the text is too short for the method to leave anything out">not measured</td>'


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of figures. ``better``: +1 if more is, -1 if less is, 0 if neither."""

    head: str
    read: Callable[[Row], float | None]
    text: Callable[[float], str]
    better: int
    scored: bool = False
    """Read off given text, so that a method may never have acted on it (`Row.idle`)."""


def _signed(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "") + number_text(abs(value))


def _columns(tasks: Sequence[str]) -> list[_Column]:
    def generation(name: str) -> Callable[[Row], float | None]:
        def read(row: Row) -> float | None:
            value = getattr(row.generation, name, None)
            return None if value is None else float(value)

        return read

    def score(row: Row) -> float | None:
        return sum(row.tasks[task].score for task in tasks) / len(tasks) if tasks and row.tasks else None

    def percent(value: float) -> str:
        return f"{value:.2%}".replace("%", " %")

    return [
        _Column("bits a\u00a0value", lambda row: row.bits_per_value, lambda value: f"{value:.2f}", -1),
        _Column("bytes a\u00a0token", lambda row: row.kv_bytes_per_token, lambda value: f"{value:,.0f}", -1),
        _Column("compression", lambda row: row.compression, lambda value: f"{value:.2f} ×", 1),
        _Column("mean KL", lambda row: row.kl_mean, number_text, -1, scored=True),
        _Column("99th pct. KL", lambda row: row.kl_p99, number_text, -1, scored=True),
        _Column("same top token", lambda row: row.top1_agreement, percent, 1, scored=True),
        _Column("perplexity, change", lambda row: row.ppl_delta, _signed, 0, scored=True),
        _Column("KL, long generation", generation("kl_mean"), number_text, -1, scored=True),
        _Column(
            "first divergence, token", generation("first_divergence"), lambda value: f"{value:,.0f}", 1, scored=True
        ),
        _Column("mean task\u00a0score", score, lambda value: f"{value:.3f}", 1),
        _Column("decode, tokens/s", lambda row: row.decode_tok_s or None, lambda value: f"{value:,.1f}", 1),
    ]


def summary_table(rows: Sequence[Row], families: Iterable[str], fronts: Mapping[str, Measure]) -> str:
    """All rows by family and size. Marked: the best of each column, raw and its equals (KL 0) aside."""
    on_front = {point.name for point in frontier(fronts["kl"].points)} if "kl" in fronts else set()
    columns = [c for c in _columns(common_tasks(rows)) if any(_finite(c.read(row)) is not None for row in rows)]
    best = [_best(column, rows) for column in columns]
    head = "".join(f"<th>{escape(column.head)}</th>" for column in columns)
    body = []
    for family in families:
        members = sorted((row for row in rows if row.family == family), key=lambda row: -row.kv_bytes_per_token)
        for place, row in enumerate(members):
            cells = []
            for column, top in zip(columns, best, strict=True):
                value = _finite(column.read(row))
                mark = ' class="best"' if value is not None and column.text(value) == top and not _is_full(row) else ""
                idle = row.idle or (row.generation.idle if row.generation is not None else ())
                nothing = _NOT_MEASURED if column.scored and idle else _NOTHING
                cells.append(nothing if value is None else f"<td{mark}>{escape(column.text(value))}</td>")
            marks = {"ours": family == OURS, "front": row.contestant in on_front, "long": len(row.contestant) > _LONG}
            named = " ".join(mark for mark, holds in marks.items() if holds)
            start = ' class="first"' if place == 0 else ""
            body.append(f'<tr{start}><th class="{named}">{escape(row.contestant)}</th>{"".join(cells)}</tr>')
    return _scroll(f"<thead><tr><th>contestant</th>{head}</tr></thead><tbody>{''.join(body)}</tbody>")


def _is_full(row: Row) -> bool:
    """Whether it is raw or its equal, which the best values are not chosen from; so is what never acted."""
    return row.kl_mean is None or row.kl_mean == 0


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _best(column: _Column, rows: Sequence[Row]) -> str | None:
    """The best value as its text: what looks equal is marked alike. None if there is nothing to choose from."""
    values = [value for row in rows if not _is_full(row) and (value := _finite(column.read(row))) is not None]
    if not column.better or len(values) < 2:
        return None
    return column.text(max(values, key=lambda value: value * column.better))


def standing_table(measures: Sequence[Measure], rows: Sequence[Row]) -> str:
    """For each rival and measure: whether it beats a kvfold point or is beaten by one. Empty without rivals."""
    rivals = [row for row in rows if row.family != OURS]
    if not rivals or len(rivals) == len(rows):
        return ""
    body = []
    for row in rivals:
        cells = []
        for measure in measures:
            point = next((point for point in measure.points if point.name == row.contestant), None)
            cells.append(_NOTHING if point is None else _standing(standing(point, measure.points)))
        body.append(f"<tr><th>{escape(row.contestant)}</th>{''.join(cells)}</tr>")
    head = "".join(f'<th class="text">{escape(measure.title)}</th>' for measure in measures)
    return _scroll(f"<thead><tr><th>rival</th>{head}</tr></thead><tbody>{''.join(body)}</tbody>")


def _standing(found: Standing) -> str:
    if found.kind == "ahead":
        return f'<td class="text ahead">▲ beats {escape(", ".join(found.ahead))}</td>'
    if found.kind == "behind":
        beats = f"; beats {', '.join(found.ahead)}" if found.ahead else ""
        return f'<td class="text">▽ beaten by {escape(found.behind[0] + beats)}</td>'
    if found.kind == "same":
        return f'<td class="text">= level with {escape(", ".join(found.same))}</td>'
    return '<td class="text ahead">◇ beyond the line, beats none</td>'


def task_table(rows: Sequence[Row]) -> str:
    """Every task score with its interval."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    body = []
    for row in rows:
        if not row.tasks:
            continue
        cells = []
        for task in tasks:
            score = row.tasks.get(task)
            text = f"{score.score:.2f} <span class='none'>{score.low:.2f}–{score.high:.2f}</span>" if score else ""
            cells.append(f"<td>{text}</td>" if score else _NOTHING)
        body.append(f"<tr><th>{escape(row.contestant)}</th>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(task)}</th>" for task in tasks)
    return _scroll(f"<thead><tr><th>contestant</th>{head}</tr></thead><tbody>{''.join(body)}</tbody>")


def facts_table(title: str, facts: Mapping[str, object]) -> str:
    """Names and values; what is nested is listed in a line."""
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_plain(value))}</td></tr>" for name, value in facts.items()
    )
    return f"<div><h3>{escape(title)}</h3><table><tbody>{lines}</tbody></table></div>"


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return (
        {True: "yes", False: "no", None: "–"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)
    )


def _scroll(inside: str) -> str:
    return f'<div class="scroll" tabindex="0"><table>{inside}</table></div>'
