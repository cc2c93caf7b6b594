"""What ``kvfold bench`` shows: tables on the terminal. The numbers come from elsewhere; nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from kvfold.bench.attention import AttentionRow
from kvfold.bench.decode import DecodeRow
from kvfold.bench.prefix import PrefixRow
from kvfold.formats import format_bytes
from kvfold.tables import Figures

__all__ = ["attention_report", "bench_report", "demo_speed_report", "prefix_report"]


def bench_report(console: Console, rows: Sequence[DecodeRow]) -> None:
    """One row for each contestant, then where its time goes."""
    if not rows:
        return
    title = f"Decode, {rows[0].batch} x {rows[0].context:,} tokens"
    table = Figures(title, ("", "ms/step", "tok/s", "KV bytes", "smaller", "of limit", "vs", "KL"))
    parts = Figures("Where a step's time goes", ("", "linear", "attention", "write path", "(sealing)", "other"))
    for row in rows:
        table.add(
            row.contestant,
            f"{row.seconds * 1e3:.2f}",
            f"{row.tok_s:.1f}",
            format_bytes(row.kv_bytes),
            f"{row.compression:.2f}x",
            f"{row.fraction_of_limit:.0%}",
            "" if row.vs is None else f"{row.vs:.2f}x",
            f"{row.kl:.4f}",
        )
        spent = (row.linear_share, row.attention_share, row.write_share, row.sealing_share, row.other_share)
        parts.add(row.contestant, *(f"{share:.1%}" for share in spent))
    table.print(console)
    console.print(
        "of limit: weights and cache read once at this machine's stream rate,\n"
        f"{rows[0].stream_gb_s:.1f} GB/s. KL: against raw on the first step, over random cache contents.\n",
        style="dim",
    )
    parts.print(console)
    console.print(
        "Clocked in steps of their own. write path: new rows, sealing, commit.\n"
        "other: norms, rotary embedding, activations, tables, Python.",
        style="dim",
    )


def demo_speed_report(console: Console, rows: Sequence[DecodeRow], why_not: str) -> None:
    """Speed with many sequences, and why it is measured there; or why it is not measured."""
    if not rows:
        console.print(f"Speed was not measured: {why_not}.", style="dim", highlight=False)
        return
    first = rows[0]
    fewest = min(row.samples for row in rows)
    title = f"Decoding {first.batch} sequences of {first.context} tokens at once"
    table = Figures(title, ("", "KV cache", "smaller", "ms/step", "tok/s", "vs transformers"))
    for row in rows:
        table.add(
            row.contestant,
            format_bytes(row.kv_bytes),
            f"{row.compression:.2f}x",
            f"{row.seconds * 1e3:.1f}",
            f"{row.tok_s:,.0f}",
            "" if row.vs is None else f"{row.vs:.2f}x",
        )
    table.print(console)
    console.print(
        "A step reads the weights once for all sequences, and each sequence's own cache.\n"
        "One short sequence has little to read, so that a smaller cache saves no time;\n"
        f"many or long ones have much. Measured in this run: whole steps, median of {fewest},\n"
        "over random keys and values, after raw agreed with transformers.",
        style="dim",
    )


def attention_report(console: Console, rows: Sequence[AttentionRow]) -> None:
    """One row for each contestant, rivals last."""
    if not rows:
        return
    first = rows[0]
    title = f"Decode attention, {first.batch} x {first.context:,} tokens, {_heads(first)}"
    versus = ("vs best", "vs stock", "vs limit")
    table = Figures(title, ("", "ms", "GB/s", "of stream", *versus, "error"))
    for row in rows:
        times = (row.vs_best_bf16, row.vs_stock_sdpa, row.vs_bf16_limit)
        table.add(
            row.recipe,
            f"{row.seconds * 1e3:.3f}",
            f"{row.gb_s:.1f}",
            f"{row.fraction_of_stream:.0%}",
            *(f"{factor:.2f}x" for factor in times),
            f"{row.rel_err:.1e}",
            style="dim" if row.rival else None,
        )
    table.print(console)
    console.print(
        f"of stream: of a plain read, {first.stream_gb_s:.1f} GB/s in this run. {first.variant}, "
        f"{first.threads} threads.\n"
        "vs best, vs stock: times faster than the best rival, and than SDPA as trans-\n"
        "formers calls it, in bfloat16. vs limit: than bfloat16 can be read at all.\n"
        "error: of the worst row, relative, against float32 on the same codes.",
        style="dim",
    )


def prefix_report(console: Console, rows: Sequence[PrefixRow]) -> None:
    """A prefix walked for each sequence, and once."""
    if not rows:
        return
    first = rows[0]
    title = f"A prefix of {first.context:,} tokens under {first.batch} sequences, {_heads(first)}"
    table = Figures(title, ("", "for each, ms", "once, ms", "faster", "lse differs"))
    for row in rows:
        seconds = (f"{value * 1e3:.3f}" for value in (row.each_seconds, row.cascade_seconds))
        table.add(row.recipe, *seconds, f"{row.factor:.2f}x", f"{row.lse_difference:.1e}")
    table.print(console)


def _heads(row: AttentionRow | PrefixRow) -> str:
    kind = f"latents of {row.head_dim} + {row.rope}" if row.rope else f"{row.kv_heads} KV heads of {row.head_dim}"
    return f"{kind}, {row.group} queries each"
