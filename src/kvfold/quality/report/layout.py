"""What every page is made of: sections of figures as HTML, the frame around them, and writing it whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Final

from kvfold.quality.report.canvas import Drawing, ReportError, Sheet, svg
from kvfold.quality.report.palette import style_sheet

__all__ = ["Section", "html_page", "render", "write_whole"]

_WHOLE, _HALF, _THIRD, _PHONE = 1120.0, 556.0, 360.0, 368.0
_COLUMNS: Final = {1: ("one", _WHOLE), 2: ("two", _HALF), 3: ("three", _THIRD)}


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, what to look for, and figures in one, two or three columns; ``below`` is HTML after them.

    ``kind``: classes of the style sheet: ``maps`` for heat maps, ``scaled`` if the first figure is the scale of all.
    """

    title: str
    text: str
    name: str
    columns: int
    drawings: Sequence[Drawing]
    below: str = ""
    kind: str = ""


def render(section: Section) -> tuple[str, dict[str, Sheet]]:
    """The section as HTML, and its figures at full width by name; nothing if it has none."""
    if not section.drawings:
        return "", {}
    layout, width = _COLUMNS[section.columns]
    figures, sheets = [], {}
    for index, drawing in enumerate(section.drawings):
        salt = f"{section.name}-{section.columns}-{index}"  # ids of one figure must not be those of another
        wide = drawing.draw(width)
        figure = svg(wide, salt, drawing.alt)
        if section.columns < 3:  # a third of a page is as wide as a phone
            narrow = svg(drawing.draw(_PHONE), f"{salt}-narrow", drawing.alt)
            figure = f'<div class="wide">{figure}</div><div class="narrow">{narrow}</div>'
        figures.append(f"<figure>{figure}</figure>")
        sheets[drawing.name] = wide
    kind = f"grid {layout} {section.kind}".strip()
    heading = f'<h2>{escape(section.title)}</h2><p class="lead">{escape(section.text)}</p>'
    return f'<section>{heading}<div class="{kind}">{"".join(figures)}</div>{section.below}</section>', sheets


def html_page(title: str, body: str) -> bytes:
    """A whole page that needs nothing else."""
    css = (files("kvfold.quality.report") / "style.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style_sheet()}\n{css}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
    return page.encode()


def write_whole(made: dict[Path, bytes]) -> None:
    """Writes files, in order, each whole or not at all; ReportError if one cannot be written."""
    for path, data in made.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, data)
        except OSError as error:
            why = error.strerror or str(error)
            what = f"the report cannot be written to {path.parent}"
            raise ReportError(what, why=why, hint="give another folder") from error


def _replace(path: Path, data: bytes) -> None:
    """Write to a temporary name, then move: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
