"""Panels of lines: mass held by few tokens, and what is left with few full heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvfold.quality.profile.results import SHARES, Check, LayerProfile
from kvfold.quality.report.canvas import SMALL, Drawing, Sheet
from kvfold.quality.report.palette import LIGHT, LINES, Style
from kvfold.quality.report.scales import Scale, divergence_ticks, zero_lane

__all__ = ["check_drawings", "held_drawings"]

_HEIGHT: Final = 236.0
_FEW: Final = 6
"""So many lines can be told apart."""

_SHARE_MARKS: Final = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class _Line:
    """A line in parts of the panel: ``x`` from 0 (left) to 1, ``y`` from 0 (bottom) to 1. Without a name it is grey."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Style | None = None


@dataclass(frozen=True, slots=True)
class _Panel:
    """Lines, with what their axes say; ``across``, ``down``: (part, text) of the ticks."""

    title: str
    above: str
    below: str
    lines: Sequence[_Line]
    across: Sequence[tuple[float, str]]
    down: Sequence[tuple[float, str]]
    markers: bool = False


def held_drawings(layers: Sequence[LayerProfile]) -> list[Drawing]:
    """Mass held by the top tokens of the past: one set for all queries, and another for each."""
    low = min(layer.newer for layer in layers)
    scale = _shares_from(low)
    drawings = []
    for key, title in (("held_once", "One set of tokens for all queries"), ("held_anew", "Each query chooses its own")):
        curves = {str(layer.layer): list(getattr(layer, key)) for layer in layers}
        panel = _Panel(
            title,
            "mass held",
            "share of the past that is kept",
            _told(curves, scale),
            [(math.sqrt(mark), f"{mark:.0%}") for mark in _SHARE_MARKS],
            [(scale.part(value), text) for value, text in scale.ticks],
        )
        at = SHARES.index(0.1)
        mean = sum(curve[at] for curve in curves.values()) / len(curves)
        drawings.append(_drawing(key.replace("_", "-"), f"{title}: a tenth of the past holds {mean:.0%}.", panel))
    return drawings


def _shares_from(low: float) -> Scale:
    """Per cents from a little below ``low`` to 100."""
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if (1 - low) / step <= 6)
    start = max(0.0, math.floor(low / step + 1e-9) * step)
    count = round((1 - start) / step)
    return Scale(start, 1.0, [(start + n * step, f"{start + n * step:.0%}") for n in range(count + 1)])


def _told(curves: dict[str, list[float]], scale: Scale) -> list[_Line]:
    """A line for each layer where there are few; else all of them in grey, and on top the mean and the two extremes."""
    x = [math.sqrt(share) for share in SHARES]

    def line(name: str, values: Sequence[float], number: int | None) -> _Line:
        return _Line(name, x, [scale.part(value) for value in values], None if number is None else LINES[number])

    if len(curves) <= _FEW:
        return [line(f"layer {name}", curve, number) for number, (name, curve) in enumerate(curves.items())]
    mean = [sum(values) / len(curves) for values in zip(*curves.values(), strict=True)]
    first, *_, last = sorted(curves, key=lambda name: sum(curves[name]))
    lines = [line("", curve, None) for curve in curves.values()]
    lines += [line("mean of all layers", mean, 0), line(f"layer {first}, least", curves[first], 1)]
    return [*lines, line(f"layer {last}, most", curves[last], 2)]


def check_drawings(checks: Sequence[Check]) -> list[Drawing]:
    """Answers that are still right, and divergence on the text, against the heads that stay full."""
    heads = checks[-1].full
    x = [check.full / heads for check in checks]
    marks = range(heads + 1) if heads <= 12 else sorted({0, heads // 4, heads // 2, 3 * heads // 4, heads})
    across = [(mark / heads, str(mark)) for mark in marks]
    below = f"KV heads that keep every token, of {heads}"
    answers = _Panel(
        "Answers",
        "↑ better · answer tokens right",
        below,
        [_Line("", x, [check.answers for check in checks], LINES[0])],
        across,
        [(part, f"{part:.0%}") for part in (0.0, 0.25, 0.5, 0.75, 1.0)],
        markers=True,
    )
    values = [check.kl for check in checks]
    scale, zero = divergence_ticks(values), zero_lane(values)
    heights = [scale.part(math.log10(max(value, zero))) for value in values]
    text = _Panel(
        "Text",
        "↑ better · mean KL against the whole model, nats",
        below,
        [_Line("", x, heights, LINES[1])],
        across,
        [(scale.part(value), text) for value, text in scale.ticks],
        markers=True,
    )
    told = ", ".join(f"{check.full}: {check.answers:.0%}" for check in checks)
    costs = ", ".join(f"{check.full}: {check.kl:.2g}" for check in checks)
    return [
        _drawing("checks-answers", f"Answer tokens right, by full heads. {told}.", answers),
        _drawing("checks-text", f"Mean KL on the text in nats, by full heads. {costs}.", text),
    ]


def _drawing(name: str, alt: str, panel: _Panel) -> Drawing:
    def draw(width: float) -> Sheet:
        return _draw(panel, width)

    return Drawing(name, alt, draw)


def _draw(panel: _Panel, width: float) -> Sheet:
    named = [(line.name, line.style) for line in panel.lines if line.name and line.style is not None]
    probe = Sheet(width, 100)
    top = (probe.keys(6, 36, width - 6, named) + 20) if named else 34.0
    sheet = Sheet(width, top + 16 + _HEIGHT + 46)
    sheet.text(6, 13, panel.title, bold=True)
    if named:
        sheet.keys(6, 36, width - 6, named)
    sheet.text(6, top, panel.above, size=SMALL, color=LIGHT["muted"])
    left = max(sheet.text_width(text, SMALL) for _, text in panel.down) + 14
    axes = sheet.axes(left, top + 16, width - left - 20, _HEIGHT)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xticks([part for part, _ in panel.across], labels=[text for _, text in panel.across])
    axes.set_yticks([part for part, _ in panel.down], labels=[text for _, text in panel.down])
    axes.grid(True, axis="y", color=LIGHT["rule"], linewidth=1)
    axes.spines["bottom"].set(visible=True, color=LIGHT["edge"], linewidth=1)
    for number, line in enumerate(panel.lines):
        style = line.style
        axes.plot(
            line.x,
            line.y,
            color=LIGHT["ghost"] if style is None else style.color,
            linewidth=1.0 if style is None else 1.8,
            dashes=(1, 0) if style is None or not style.dash else style.dash,
            marker="None" if style is None else style.marker,
            markersize=6 if panel.markers else 5,
            markevery=1 if panel.markers else (number % 4, 4),
            zorder=2 if style is None else 4,
            clip_on=False,
        )
    sheet.text(left, sheet.height - 10, panel.below, size=SMALL, color=LIGHT["muted"])
    return sheet
