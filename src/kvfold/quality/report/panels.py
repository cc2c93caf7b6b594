"""Small multiples: one panel of bars for each task, one panel of lines (KL by position) for each family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvfold.quality.report.canvas import SMALL, Drawing, Sheet
from kvfold.quality.report.labels import spread
from kvfold.quality.report.palette import LIGHT, LINES, Style
from kvfold.quality.report.points import OURS, drops_tokens
from kvfold.quality.report.scales import Scale, divergence_ticks, zero_lane

if TYPE_CHECKING:
    from kvfold.quality.results import Row

__all__ = ["position_drawings", "task_drawings"]

_PITCH = 18.0


def task_drawings(rows: Sequence[Row], names: Mapping[str, str], styles: Mapping[str, Style]) -> list[Drawing]:
    """A panel for each task that any row has."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    return [_task(task, [row for row in rows if task in row.tasks], names, styles) for task in tasks]


def _task(task: str, rows: Sequence[Row], names: Mapping[str, str], styles: Mapping[str, Style]) -> Drawing:
    said = ", ".join(f"{names[row.contestant]} {row.tasks[task].score:.2f}" for row in rows)

    def draw(width: float) -> Sheet:
        return _bars(task, rows, names, styles, width)

    return Drawing(f"task-{task}", f"Score in {task}: {said}.", draw)


def _bars(task: str, rows: Sequence[Row], names: Mapping[str, str], styles: Mapping[str, Style], width: float) -> Sheet:
    """For each contestant a bar to its score, its interval, the score in figures; raw's interval as a band."""
    groups = [[row for row in rows if row.family == family] for family in styles]
    ordered = [(row, 6.0 * place) for place, group in enumerate(filter(None, groups)) for row in group]
    heights = [44 + index * _PITCH + gap for index, (_, gap) in enumerate(ordered)]
    bottom = heights[-1] + _PITCH / 2 + 2
    sheet = Sheet(width, bottom + 24)
    counts = sorted({row.tasks[task].n for row in rows})
    sheet.text(6, 13, task, bold=True)
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    sheet.text(width - 6, 13, f"{many} samples", size=SMALL, color=LIGHT["muted"], align="right")
    left = max(sheet.text_width(names[row.contestant], SMALL, bold=row.family == OURS) for row in rows) + 14
    right = width - 42
    axes = sheet.axes(left, 30, right - left, bottom - 30)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom, 30)
    axes.set_yticks([])
    axes.set_xticks([0, 0.5, 1], labels=["0", "0.5", "1"])
    axes.grid(True, axis="x", color=LIGHT["rule"], linewidth=1)
    if (raw := next((row for row in rows if row.recipe == "raw"), None)) is not None:
        score = raw.tasks[task]
        axes.axvspan(score.low, score.high, color=LIGHT["ghost"], alpha=0.5, linewidth=0, zorder=0.5)
        axes.axvline(score.score, color=LIGHT["muted"], linewidth=1, dashes=(4, 2), zorder=3)
    for (row, _), y in zip(ordered, heights, strict=True):
        score, style = row.tasks[task], styles[row.family]
        style = style.outlined() if drops_tokens(row) else style
        axes.barh([y], [score.score], height=8, color=style.color, alpha=0.35, linewidth=0, zorder=2)
        axes.plot([score.low, score.high], [y, y], color=style.color, linewidth=1.4, zorder=4)
        axes.plot([score.score], [y], zorder=5, clip_on=False, **style.mark(6, edge=0.8))
        name, bold = names[row.contestant], row.family == OURS
        sheet.text(left - 9, y, name, size=SMALL, color=style.color, bold=bold, align="right")
        sheet.text(width - 6, y, f"{score.score:.2f}", size=SMALL, align="right")
    return sheet


def position_drawings(rows: Sequence[Row], names: Mapping[str, str], styles: Mapping[str, Style]) -> list[Drawing]:
    """A panel for each family whose rows have KL by position; the same scale in all, the other families in grey."""
    lines = {row.contestant: _finite(row) for row in rows}
    lines = {name: line for name, line in lines.items() if any(kl > 0 for _, kl in line)}
    if not lines:
        return []
    scale = divergence_ticks([kl for line in lines.values() for _, kl in line])
    drawings = []
    for family in styles:
        members = [row.contestant for row in rows if row.family == family and row.contestant in lines]
        if members:
            drawings.append(_family(family, members, lines, names, scale))
    return drawings


def _finite(row: Row) -> list[tuple[int, float]]:
    return [(position, kl) for position, kl in row.kl_by_position if math.isfinite(kl)]


def _family(
    family: str,
    members: Sequence[str],
    lines: Mapping[str, Sequence[tuple[int, float]]],
    names: Mapping[str, str],
    scale: Scale,
) -> Drawing:
    def draw(width: float) -> Sheet:
        return _lines(family, members, lines, names, scale, width)

    ends = ", ".join(f"{names[name]} {lines[name][0][1]:.2g} to {lines[name][-1][1]:.2g}" for name in members)
    return Drawing(f"position-{family}", f"Mean KL by position, {family}: {ends}.", draw)


def _lines(
    family: str,
    members: Sequence[str],
    lines: Mapping[str, Sequence[tuple[int, float]]],
    names: Mapping[str, str],
    scale: Scale,
    width: float,
) -> Sheet:
    sheet = Sheet(width, 340)
    left = max(sheet.text_width(text, SMALL) for _, text in scale.ticks) + 14
    right = width - max(sheet.text_width(names[name], SMALL) for name in members) - 26
    sheet.text(6, 13, family, bold=True)
    sheet.text(6, 32, "↑ better · mean KL, nats", size=SMALL, color=LIGHT["muted"])
    axes = sheet.axes(left, 46, right - left, 246)
    axes.set_ylim(scale.start, scale.end)
    axes.set_yticks([value for value, _ in scale.ticks], labels=[text for _, text in scale.ticks])
    axes.grid(True, axis="y", color=LIGHT["rule"], linewidth=1)
    axes.spines["bottom"].set(visible=True, color=LIGHT["edge"], linewidth=1)
    places = [position for line in lines.values() for position, _ in line]
    first, last = min(places), max(places)
    axes.set_xlim(first, last if last > first else first + 1)
    marks = [first, (first + last) // 2, last] if last > first else [first]
    axes.set_xticks(marks, labels=[f"{mark:,}" for mark in marks])
    sheet.text(left, 326, "position in the text, tokens", size=SMALL, color=LIGHT["muted"])
    zero = zero_lane([kl for line in lines.values() for _, kl in line])

    def heights(name: str) -> list[float]:
        return [math.log10(max(kl, zero)) for _, kl in lines[name]]

    for name in [name for name in lines if name not in members]:
        axes.plot([p for p, _ in lines[name]], heights(name), color=LIGHT["ghost"], linewidth=1, zorder=2)
    ends = [46 + (1 - scale.part(heights(name)[-1])) * 246 for name in members]
    for index, (name, end, y) in enumerate(zip(members, ends, spread(ends, 15, 46, 300), strict=True)):
        style, across = LINES[index % len(LINES)], [p for p, _ in lines[name]]
        axes.plot(
            across,
            heights(name),
            color=style.color,
            linewidth=1.8,
            dashes=style.dash or (1, 0),
            marker=style.marker,
            markersize=5,
            markevery=(index % 4, 4) if len(across) > 4 else 1,
            zorder=4,
            clip_on=False,
        )
        sheet.line([right + 5, right + 15], [end, y], color=style.color, width=0.8)
        sheet.text(right + 18, y, names[name], size=SMALL, color=style.color)
    return sheet
