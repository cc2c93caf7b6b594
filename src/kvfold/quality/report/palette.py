"""Colours, marker shapes and dashes of the report.

Every colour is a *tone*: a name with one value for a light page and one for a dark page. Figures are drawn in the light
values; in the page each of them becomes a CSS variable, so one SVG serves both. The hues are Okabe and Ito's, moved in
lightness until text in them is legible on its ground. Nothing is told by colour alone: families also differ in shape,
lines in dashes, and both are labelled where they stand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

__all__ = ["DARK", "LIGHT", "LINES", "Dash", "Style", "family_styles", "style_sheet", "with_variables"]

LIGHT: Final = {
    "ink": "#1b2026",
    "muted": "#59636e",
    "edge": "#a9b1b9",
    "rule": "#e4e7ea",
    "paper": "#fdfdfd",
    "panel": "#f3f5f7",
    "tint": "#e8f1f8",
    "ghost": "#d3d8dd",
    "blue": "#0064a6",
    "vermilion": "#b34700",
    "green": "#007a5a",
    "purple": "#9c3f73",
    "ochre": "#7d6200",
    "slate": "#4b5a9c",
    "brown": "#80512e",
    "teal": "#1f7186",
}
"""Tone -> value on a light page. All values differ, because they are what :func:`with_variables` looks for."""

DARK: Final = {
    "ink": "#e8ebee",
    "muted": "#a4aeb8",
    "edge": "#5c6670",
    "rule": "#2a3138",
    "paper": "#13171b",
    "panel": "#1b2026",
    "tint": "#162838",
    "ghost": "#3a434c",
    "blue": "#63b8f0",
    "vermilion": "#f48e52",
    "green": "#37c79c",
    "purple": "#e59ac6",
    "ochre": "#dcb940",
    "slate": "#a3b1f2",
    "brown": "#d0a27e",
    "teal": "#6cc6db",
}
"""Tone -> value on a dark page."""

Dash = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Style:
    """How a family, or a line, is drawn: a light-page colour, a matplotlib marker, a dash pattern (empty: solid).
    ``hollow``: the marker is an outline.
    """

    color: str
    marker: str
    dash: Dash = ()
    hollow: bool = False

    def mark(self, size: float, edge: float = 1.2) -> dict[str, Any]:
        """The marker, for matplotlib: filled with a paper edge, or its outline on paper."""
        fill, rim = (LIGHT["paper"], self.color) if self.hollow else (self.color, LIGHT["paper"])
        width = 1.5 * edge if self.hollow else edge
        return {
            "marker": self.marker,
            "markersize": size,
            "markerfacecolor": fill,
            "markeredgecolor": rim,
            "markeredgewidth": width,
        }

    def outlined(self) -> Style:
        """The same as an outline: a family's contestants that drop tokens, beside those that keep them all."""
        return replace(self, hollow=True)


_KNOWN: Final = {
    "kvfold": Style(LIGHT["blue"], "o"),
    "transformers": Style(LIGHT["vermilion"], "s"),
    "kvpress": Style(LIGHT["green"], "D"),
    "truncation": Style(LIGHT["purple"], "^"),
}
_SPARE: Final = (
    Style(LIGHT["ochre"], "v"),
    Style(LIGHT["slate"], "P"),
    Style(LIGHT["brown"], "X"),
    Style(LIGHT["teal"], "p"),
)

LINES: Final = (
    Style(LIGHT["blue"], "o"),
    Style(LIGHT["vermilion"], "s", (6, 2)),
    Style(LIGHT["green"], "D", (2, 1.6)),
    Style(LIGHT["purple"], "^", (6, 2, 1.5, 2)),
    Style(LIGHT["ochre"], "v", (10, 2)),
    Style(LIGHT["slate"], "P", (3, 3)),
    Style(LIGHT["brown"], "X", (8, 2, 1.5, 2, 1.5, 2)),
    Style(LIGHT["teal"], "p", (1.2, 1.6)),
)
"""The lines of one panel, in turn."""


def family_styles(families: Iterable[str]) -> dict[str, Style]:
    """A style for each family; kvfold comes first and known families keep theirs, whoever else is there."""
    names = sorted(set(families), key=lambda name: (list(_KNOWN).index(name) if name in _KNOWN else len(_KNOWN), name))
    others = [name for name in names if name not in _KNOWN]
    return {name: _KNOWN[name] if name in _KNOWN else _SPARE[others.index(name) % len(_SPARE)] for name in names}


def style_sheet() -> str:
    """CSS that defines every tone, for light and for dark pages."""
    light = "".join(f"--{tone}:{value};" for tone, value in LIGHT.items())
    dark = "".join(f"--{tone}:{value};" for tone, value in DARK.items())
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def with_variables(svg: str) -> str:
    """``svg`` with each tone's light value replaced by its CSS variable."""
    for tone, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{tone})")
    return svg
