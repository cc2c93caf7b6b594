"""Heat maps: a number for each layer and head as colour, and as figures where there is room."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kvfold.quality.report.canvas import SMALL, Drawing, Sheet
from kvfold.quality.report.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

__all__ = ["Grid", "Shades", "color_bar", "grids_sheet", "percent", "scale_drawing"]

Grid = Sequence[Sequence[float]]
"""``[layer][head]``; what is not finite stays empty."""

_COLORS: Final = "viridis"
_TALLEST: Final = 420.0
_MANY: Final = 600
"""So many cells are one picture instead of shapes."""

_PLACES: Final[tuple[tuple[float, Any], ...]] = ((0.0, "left"), (0.5, "center"), (1.0, "right"))


@dataclass(frozen=True, slots=True)
class Shades:
    """Colours from ``low`` (dark) to ``high`` (bright), by powers if ``log``; ``text`` writes a value in a cell, and
    with ``unit`` behind it on the scale.
    """

    low: float
    high: float
    log: bool
    text: Callable[[float], str]
    unit: str = ""

    @property
    def middle(self) -> float:
        """The value half way along the scale."""
        return math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2

    def norm(self) -> Normalize:
        """As matplotlib wants it."""
        from matplotlib.colors import LogNorm, Normalize

        return (LogNorm if self.log else Normalize)(self.low, self.high, clip=True)

    def color(self, value: float) -> tuple[float, float, float, float]:
        """Red, green, blue and alpha of a value."""
        from matplotlib import colormaps

        red, green, blue, alpha = colormaps[_COLORS](self.norm()(value))
        return float(red), float(green), float(blue), float(alpha)


def percent(value: float) -> str:
    """A share as a figure of percent, without the sign."""
    shown = value * 100
    return f"{shown:.0f}" if shown >= 10 or shown == 0 else f"{shown:.1f}" if shown >= 0.1 else f"{shown:.1g}"


def scale_drawing(name: str, title: str, shades: Shades) -> Drawing:
    """A scale by itself, for several maps."""

    def draw(width: float) -> Sheet:
        sheet = Sheet(width, 52)
        sheet.text(6, 12, title, size=SMALL, color=LIGHT["muted"])
        color_bar(sheet, 6, 24, width - 12, shades)
        return sheet

    low, high = (f"{shades.text(value)}{shades.unit}" for value in (shades.low, shades.high))
    return Drawing(name, f"Colours of the maps: {low} (dark) to {high} (bright).", draw)


def color_bar(sheet: Sheet, left: float, top: float, width: float, shades: Shades) -> None:
    """A bar of all colours, 10 pixels high, and its values below."""
    axes = sheet.axes(left, top, width, 10)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlim(0, 1)
    span = math.log(shades.high / shades.low) if shades.log else shades.high - shades.low
    for index in range(64):
        part = (index + 0.5) / 64 * span
        value = shades.low * math.exp(part) if shades.log else shades.low + part
        axes.axvspan(index / 64, (index + 1.1) / 64, color=shades.color(value), linewidth=0)
    for (part, align), mark in zip(_PLACES, (shades.low, shades.middle, shades.high), strict=True):
        sheet.text(left + part * width, top + 20, f"{shades.text(mark)}{shades.unit}", size=SMALL, align=align)


def grids_sheet(
    title: str,
    grids: Sequence[tuple[str, Grid]],
    shades: Shades,
    width: float,
    *,
    across: str = "KV head",
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    bar: bool = False,
) -> Sheet:
    """Maps with their names, side by side, layers downwards. ``rows``, ``columns``: names other than numbers from 0 on.

    ``bar``: with a scale of its own below.
    """
    layers = max(len(grid) for _, grid in grids)
    heads = max((len(line) for _, grid in grids for line in grid), default=1)
    pitch = min(24.0, _TALLEST / layers)
    top = 52.0
    sheet = Sheet(width, top + 10 + pitch * layers + 26 + (44 if bar else 0))
    sheet.text(6, 13, title, bold=True)
    names = list(rows or map(str, range(layers)))
    left = max(sheet.text_width(text, SMALL) for text in ("layer", *names)) + 14
    sheet.text(6, top - 14, "layer", size=SMALL, color=LIGHT["muted"])
    each = (width - left - 6 - 14 * (len(grids) - 1)) / len(grids)
    for index, (name, grid) in enumerate(grids):
        start = left + index * (each + 14)
        sheet.text(start, top - 14, name, size=SMALL, color=LIGHT["muted"])
        axes = sheet.axes(start, top, each, pitch * layers)
        axes.set_xlim(0, heads)
        axes.set_ylim(layers, 0)
        every = math.ceil(14 / pitch)
        axes.set_yticks([n + 0.5 for n in range(0, layers, every)], labels=names[::every])
        axes.tick_params(labelleft=index == 0)
        below = list(columns or map(str, range(heads)))
        room = max([22.0, *(sheet.text_width(text, SMALL) + 3 for text in columns or ())])
        step = math.ceil(heads * room / each)
        axes.set_xticks([n + 0.5 for n in range(0, heads, step)], labels=below[::step])
        _cells(axes, grid, (layers, heads), shades, numbers=each / heads >= 30 and pitch >= 15)
    sheet.text(left, top + pitch * layers + 28, across, size=SMALL, color=LIGHT["muted"])
    if bar:
        color_bar(sheet, left, sheet.height - 34, width - left - 6, shades)
    return sheet


def _cells(axes: Axes, grid: Grid, shape: tuple[int, int], shades: Shades, *, numbers: bool) -> None:
    """The cells. On a scale of powers nothing is below its low end, and what is negative stays empty."""
    import numpy as np

    filled = np.full(shape, np.nan)
    for layer, line in enumerate(grid):
        filled[layer, : len(line)] = line
    clipped = np.maximum(filled, shades.low)
    shown = np.ma.masked_invalid(np.where(filled < 0, np.nan, clipped) if shades.log else clipped)
    many = shown.size > _MANY
    axes.pcolormesh(
        shown,
        cmap=_COLORS,
        norm=shades.norm(),
        edgecolors="none" if many else LIGHT["paper"],
        linewidth=0 if many else 1.5,
        rasterized=many,
        antialiased=not many,
    )
    if not numbers:
        return
    for (layer, head), value in np.ndenumerate(filled):
        if math.isfinite(value):
            dark = _luminance(shades.color(max(value, shades.low))) < 0.18
            axes.text(
                head + 0.5,
                layer + 0.5,
                shades.text(value),
                color="#ffffff" if dark else "#000000",
                fontsize=SMALL - 0.5,
                ha="center",
                va="center_baseline",
            )


def _luminance(color: Iterable[float]) -> float:
    """As the contrast rules of the web reckon it: at 0.18 black and white are equally legible."""
    red, green, blue, *_ = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
