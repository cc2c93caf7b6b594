"""Curves: how a figure falls as a budget shrinks. One panel for each method, all panels on the same scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvfold.quality.report.canvas import SMALL, Drawing, Sheet
from kvfold.quality.report.palette import LIGHT, Style
from kvfold.quality.report.scales import Scale, byte_ticks, divergence_ticks, score_ticks, share_ticks, zero_lane

__all__ = ["Curve", "Panel", "curve_drawings"]

_HEIGHT, _TOP, _FOOT = 262.0, 44.0, 40.0

Across = Literal["share", "bytes"]
Up = Literal["score", "kl"]


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of ``family`` through ``points``, by x: (x, y, and y's 95 % interval: its lower and its upper end)."""

    family: str
    points: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """``curves`` under a title. ``level``: where the full cache stands, if it is to be seen."""

    title: str
    curves: tuple[Curve, ...]
    level: float | None = None


@dataclass(frozen=True, slots=True)
class _Scales:
    across: Scale
    up: Scale
    kind: tuple[Across, Up]
    zero: float

    def x(self, value: float) -> float:
        return self.across.part(math.log2(value))

    def y(self, value: float) -> float:
        return self.up.part(math.log10(max(value, self.zero)) if self.kind[1] == "kl" else value)


_AXES = {
    "share": "share of tokens kept, less to the left",
    "bytes": "KV bytes per token, less to the left",
    "score": "↑ better · mean score of the tasks",
    "kl": "↑ better · mean KL, nats",
}


def curve_drawings(
    name: str, panels: Sequence[Panel], styles: Mapping[str, Style], *, across: Across, up: Up
) -> list[Drawing]:
    """A drawing for each panel that has a point; ``styles``: of families, with the dash of their lines."""
    shown = [panel for panel in panels if any(curve.points for curve in panel.curves)]
    points = [point for panel in shown for curve in panel.curves for point in curve.points]
    if not points:
        return []
    values = [value for _, *some in points for value in some] + [
        panel.level for panel in shown if panel.level is not None
    ]
    places = [place for place, *_ in points]
    scales = _Scales(
        byte_ticks(min(places), max(places), most=5) if across == "bytes" else share_ticks(min(places)),
        divergence_ticks(values) if up == "kl" else score_ticks(min(0.0, *values), max(1.0, *values)),
        (across, up),
        zero_lane(values),
    )
    return [_drawing(f"{name}-{panel.title}", panel, styles, scales) for panel in shown]


def _drawing(name: str, panel: Panel, styles: Mapping[str, Style], scales: _Scales) -> Drawing:
    told = [
        f"{curve.family} {', '.join(f'{y:.3g} at {x:.4g}' for x, y, *_ in curve.points)}"
        for curve in panel.curves
        if curve.points
    ]
    across, up = scales.kind
    alt = f"{panel.title}: {'score' if up == 'score' else 'KL'} by {across}. {'; '.join(told)}."
    return Drawing(name, alt, lambda width: _sheet(panel, styles, scales, width))


def _sheet(panel: Panel, styles: Mapping[str, Style], scales: _Scales, width: float) -> Sheet:
    sheet = Sheet(width, _HEIGHT)
    across, up = scales.kind
    left = max(sheet.text_width(text, SMALL) for _, text in scales.up.ticks) + 14
    right, bottom = width - 14, _HEIGHT - _FOOT
    sheet.text(6, 13, panel.title, bold=True)
    sheet.text(6, 32, _AXES[up], size=SMALL, color=LIGHT["muted"])
    sheet.text(left, _HEIGHT - 10, _AXES[across], size=SMALL, color=LIGHT["muted"])
    axes = sheet.axes(left, _TOP, right - left, bottom - _TOP)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_yticks([scales.up.part(value) for value, _ in scales.up.ticks], labels=[t for _, t in scales.up.ticks])
    ticks = scales.across.ticks
    axes.set_xticks([scales.across.part(value) for value, _ in ticks], labels=[text for _, text in ticks])
    axes.grid(True, color=LIGHT["rule"], linewidth=1)
    axes.spines["bottom"].set(visible=True, color=LIGHT["edge"], linewidth=1)
    if panel.level is not None:
        axes.axhline(scales.y(panel.level), color=LIGHT["edge"], linewidth=1, dashes=(4, 2), zorder=2)
    for curve in panel.curves:
        style = styles[curve.family]
        x, y = [scales.x(place) for place, *_ in curve.points], [scales.y(value) for _, value, *_ in curve.points]
        dashes: dict[str, Any] = {"dashes": style.dash} if style.dash else {}
        axes.plot(x, y, color=style.color, linewidth=1.8, zorder=4, clip_on=False, **dashes, **style.mark(6, 0.8))
        for place, (_, _, low, high) in zip(x, curve.points, strict=True):
            if high > low:
                ends = [scales.y(low), scales.y(high)]
                axes.plot([place] * 2, ends, color=style.color, linewidth=1, alpha=0.45, zorder=3)
    _key(sheet, panel, styles, width)
    return sheet


def _key(sheet: Sheet, panel: Panel, styles: Mapping[str, Style], width: float) -> None:
    """The families at the upper right, with a piece of their lines."""
    x = width - 6.0
    for curve in reversed([curve for curve in panel.curves if curve.points]):
        style, name = styles[curve.family], curve.family
        x -= sheet.text_width(name, SMALL)
        sheet.text(x, 13, name, size=SMALL, color=style.color)
        x -= 32
        sheet.line([x, x + 26], [13, 13], color=style.color, width=1.8, dash=style.dash)
        sheet.mark(x + 13, 13, style, 6)
        x -= 14
