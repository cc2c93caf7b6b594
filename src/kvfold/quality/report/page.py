"""The page: one self-contained ``index.html``, and each figure as PNG beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from kvfold.quality.report.canvas import ReportError, house_style, png, require_matplotlib, sheet_of
from kvfold.quality.report.frontier import frontier_drawing
from kvfold.quality.report.layout import Section, html_page, render, write_whole
from kvfold.quality.report.maps import error_drawings
from kvfold.quality.report.palette import Style, family_styles
from kvfold.quality.report.panels import position_drawings, task_drawings
from kvfold.quality.report.points import OURS, Measure, measures, short_names, verdict
from kvfold.quality.report.tables import facts_table, standing_table, summary_table, task_table

if TYPE_CHECKING:
    from kvfold.quality.results import Evaluation

__all__ = ["Section", "reproduce", "write_page", "write_report"]


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """Write ``index.html`` and the PNGs of its figures into ``folder``; returns the page's path.

    All of it is made in memory first: an error leaves the folder as it was. The same evaluation gives the same bytes.
    """
    require_matplotlib()
    if not evaluation.rows:
        raise ReportError("the report has nothing to show", why="no row was measured", hint="name at least one recipe")
    return write_page(folder, f"kvfold eval: {evaluation.model}", _parts(evaluation))


def write_page(folder: Path, title: str, parts: Sequence[Section | str]) -> Path:
    """Write ``index.html`` of these parts (texts are HTML) and the PNGs of its figures into ``folder``; returns the
    page's path. As `write_report`, of which this is the second half.
    """
    require_matplotlib()
    with house_style():
        made = _files(title, parts)
    write_whole({folder / name: data for name, data in made.items()})
    return folder / "index.html"


def _parts(evaluation: Evaluation) -> list[Section | str]:
    """The report of an evaluation, from its first line to its last."""
    rows = evaluation.rows
    found, names, styles = measures(rows), short_names(rows), family_styles(row.family for row in rows)
    first, *others = [*_frontiers(found, names, styles), *_details(evaluation, names, styles)]
    summary = _summary(evaluation, found, styles)
    return [_head(evaluation), _verdicts(found), first, summary, *others, reproduce(evaluation)]


def _files(title: str, parts: Sequence[Section | str]) -> dict[str, bytes]:
    """Every file of a page: PNGs first, the page last."""
    made = [(part, {}) if isinstance(part, str) else _render(part) for part in parts]
    pictures = {f"{name}.png": data for _, images in made for name, data in images.items()}
    return pictures | {"index.html": html_page(title, "".join(html for html, _ in made))}


def _frontiers(found: Sequence[Measure], names: dict[str, str], styles: dict[str, Style]) -> list[Section]:
    drawings = [frontier_drawing(measure, names, styles) for measure in found]
    main = [d for d, measure in zip(drawings, found, strict=True) if measure.key == "kl"]
    rest = [d for d, measure in zip(drawings, found, strict=True) if measure.key != "kl"]
    how = (
        "Up is closer to the full cache, left is smaller. The line is the frontier of kvfold's points. What lies in "
        "the tinted area is beaten by one of them: it takes at least as many bytes and is no better."
    )
    more = (
        "Divergence over raw's own long greedy continuations, where errors that look harmless add up, and the mean "
        "score of all tasks (upright lines: 95 % intervals)."
    )
    return [
        Section("The frontier", how, "frontier", 1, main),
        Section("The frontier, by other measures", more, "frontier", 2, rest),
    ]


def _details(evaluation: Evaluation, names: dict[str, str], styles: dict[str, Style]) -> list[Section]:
    rows = evaluation.rows
    tasks, positions = task_drawings(rows, names, styles), position_drawings(rows, names, styles)
    scores = f"<details><summary>All scores as a table</summary>{task_table(rows)}</details>" if tasks else ""
    return [
        Section(
            "Task by task",
            "Share of the expected answers that were found. Thin lines are 95 % intervals. The dashed line and the "
            "grey band are raw and its interval, so a mark inside the band is within noise of the full cache.",
            "tasks",
            3,
            tasks,
            scores,
        ),
        Section(
            "Divergence by position",
            "Mean KL against raw along the text. A line that sinks to the right drifts: errors add up as the cache "
            "grows. All panels have the same scale; grey lines are the other families. Raw itself is zero throughout.",
            "positions",
            2,
            positions,
        ),
        Section(
            "Where the error sits",
            "Relative error of what is packed, in percent, by layer and KV head. All maps share one scale.",
            "errors",
            3,
            error_drawings(rows, names),
            kind="maps scaled",
        ),
    ]


def _render(section: Section) -> tuple[str, dict[str, bytes]]:
    """The section as HTML, and its PNGs: one for each frontier; small multiples come as one sheet."""
    html, sheets = render(section)
    images = {name: png(sheet) for name, sheet in sheets.items()}
    if images and section.name != "frontier":
        images = {section.name: sheet_of(list(images.values()), section.columns)}
    return html, images


def _head(evaluation: Evaluation) -> str:
    ours = sum(row.family == OURS for row in evaluation.rows)
    count = f"{ours} kvfold recipe{'s' * (ours != 1)}"
    if rivals := len(evaluation.rows) - ours:
        count += f" and {rivals} rival{'s' * (rivals != 1)}"
    positions = max(row.positions for row in evaluation.rows)
    tasks = " and on tasks with known answers" if any(row.tasks for row in evaluation.rows) else ""
    return (
        f"<header><h1>What a smaller cache costs</h1>"
        f'<p class="lead">Model <b>{escape(evaluation.model)}</b>. {count}, each measured against the full cache '
        f"(raw) on the same {positions:,} tokens of text{tasks}.</p></header>"
    )


def _verdicts(found: Sequence[Measure]) -> str:
    told = [(measure, *verdict(measure)) for measure in found]
    results = [held for _, held, _ in told if held is not None]
    if not results:
        kind = "open"
        lines = [f"<p>{escape(told[0][2])}</p>"] if told else []
    else:
        kind = "lost" if False in results else "held" if len(results) == len(told) else "open"
        lines = [f"<p><b>{escape(measure.title)}.</b> {escape(text)}</p>" for measure, _, text in told]
    return f'<div class="verdict {kind}">{"".join(lines)}</div>'


def _summary(evaluation: Evaluation, found: Sequence[Measure], styles: dict[str, Style]) -> str:
    rows = evaluation.rows
    text = (
        "<section><h2>All figures</h2><p class='lead'>KL in nats. <b>Underlined</b>: best of the column, contestants "
        "that change nothing (KL 0) aside. <span class='ours'>◆</span> on kvfold's frontier of mean KL.</p>"
    )
    text += summary_table(rows, styles, {measure.key: measure for measure in found})
    if table := standing_table(found, rows):
        text += (
            "<h3>Where each rival stands</h3><p class='note'>A point beats another if it has no more bytes and is no "
            "worse, and is better in one of the two. Values are compared as measured: between close task scores a "
            f"difference may be noise.</p>{table}"
        )
    return text + "</section>"


def reproduce(evaluation: Evaluation) -> str:
    """How the figures were made, as HTML: command, settings, versions, hardware."""
    settings = {"model": evaluation.model, "seed": evaluation.seed} | evaluation.settings
    tables: list[tuple[str, Mapping[str, object]]] = [
        ("Settings", settings),
        ("Versions", evaluation.versions),
        ("Hardware", evaluation.hardware),
    ]
    facts = "".join(facts_table(title, values) for title, values in tables if values)
    return (
        f"<section><h2>How to get these figures</h2><pre>{escape(evaluation.command)}</pre>"
        f'<div class="facts">{facts}</div></section>'
    )
