"""The frontier: quality against bytes per token, so that up and left is better, every point named where it stands."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvfold.quality.report.canvas import SIZE, SMALL, Drawing, Sheet
from kvfold.quality.report.labels import Box, Segment, place
from kvfold.quality.report.palette import LIGHT, Style
from kvfold.quality.report.points import OURS, Measure, Point, frontier
from kvfold.quality.report.scales import Scale, byte_ticks, score_ticks, zero_lane
from kvfold.quality.report.scales import divergence_ticks as kl_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["frontier_drawing"]

_RADIUS = 6.5


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where the axes lie and how values become pixels."""

    box: Box
    across: Scale
    down: Scale
    zero: float | None  # below this a divergence is drawn in the lane of zero

    def x(self, point: Point) -> float:
        return self.box.x0 + self.across.part(math.log2(point.bytes)) * (self.box.x1 - self.box.x0)

    def y(self, value: float) -> float:
        """Pixels down, of a divergence or a score."""
        if self.zero is not None:
            value = math.log10(max(value, self.zero))
        return self.box.y1 - self.down.part(value) * (self.box.y1 - self.box.y0)


def frontier_drawing(measure: Measure, names: Mapping[str, str], styles: Mapping[str, Style]) -> Drawing:
    """The picture of one measure."""
    line = ", ".join(names[point.name] for point in frontier(measure.points)) or "no point"
    alt = f"{measure.axis} against KV bytes per token for {len(measure.points)} contestants. kvfold's frontier: {line}."

    def draw(width: float) -> Sheet:
        return _draw(measure, names, styles, width)

    return Drawing(f"frontier-{measure.key}", alt, draw)


def _draw(measure: Measure, names: Mapping[str, str], styles: Mapping[str, Style], width: float) -> Sheet:
    height = 616.0 if width > 800 else 540.0 if width > 450 else 600.0
    height += 12.0 * max(len(measure.points) - 18, 0)  # room for names
    sheet = Sheet(width, height)
    small = SMALL + (width > 800)
    entries = _entries(measure, styles)
    sheet.text(6, 13, measure.title, size=SIZE + (width > 800), bold=True)
    top = sheet.keys(6, 36, width - 6, entries) + 22
    down = _down(measure)
    left = max(sheet.text_width(text, small) for _, text in down.ticks) + 14
    sheet.text(6, top, f"↑ better · {measure.axis}", size=small, color=LIGHT["muted"])
    box = Box(left, top + 16, width - 8, height - 46)
    frame = _Frame(box, _across(measure, box.x1 - box.x0), down, _floor(measure) if measure.log else None)
    sheet.text(box.x0, height - 12, "← better · KV bytes per token", size=small, color=LIGHT["muted"])
    axes = _axes(sheet, frame)
    steps = _staircase(axes, frame, frontier(measure.points))
    _points(axes, frame, measure, styles)
    _write(sheet, frame, measure, names, styles, steps)
    return sheet


def _style(point: Point, styles: Mapping[str, Style]) -> Style:
    style = styles[point.family]
    return style.outlined() if point.drops else style


def _entries(measure: Measure, styles: Mapping[str, Style]) -> list[tuple[str, Style]]:
    """The families that are drawn, and an outline for ours that drop tokens where others of ours do not."""
    found = {}
    for family in styles:
        for point in sorted((p for p in measure.points if p.family == family), key=lambda p: p.drops):
            found[f"{family}, tokens dropped" if point.drops else family] = _style(point, styles)
    return list(found.items())


def _floor(measure: Measure) -> float:
    return zero_lane([point.value for point in measure.points])


def _down(measure: Measure) -> Scale:
    """The upright scale. Its upper end is the better one."""
    if not measure.log:
        return score_ticks(min(p.low for p in measure.points), max(p.high for p in measure.points))
    return kl_ticks([point.value for point in measure.points])


def _across(measure: Measure, width: float) -> Scale:
    sizes = [point.bytes for point in measure.points]
    return byte_ticks(min(sizes), max(sizes), most=max(int(width / 62), 2))


