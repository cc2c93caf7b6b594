"""The page of a sweep: score and divergence by the share kept and by bytes, a panel for each method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Final

from benchmarks.retention.compare import Comparison, Figures
from benchmarks.retention.session import Sweep
from benchmarks.retention.table import html_table, tally

from kvfold.quality.report.curves import Across, Curve, Panel, Up, curve_drawings
from kvfold.quality.report.page import Section, reproduce, write_page
from kvfold.quality.report.palette import family_styles
from kvfold.quality.results import Row
from kvfold.quality.statistics import mean

__all__ = ["write_sweep"]

_SIDES: Final = ("kvfold", "kvpress")
_NOTES: Final[tuple[tuple[str, str, Across, Up], ...]] = (
    (
        "Score by share kept",
        "Solid: kvfold. Dashed: kvpress's own implementation of the method, on the same tokens. Upright lines: 95 % "
        "intervals. The grey line is the full cache.",
        "share",
        "score",
    ),
    (
        "Divergence by share kept",
        "Mean KL of the next token of a text, whose first part was compressed.",
        "share",
        "kl",
    ),
    (
        "Score by bytes",
        "What is allocated for a token of a text. kvpress's head-wise methods only mask what they drop, so that their "
        "bytes are those of the full cache whatever they keep.",
        "bytes",
        "score",
    ),
    ("Divergence by bytes", "The same bytes.", "bytes", "kl"),
)


def write_sweep(sweep: Sweep, folder: Path) -> Path:
    """``index.html`` and its figures in ``folder``; the page's path."""
    styles = family_styles(_SIDES)
    styles["kvpress"] = replace(styles["kvpress"], dash=(5, 2))
    parts: list[Section | str] = [_head(sweep)]
    for title, text, across, up in _NOTES:
        name = f"{up}-{across}"
        panels = _panels(sweep, across, up)
        parts.append(Section(title, text, name, 3, curve_drawings(name, panels, styles, across=across, up=up)))
    parts.append(
        "<section><h2>Method by method</h2><p class='lead'>Score: mean over tasks. Difference: ours less kvpress's, ± "
        "its standard error, from the same samples in pairs; level: within 1.96 of it.</p>"
        f"{html_table(sweep.comparisons)}</section>"
    )
    parts.append(_commands(sweep))
    parts.append(reproduce(sweep.evaluation))
    return write_page(folder, f"Retention: {sweep.evaluation.model}", parts)


def _head(sweep: Sweep) -> str:
    settings = sweep.evaluation.settings
    what = "the context, before the question is read" if settings.get("compress") == "context" else "the whole prompt"
    return (
        "<header><h1>What dropped tokens cost</h1>"
        f'<p class="lead">Model <b>{escape(sweep.evaluation.model)}</b>, {settings["context"]:,} tokens, '
        f"{settings['samples']} samples of each task. Compressed is {what}.</p></header>"
        f'<div class="verdict open"><p>{escape(tally(sweep.comparisons))}</p></div>'
    )


def _commands(sweep: Sweep) -> str:
    lines = "".join(f"<pre>{escape(command)}</pre>" for command in sweep.commands)
    return f"<section><h2>What measured the rows</h2>{lines}</section>"


def _panels(sweep: Sweep, across: Across, up: Up) -> list[Panel]:
    methods = dict.fromkeys(comparison.method for comparison in sweep.comparisons)
    level = _full(sweep.evaluation.rows) if up == "score" else None
    panels = []
    for method in methods:
        own = [comparison for comparison in sweep.comparisons if comparison.method == method]
        curves = (
            Curve("kvfold", _points(own, lambda each: each.ours, across, up)),
            Curve("kvpress", _points(own, lambda each: each.theirs, across, up)),
        )
        panels.append(Panel(method, curves, level))
    return panels


def _points(
    comparisons: Sequence[Comparison], side: Callable[[Comparison], Figures | None], across: Across, up: Up
) -> tuple[tuple[float, float, float, float], ...]:
    found = []
    for comparison in comparisons:
        if (figures := side(comparison)) is None:
            continue
        place = comparison.keep if across == "share" else figures.kv_bytes
        if up == "kl":
            found.append((comparison.keep, place, figures.kl, figures.kl, figures.kl))
        elif figures.score is not None and figures.low is not None and figures.high is not None:
            found.append((comparison.keep, place, figures.score, figures.low, figures.high))
    return tuple((x, y, low, high) for _, x, y, low, high in sorted(found))  # by share: bytes may be all the same


def _full(rows: Sequence[Row]) -> float | None:
    """The score of the full cache, ours if it was measured."""
    by_name = {row.contestant: row for row in rows if row.tasks}
    row = by_name.get("raw") or by_name.get("transformers-full")
    return None if row is None else mean([score.score for score in row.tasks.values()])
