"""What people see: tables on the terminal. The numbers come from elsewhere; nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
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
    tokens = rows[0].context_tokens
    console.print(f"A document of {len(document.text):,} characters from Python's own documentation, {tokens:,} tokens")
    console.print(f"with its questions; {rows[0].answers_total} facts are planted in it and asked for.\n")
    _answer_table(console, rows, limit=None if answers else 3)
    table = Table(title="The same questions, from caches of different size", title_justify="left", caption_justify="left")
    table.caption = (
        "KV bytes: blocks allocated for the whole text, with sinks, recent window, scales, slack and tables.\n"
        f"KL and top-1 agreement: against raw, on the same {rows[0].positions:,} teacher-forced tokens."
    )
    for heading in ("recipe", "KV bytes", "smaller", "decode tok/s", "answers right", "mean KL", "top-1 same"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.recipe,
            format_bytes(row.kv_bytes),
            f"{row.compression:.2f}x",
            f"{row.decode_tok_s:.0f}",
            f"{row.answers_right} / {row.answers_total}",
            f"{row.kl:.4f}",
            f"{row.top1_agreement:.1%}",
        )
    console.print(table)


def _answer_table(console: Console, rows: Sequence[DemoRow], limit: int | None) -> None:
    table = Table(title="What was asked, and what each cache answered", title_justify="left")
    table.add_column("question", overflow="fold")
    table.add_column("planted", no_wrap=True)
    for row in rows:
        table.add_column(row.recipe, no_wrap=True, max_width=14)
    for i, answer in enumerate(rows[0].answers[:limit]):
        said = [row.answers[i] for row in rows]
        marks = [f"[green]{a.said.strip()}[/]" if a.right else f"[red]{a.said.strip()} ✗[/]" for a in said]
        table.add_row(answer.question, answer.expected, *marks)
    console.print(table)
    if limit is not None and len(rows[0].answers) > limit:
        console.print(f"(the first {limit} of {len(rows[0].answers)}; all of them with --answers)\n")


def bench_report(console: Console, rows: Sequence[DecodeRow]) -> None:
    """One row for each contestant."""
    if not rows:
        return
    table = Table(title=f"Decode, {rows[0].batch} x {rows[0].context:,} tokens", title_justify="left", caption_justify="left")
    table.caption = (
        f"Limit: weights and cache bytes read once at the machine's stream bandwidth, {rows[0].stream_gb_s:.1f} GB/s here.\n"
        "KL: mean over the batch against raw on the first step, over random cache contents."
    )
    for heading in ("", "ms / step", "tok/s", "KV bytes", "smaller", "of limit", "vs rival", "KL"):
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


def stats_report(console: Console, stats: Mapping[str, object]) -> None:
    """Name and value, one a line."""
    for name, value in stats.items():
        shown = format_bytes(value) if name.endswith("_bytes") and isinstance(value, int) else value
        console.print(f"{name.replace('_', ' ')}: {shown:.4g}" if isinstance(shown, float) else f"{name.replace('_', ' ')}: {shown}")