def _axes(sheet: Sheet, frame: _Frame) -> Axes:
    """Axes in pixels, with grid, ticks and their texts."""
    box = frame.box
    axes = sheet.axes(box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0)
    axes.set_xlim(box.x0, box.x1)
    axes.set_ylim(box.y1, box.y0)
    axes.set_xticks([box.x0 + frame.across.part(v) * (box.x1 - box.x0) for v, _ in frame.across.ticks])
    axes.set_xticklabels([text for _, text in frame.across.ticks])
    axes.set_yticks([box.y1 - frame.down.part(v) * (box.y1 - box.y0) for v, _ in frame.down.ticks])
    axes.set_yticklabels([text for _, text in frame.down.ticks])
    axes.tick_params(labelsize=SMALL + (sheet.width > 800))
    axes.grid(True, color=LIGHT["rule"], linewidth=1)
    axes.spines["bottom"].set(visible=True, color=LIGHT["edge"], linewidth=1)
    return axes


def _staircase(axes: Axes, frame: _Frame, front: Sequence[Point]) -> list[Segment]:
    """The Pareto line of kvfold's points, and under a tint all that one of them beats. Returns the line's pieces."""
    if not front:
        return []
    box = frame.box
    x, y = [frame.x(front[0])], [box.y1]
    for index, point in enumerate(front):
        x += [frame.x(point), frame.x(front[index + 1]) if index + 1 < len(front) else box.x1]
        y += [frame.y(point.value)] * 2
    axes.fill([*x, box.x1], [*y, box.y1], color=LIGHT["tint"], linewidth=0, zorder=0)
    axes.plot(x, y, color=LIGHT["blue"], linewidth=1.6, solid_joinstyle="round", zorder=2)
    return [(*one, *two) for one, two in itertools.pairwise(zip(x, y, strict=True))]


def _points(axes: Axes, frame: _Frame, measure: Measure, styles: Mapping[str, Style]) -> None:
    for point in sorted(measure.points, key=lambda point: point.family == OURS):
        x, y, style = frame.x(point), frame.y(point.value), _style(point, styles)
        if point.high > point.low:
            ends = [frame.y(point.low), frame.y(point.high)]
            axes.plot([x, x], ends, color=style.color, linewidth=1, alpha=0.45, zorder=3)
        axes.plot([x], [y], zorder=4, clip_on=False, **style.mark(9 if point.family == OURS else 8))


def _write(
    sheet: Sheet,
    frame: _Frame,
    measure: Measure,
    names: Mapping[str, str],
    styles: Mapping[str, Style],
    steps: Sequence[Segment],
) -> None:
    """The name of every point beside it."""
    size = SIZE + 1 if sheet.width > 800 else SMALL + 0.5 if sheet.width > 450 else SMALL - 0.5
    anchors = [(frame.x(point), frame.y(point.value)) for point in measure.points]
    bold = [point.family == OURS for point in measure.points]
    texts = [names[point.name] for point in measure.points]
    sizes = [(sheet.text_width(t, size, bold=b), size * 1.25) for t, b in zip(texts, bold, strict=True)]
    bounds = Box(frame.box.x0 + 2, frame.box.y0, frame.box.x1 + 6, frame.box.y1 - 3)
    whiskers = [(x, frame.y(p.low), x, frame.y(p.high)) for p, (x, _) in zip(measure.points, anchors, strict=True)]
    faint = [line for line in whiskers if line[1] != line[3]]
    for label, point, text in zip(
        place(anchors, sizes, bounds, radius=_RADIUS, lines=steps, faint=faint), measure.points, texts, strict=True
    ):
        box, color = label.box, styles[point.family].color
        if label.leader:
            x, y, to_x, to_y = label.leader
            sheet.line([x, to_x], [y, to_y], color=color, width=0.7)
        sheet.text(
            (box.x0 + box.x1) / 2,
            (box.y0 + box.y1) / 2,
            text,
            size=size,
            color=color,
            bold=point.family == OURS,
            align="center",
        )
