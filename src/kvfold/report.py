"""What people see: tables on the terminal. The numbers come from elsewhere; nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvfold.bench.decode import DecodeRow
from kvfold.formats import format_bytes
from kvfold.quality.demo import DemoRow
from kvfold.quality.tasks import Document

__all__ = ["bench_report", "demo_report", "stats_report"]


def demo_report(console: Console, document: Document, rows: Sequence[DemoRow], *, answers: bool) -> None:
    """The document in one line, a sample of questions and answers, and the table of recipes."""
    if not rows:
        return
    first = rows[0]
    console.print(
        f"A stretch of Python's own documentation, {len(document.text):,} characters, in which "
        f"{first.answers_total} facts\nare planted. The model reads it ({first.context_tokens:,} tokens with "
        "the questions) and is asked for each.\n"
    )
    _print_answers(console, rows, limit=None if answers else 3)
    table = Table(title="The same questions, from caches of different size", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("recipe", "KV cache", "smaller", "tok/s", "answers", "mean KL", "top-1"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.recipe,
            format_bytes(row.kv_bytes),
            f"{row.compression:.2f}x",
            f"{row.decode_tok_s:.0f}",
            f"{row.answers_right} of {row.answers_total}",
            f"{row.kl:.4f}",
            f"{row.top1_agreement:.1%}",
        )
    console.print(table)
    console.print(
        "KV cache: all blocks allocated for the text; sinks, recent window, scales,\n"
        "slack and tables counted. tok/s: decoding one sequence at the end of the text.\n"
        f"KL (nats) and top-1 agreement: against raw, on the same {first.positions:,} teacher-\n"
        "forced tokens, through the runtime that serves.",
        style="dim",
    )


def _print_answers(console: Console, rows: Sequence[DemoRow], limit: int | None) -> None:
    for i, answer in enumerate(rows[0].answers[:limit]):
        console.print(f"[bold]{escape(answer.question)}[/]")
        for row in rows:
            said = row.answers[i]
            mark = "[green]right[/]" if said.right else f"[red]wrong[/], planted: {escape(said.expected)}"
            console.print(f"  {row.recipe:<6} {escape(said.said.strip())}  {mark}")
    if limit is not None and len(rows[0].answers) > limit:
        console.print(f"(the first {limit} of {len(rows[0].answers)}; all of them with --answers)\n", style="dim")


def bench_report(console: Console, rows: Sequence[DecodeRow]) -> None:
    """One row for each contestant."""
    if not rows:
        return
    title = f"Decode, {rows[0].batch} x {rows[0].context:,} tokens"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("", "ms/step", "tok/s", "KV bytes", "smaller", "of limit", "vs", "KL"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.contestant,
            f"{row.seconds * 1e3:.2f}",
            f"{row.tok_s:.1f}",
            format_bytes(row.kv_bytes),
            f"{row.compression:.2f}x",
            f"{row.fraction_of_limit:.0%}",
            "" if row.vs is None else f"{row.vs:.2f}x",
            f"{row.kl:.4f}",
        )
    console.print(table)
    console.print(
        "of limit: weights and cache read once at this machine's stream rate,\n"
        f"{rows[0].stream_gb_s:.1f} GB/s. KL: against raw on the first step, over random cache contents.",
        style="dim",
    )


def stats_report(console: Console, stats: Mapping[str, object]) -> None:
    """Name and value, one a line."""
    for name, value in stats.items():
        shown = format_bytes(value) if name.endswith("_bytes") and isinstance(value, int) else value
        console.print(
            f"{name.replace('_', ' ')}: {shown:.4g}"
            if isinstance(shown, float)
            else f"{name.replace('_', ' ')}: {shown}"
        )
