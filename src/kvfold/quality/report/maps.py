"""Error maps: relative rms error of keys and values by layer and KV head, one picture for each recipe, one scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kvfold.quality.report.canvas import Drawing, Sheet
from kvfold.quality.report.heat import Grid, Shades, grids_sheet, percent, scale_drawing

if TYPE_CHECKING:
    from kvfold.quality.results import ErrorMap, Row

__all__ = ["error_drawings", "error_shades"]


def error_drawings(rows: Sequence[Row], names: Mapping[str, str]) -> list[Drawing]:
    """The scale, then a pair of maps (K, V) for each row that has them."""
    found = {row.contestant: row.errors for row in rows if row.errors is not None}
    found = {name: errors for name, errors in found.items() if _positive(errors.k) or _positive(errors.v)}
    if not found:
        return []
    shades = error_shades(list(found.values()))
    scale = scale_drawing("errors-scale", "error relative to the size of the vectors (rms)", shades)
    return [scale, *(_pair(name, errors, names[name], shades) for name, errors in found.items())]


def error_shades(maps: Sequence[ErrorMap]) -> Shades:
    """One scale for all of ``maps``, of which at least one has an error that is not zero."""
    seen = [value for errors in maps for grid in (errors.k, errors.v) for value in _positive(grid)]
    return Shades(min(seen), max(max(seen), min(seen) * 2), log=True, text=percent, unit=" %")


def _positive(grid: Grid) -> list[float]:
    return [value for line in grid for value in line if math.isfinite(value) and value > 0]


def _pair(name: str, errors: ErrorMap, title: str, shades: Shades) -> Drawing:
    def draw(width: float) -> Sheet:
        return grids_sheet(title, [("keys", errors.k), ("values", errors.v)], shades, width)

    told = []
    for side, grid in zip("KV", (errors.k, errors.v), strict=True):
        if values := _positive(grid):
            told.append(f"{side} {min(values):.1%} to {max(values):.1%}")
    return Drawing(f"errors-{name}", f"Relative error by layer and head, {title}: {', '.join(told)}.", draw)
