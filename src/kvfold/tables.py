"""Tables on a terminal of any width: names stay whole, empty columns are left out, wide tables are stacked."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

__all__ = ["Figures", "in_lines"]

_UNBOUNDED = 10_000


class Figures:
    """A table whose first ``names`` columns say what a row is about, and whose others hold figures.

    Where not all columns fit, the table is printed in parts, one below the other, each with the names. A name is broken
    only if it takes more than half of the width, and then between its parts.
    """

    def __init__(self, title: str | None, headings: Sequence[str], *, names: int = 1) -> None:
        self._title = title
        self._headings = list(headings)
        self._names = names
        self._rows: list[tuple[tuple[str, ...], str | None]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, *cells: str, style: str | None = None) -> None:
        """A row; names are plain text, figures may have rich's markup."""
        self._rows.append((cells, style))

    def print(self, console: Console) -> None:
        """Prints the columns that hold something; nothing without rows."""
        if not self._rows:
            return
        filled = [i for i in range(self._names, len(self._headings)) if any(cells[i] for cells, _ in self._rows)]
        title, left = self._title, filled
        while True:
            some = self._fitting(console, left)
            table = self._table(console.width, some, title)
            console.print(_Whole(table), crop=False)
            title, left = None, left[len(some) :]
            if not left:
                return

    def _fitting(self, console: Console, columns: Sequence[int]) -> list[int]:
        """As many of ``columns`` as fit beside the names, and at least one."""
        count = len(columns)
        while count > 1 and _width(console, self._table(console.width, columns[:count], None)) > console.width:
            count -= 1
        return list(columns[:count])

    def _table(self, width: int, columns: Sequence[int], title: str | None) -> Table:
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for index in range(self._names):
            table.add_column(self._headings[index], no_wrap=True, overflow="crop")
        for index in columns:
            table.add_column(self._headings[index], justify="right", no_wrap=True, overflow="crop")
        for cells, style in self._rows:
            names = (escape("\n".join(in_lines(name, width // 2))) for name in cells[: self._names])
            table.add_row(*names, *(cells[index] for index in columns), style=style)
        return table


class _Whole:
    """A table at its own width, even where the terminal is narrower: nothing is cut off."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width, _width(console, self._table))
        yield from console.render(self._table, options.update(width=width, max_width=width))


def in_lines(name: str, width: int) -> list[str]:
    """``name`` in lines of at most ``width``, broken before ``+``, and before commas where that is not enough; a part
    that is longer stays whole.
    """
    lines = [""]
    for clause in re.findall(r"\+?[^+]+", name):
        for part in [clause] if len(clause) + 2 <= width else re.findall(r",?[^,]+", clause):
            if lines[-1] and len(lines[-1]) + len(part) > width:
                lines.append("  ")
            lines[-1] += part
    return lines


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=_UNBOUNDED), table).maximum
