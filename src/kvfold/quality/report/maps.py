"""Error maps: relative rms error of keys and values by layer and KV head, one picture for each recipe, one scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvfold.quality.report.canvas import SMALL, Drawing, Sheet
from kvfold.quality.report.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm

    from kvfold.quality.results import Row

__all__ = ["error_drawings"]

_COLORS = "viridis"
_TALLEST = 420.0


def error_drawings(rows: Sequence[Row], names: Mapping[str, str]) -> list[Drawing]:
    """The scale, then a pair of maps (K, V) for each row that has them."""
    found = {row.contestant: (row.errors.k, row.errors.v) for row in rows if row.errors is not None}
    found = {name: pair for name, pair in found.items() if any(map(_positive, pair))}
    if not found:
        return []
    seen = [value for pair in found.values() for grid in pair for value in _positive(grid)]
    low, high = min(seen), max(max(seen), min(seen) * 2)
    return [_legend(low, high), *(_pair(name, pair, names, low, high) for name, pair in found.items())]


def _positive(grid: Sequence[Sequence[float]]) -> list[float]:
    return [value for line in grid for value in line if math.isfinite(value) and value > 0]


def _legend(low: float, high: float) -> Drawing:
    def draw(width: float) -> Sheet:
        import numpy as np

        sheet = Sheet(width, 52)
        sheet.text(6, 12, "error relative to the size of the vectors (rms)", size=SMALL, color=LIGHT["muted"])
        axes = sheet.axes(6, 24, width - 12, 10)
        axes.set_xticks([])
        axes.set_yticks([])
        edges = np.geomspace(low, high, 65)
        axes.set_xlim(0, 1)
        for index, value in enumerate(np.sqrt(edges[1:] * edges[:-1])):
            axes.axvspan(index / 64, (index + 1.1) / 64, color=_color(float(value), low, high), linewidth=0)
        marks = [low, math.sqrt(low * high), high]
        for part, mark, align in zip((6.0, width / 2, width - 6), marks, ("left", "center", "right"), strict=True):
            sheet.text(part, 44, f"{_percent(mark)} %", size=SMALL, align=align)  # type: ignore[arg-type]
        return sheet

    return Drawing("errors-scale", f"Colours of the maps: {low:.2%} (dark) to {high:.2%} (bright).", draw)


def _pair(
    name: str,
    pair: tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]],
    names: Mapping[str, str],
    low: float,
    high: float,
) -> Drawing:
    def draw(width: float) -> Sheet:
        return _maps(names[name], pair, low, high, width)

    told = []
    for side, grid in zip("KV", pair, strict=True):
        if values := _positive(grid):
            told.append(f"{side} {min(values):.1%} to {max(values):.1%}")
    return Drawing(f"errors-{name}", f"Relative error by layer and head, {names[name]}: {', '.join(told)}.", draw)


def _maps(
    title: str, pair: tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]], low: float, high: float, width: float
) -> Sheet:
    layers = max(map(len, pair))
    heads = max((len(line) for grid in pair for line in grid), default=1)
    pitch = min(24.0, _TALLEST / layers)
    sheet = Sheet(width, 62 + pitch * layers + 26)
    sheet.text(6, 13, title, bold=True)
    left = sheet.text_width(f"{layers - 1}", SMALL) + 14
    sheet.text(6, 38, "layer", size=SMALL, color=LIGHT["muted"])
    left = max(left, sheet.text_width("layer", SMALL) + 14)
    each = (width - left - 6 - 14) / 2
    for index, (side, grid) in enumerate(zip(("keys", "values"), pair, strict=True)):
        start = left + index * (each + 14)
        sheet.text(start, 38, side, size=SMALL, color=LIGHT["muted"])
        axes = sheet.axes(start, 52, each, pitch * layers)
        axes.set_xlim(0, heads)
        axes.set_ylim(layers, 0)
        every = math.ceil(14 / pitch)
        axes.set_yticks([n + 0.5 for n in range(0, layers, every)], labels=[str(n) for n in range(0, layers, every)])
        axes.tick_params(labelleft=index == 0)
        step = math.ceil(heads * 22 / each)
        axes.set_xticks([n + 0.5 for n in range(0, heads, step)], labels=[f"{n}" for n in range(0, heads, step)])
        _cells(axes, grid, (layers, heads), (low, high), numbers=each / heads >= 30 and pitch >= 15)
    sheet.text(left, sheet.height - 8, "KV head", size=SMALL, color=LIGHT["muted"])
    return sheet


def _cells(
    axes: Axes,
    grid: Sequence[Sequence[float]],
    shape: tuple[int, int],
    limits: tuple[float, float],
    *,
    numbers: bool,
) -> None:
    """The cells; what is missing or not finite stays empty."""
    import numpy as np
    from matplotlib.colors import LogNorm

    filled = np.full(shape, np.nan)
    for layer, line in enumerate(grid):
        filled[layer, : len(line)] = line
    shown = np.ma.masked_invalid(
        np.where(filled > 0, np.maximum(filled, limits[0]), np.where(filled == 0, limits[0], np.nan))
    )
    many = shown.size > 600
    axes.pcolormesh(
        shown,
        cmap=_COLORS,
        norm=LogNorm(*limits),
        edgecolors="none" if many else LIGHT["paper"],
        linewidth=0 if many else 1.5,
        rasterized=many,
        antialiased=not many,
    )
    if not numbers:
        return
    for (layer, head), value in np.ndenumerate(filled):
        if math.isfinite(value):
            dark = _luminance(_color(max(value, limits[0]), *limits)) < 0.18
            axes.text(
                head + 0.5,
                layer + 0.5,
                _percent(value),
                color="#ffffff" if dark else "#000000",
                fontsize=SMALL - 0.5,
                ha="center",
                va="center_baseline",
            )


def _color(value: float, low: float, high: float) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    red, green, blue, alpha = colormaps[_COLORS](_norm(low, high)(value))
    return float(red), float(green), float(blue), float(alpha)


def _norm(low: float, high: float) -> LogNorm:
    from matplotlib.colors import LogNorm

    return LogNorm(low, high, clip=True)


def _luminance(color: tuple[float, float, float, float]) -> float:
    """As the contrast rules of the web reckon it: at 0.18 black and white are equally legible."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _percent(value: float) -> str:
    percent = value * 100
    return f"{percent:.0f}" if percent >= 10 else f"{percent:.1f}" if percent >= 0.1 else f"{percent:.1g}"
