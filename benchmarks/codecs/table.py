"""The result as a table on a terminal, as Markdown between two marks of a page, and as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.codecs.bands import AVERAGES, SHIPPED, VARIATIONS
from rich.console import Console
from rich.table import Table

from kvfold.errors import RequestError

__all__ = ["MARKS", "Result", "Row", "as_markdown", "check_page", "show", "write_page"]

MARKS = ("<!-- table -->", "<!-- /table -->")
_HEADINGS = ("bits", "KL text", "KL recall", "top-1")


@dataclass(frozen=True, slots=True)
class Row:
    """One codec. KL divergences in nats per token; ``seconds``: what scoring it took."""

    family: str
    codec: str
    bits_per_value: float
    text_kl: float
    recall_kl: float
    top1_agreement: float
    note: str
    seconds: float

    def cells(self) -> tuple[str, ...]:
        """The figures, for people."""
        return f"{self.bits_per_value:.3f}", _nats(self.text_kl), _nats(self.recall_kl), f"{self.top1_agreement:.1%}"


@dataclass(frozen=True, slots=True)
class Result:
    """Rows, and all that is needed to make them again."""

    command: str
    model: str
    model_sha256: str
    seed: int
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    seconds: float
    rows: Sequence[Row]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def show(console: Console, result: Result) -> None:
    """The whole table; the banded variations too."""
    table = Table(title="Codecs on the same passages")
    table.add_column("codec")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    last = ""
    for row in result.rows:
        if last not in ("", row.family):
            table.add_section()
        last = row.family
        table.add_row(row.codec.replace("`", ""), *row.cells())
    console.print(table)
    for row in result.rows:
        if row.note:
            console.print(f"{row.codec}: {row.note}", highlight=False)
    console.print(_caption(result), style="dim", highlight=False)


def as_markdown(result: Result) -> str:
    """Two tables: codecs by bits, and the variations of the banded code at each average."""
    chosen = [row for row in result.rows if row.family != "variations"]
    lines = [f"`{result.command}`", "", _caption(result), ""]
    lines += [f"| codec | {' | '.join(_HEADINGS)} |", "|---|" + "---:|" * len(_HEADINGS)]
    for row in sorted(chosen, key=lambda row: (-row.bits_per_value, row.text_kl)):
        name = f"**{row.codec}**" if row.family == "banded" else row.codec
        note = f" ({row.note})" if row.note else ""
        lines.append(f"| {name}{note} | {' | '.join(row.cells())} |")
    by_name = {row.codec.partition(" bits (")[0].removesuffix(" bits"): row for row in result.rows}
    names = [SHIPPED, *(variation.name for variation in VARIATIONS)]
    for title, field in (("text", "text_kl"), ("recall", "recall_kl")):
        lines += ["", f"Variations of the banded code, KL {title}, by bits of codes:", ""]
        lines += [f"| | {' | '.join(f'{average:g}' for average in AVERAGES)} |", "|---|" + "---:|" * len(AVERAGES)]
        for name in names:
            found = [by_name.get(f"{name}, {average:g}") for average in AVERAGES]
            if any(found):
                cells = (_nats(getattr(row, field)) if row else "" for row in found)
                lines.append(f"| {'as shipped' if name == SHIPPED else name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def check_page(page: Path) -> str:
    """The text of a page with both marks; RequestError without."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    start, end = map(text.find, MARKS)
    if not 0 <= start < end:
        raise RequestError(f"--docs {page}", why=f"it has no lines {MARKS[0]} and {MARKS[1]}")
    return text


def write_page(page: Path, result: Result) -> None:
    """Puts the tables between the marks of ``page``."""
    text = check_page(page)
    before, after = text.split(MARKS[0], 1)[0], text.split(MARKS[1], 1)[1]
    page.write_text(f"{before}{MARKS[0]}\n\n{as_markdown(result)}\n\n{MARKS[1]}{after}", encoding="utf-8")


def _nats(kl: float) -> str:
    return f"{kl:.2g}" if abs(kl) < 1e-3 else f"{kl:.4f}"


def _caption(result: Result) -> str:
    given = result.settings
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return (
        f"Model {result.model} ({result.model_sha256[:12]}), seed {result.seed}; text: {given['text_tokens']} tokens "
        f"of {given['windows']} passages, recall: {given['recall_tokens']} tokens of {given['answers']} answers; "
        f"calibrated on {given['calibration_tokens']} tokens in passages of {given['length']} and of half of that. "
        f"{versions}."
    )
