"""Sheets to draw on: matplotlib figures measured in CSS pixels, without pyplot, and their way out as SVG and PNG."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Literal

from kvfold.errors import KVFoldError
from kvfold.quality.report.palette import LIGHT, Dash, Style, with_variables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

__all__ = ["Drawing", "ReportError", "Sheet", "house_style", "png", "require_matplotlib", "sheet_of", "svg"]

SIZE: Final = 12.0
SMALL: Final = 11.0
_SHARP = 2  # PNG pixels for each CSS pixel
_UNSIGNED: Any = {"Software": None}  # no version inside the file: matplotlib's types do not know that None is allowed


class ReportError(KVFoldError):
    """A report that cannot be drawn."""


def require_matplotlib() -> None:
    """Raise if matplotlib is not installed: to be called before hours are spent on numbers that nobody can draw."""
    if find_spec("matplotlib") is None:
        raise ReportError(
            "the report cannot be drawn", why="matplotlib is not installed", hint="pip install 'kvfold[eval]'"
        )


@contextlib.contextmanager
def house_style(salt: str = "kvfold") -> Iterator[None]:
    """matplotlib's settings as the report needs them, whatever the user's are; put back afterwards."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.family": ["DejaVu Sans"],
        "font.size": SIZE,
        "text.parse_math": False,
        "text.usetex": False,
        "text.color": LIGHT["ink"],
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "path.simplify": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A name in a script that DejaVu lacks is measured as boxes; the browser has the letters.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        yield


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure that can be drawn at a width: ``alt`` says in words what is to be seen."""

    name: str
    alt: str
    draw: Callable[[float], Sheet]


class Sheet:
    """A figure of ``width`` by ``height`` CSS pixels; x to the right, y downwards from the upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure: Figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        self._canvas = FigureCanvasAgg(self.figure)

    def text_width(self, text: str, size: float = SIZE, *, bold: bool = False) -> float:
        """Pixels that ``text`` takes across. DejaVu Sans runs wide: a browser's own font does not take more."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
        renderer: Any = self._canvas.get_renderer()  # type: ignore[no-untyped-call]
        return float(
            max(renderer.get_text_width_height_descent(line, font, ismath=False)[0] for line in text.split("\n"))
        )

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Bare axes in a box."""
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.set_facecolor("none")
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0, labelsize=SMALL, labelcolor=LIGHT["muted"], pad=5)
        axes.set_axisbelow(True)
        return axes

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = SIZE,
        color: str = LIGHT["ink"],
        bold: bool = False,
        align: Literal["left", "center", "right"] = "left",
    ) -> Text:
        """Write ``text`` with its middle at height ``y``."""
        return self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            fontsize=size,
            color=color,
            fontweight="bold" if bold else "normal",
            ha=align,
            va="center_baseline",
        )

    def line(self, x: Sequence[float], y: Sequence[float], *, color: str, width: float = 1.0, dash: Dash = ()) -> None:
        """A line in pixels."""
        self._artist(x, y, color=color, linewidth=width, **({"dashes": dash} if dash else {}))

    def mark(self, x: float, y: float, style: Style, size: float = 7) -> None:
        """A marker with its middle there, in pixels."""
        self._artist([x], [y], linestyle="None", **style.mark(size, edge=0.8))

    def _artist(self, x: Sequence[float], y: Sequence[float], **options: Any) -> None:
        from matplotlib.lines import Line2D

        across, down = [value / self.width for value in x], [1 - value / self.height for value in y]
        self.figure.add_artist(Line2D(across, down, **options))

    def keys(self, left: float, y: float, width: float, entries: Sequence[tuple[str, Style]]) -> float:
        """A row of marker and name for each entry, wrapped to ``width``; returns the height of the last row."""
        x = left
        for name, style in entries:
            room = 16 + self.text_width(name, SMALL)
            if x > left and x + room > left + width:
                x, y = left, y + 18
            self.mark(x + 5, y, style)
            self.text(x + 15, y, name, size=SMALL, color=style.color)
            x += room + 16
        return y


def svg(sheet: Sheet, salt: str, alt: str) -> str:
    """The sheet as inline SVG: text stays text, colours are CSS variables, ids are unique to ``salt``."""
    from html import escape

    out = io.StringIO()
    with house_style(salt):
        bare: Any = {"Date": None, "Creator": None, "Format": None, "Type": None}
        sheet.figure.savefig(out, format="svg", transparent=True, metadata=bare)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    used = set(re.findall(r'"#([^"]+)"|url\(#([^)]+)\)', text))
    keep = {one or other for one, other in used}  # the other ids name matplotlib's parts, in every figure the same
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in keep else "", text)
    text = re.sub(r"(['\"]?)DejaVu Sans\1", "var(--sans)", text.replace("&quot;", "'"))
    text = re.sub(r"\s*\n\s*", "\n", text)
    head = (
        f'<svg viewBox="0 0 {sheet.width:g} {sheet.height:g}" role="img" aria-label="{escape(alt)}" '
        f'style="max-width:{sheet.width * 1.15:.0f}px">'
    )
    return with_variables(head + text[text.index(">") + 1 :])


def png(sheet: Sheet) -> bytes:
    """The sheet as PNG on light paper, at twice its size."""
    from matplotlib.patheffects import withStroke

    for text in sheet.figure.texts if sheet.figure.texts else []:
        text.set_path_effects([withStroke(linewidth=2.5, foreground=LIGHT["paper"])])
    out = io.BytesIO()
    with house_style():
        sheet.figure.savefig(out, format="png", dpi=72 * _SHARP, facecolor=LIGHT["paper"], metadata=_UNSIGNED)
    return out.getvalue()


def sheet_of(images: Sequence[bytes], columns: int) -> bytes:
    """Several PNGs as one, in rows of ``columns``."""
    from PIL import Image

    tiles = [Image.open(io.BytesIO(data)) for data in images]
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    gap, across = 12 * _SHARP, max(tile.width for tile in tiles)
    heights = [max(tile.height for tile in row) + gap for row in rows]
    whole = Image.new("RGB", ((across + gap) * min(columns, len(tiles)) + gap, sum(heights) + gap), LIGHT["paper"])
    for index, row in enumerate(rows):
        for column, tile in enumerate(row):
            whole.paste(tile, (gap + column * (across + gap), gap + sum(heights[:index])))
    out = io.BytesIO()
    whole.save(out, format="png")
    return out.getvalue()
