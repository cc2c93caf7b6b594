"""The table of a sweep: in a terminal, and as HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from benchmarks.retention.compare import Comparison, Figures
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from benchmarks.retention.session import Sweep

__all__ = ["HEADINGS", "cells", "html_table", "print_table", "tally", "verdict"]

HEADINGS: Final = (
    *("method", "kept", "ours", "kvpress", "difference", "ours is"),
    *("KL", "kvpress", "B/token", "kvpress"),
)


_WIDTH: Final = 108


def verdict(comparison: Comparison) -> str:
    """``level`` if the difference may be chance, else what ours is; empty if there is nothing to compare."""
    if comparison.level is None or comparison.difference is None:
        return ""
    if comparison.level:
        return "level"
    return "better" if comparison.difference > 0 else "worse"


def cells(comparison: Comparison) -> tuple[str, ...]:
    """A line of the table, under `HEADINGS`."""
    difference = "–"
    if comparison.difference is not None:
        error = "?" if comparison.error is None else f"{comparison.error:.3f}"
        difference = f"{comparison.difference:+.3f} ± {error}"
    sides = comparison.ours, comparison.theirs
    return (
        comparison.method,
        f"{comparison.keep:.4g}",
        *(_text(side, lambda each: "–" if each.score is None else f"{each.score:.3f}") for side in sides),
        difference,
        verdict(comparison),
        *(_text(side, lambda each: f"{each.kl:.4f}") for side in sides),
        *(_text(side, lambda each: f"{each.kv_bytes:,.0f}") for side in sides),
    )


def tally(comparisons: Sequence[Comparison]) -> str:
    """How many comparisons ended how."""
    found = [word for comparison in comparisons if (word := verdict(comparison))]
    if not found:
        return "Nothing to compare: one side alone was measured."
    level, better, worse = (found.count(word) for word in ("level", "better", "worse"))
    return (
        f"Of {len(found)} comparisons {level} are within chance, in {better} kvfold is better, in {worse} kvpress is."
    )


def print_table(sweep: Sweep) -> None:
    """On stdout, with what its columns mean."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index in (0, 5) else "right", no_wrap=True)
    for comparison in sweep.comparisons:
        table.add_row(*cells(comparison))
    console = Console()
    console = Console(width=max(console.width, _WIDTH))
    console.print(table)
    console.print(tally(sweep.comparisons))
    console.print(
        "Scores: mean over tasks, 0 to 1. difference: ours less kvpress's, ± its standard error (the same\n"
        "samples in pairs); level: within 1.96 of it. KL in nats: ours against raw, kvpress's against the full\n"
        "cache. B/token: allocated; kvpress's head-wise methods mask and free nothing.",
        style="dim",
    )


def html_table(comparisons: Sequence[Comparison]) -> str:
    """The same for a page."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    body = []
    method = ""
    for comparison in comparisons:
        first, *rest = cells(comparison)
        start = ' class="first"' if first != method else ""
        method = first
        body.append(f"<tr{start}><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _text(side: Figures | None, text: Callable[[Figures], str]) -> str:
    return "–" if side is None else text(side)
