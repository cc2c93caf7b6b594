"""Decode attention over a grid of shapes, in one run, and a roofline of it.

    python benchmarks/attention.py --json benchmarks/results/attention.json --picture docs/attention-roofline.png

Every cell is what `kvfold bench attention` measures, its correctness gate included. After the grid come latent pages,
and a shared prefix walked once and for each sequence (`--shared-prefix`). ``--draw FILE`` draws a result again.
"""

# ruff: noqa: E402 - how OpenMP waits is said before torch is imported

from __future__ import annotations

import argparse
import io
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvfold.telemetry import calm_openmp

calm_openmp()  # before torch is imported, as the command does

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from rich.console import Console

from kvfold.bench.attention import bench_attention
from kvfold.bench.prefix import bench_prefix
from kvfold.bench.shapes import AttentionShape
from kvfold.bench_report import attention_report, prefix_report
from kvfold.cli.options import parse_recipe_list, write_json
from kvfold.quality.environment import hardware, versions
from kvfold.quality.report.palette import LIGHT

Row = dict[str, Any]

TONES = ("blue", "green", "purple", "ochre", "slate", "brown", "teal")
RIVAL = LIGHT["vermilion"]


def main() -> None:
    options = parse()
    if options.draw:
        result = json.loads(options.draw.read_text(encoding="utf-8"))
    else:
        result = measure(options)
    if options.picture:
        options.picture.write_bytes(roofline([row for row in result["rows"] if not row["rope"]]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    console = Console()
    recipes = parse_recipe_list(options.recipes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grid = itertools.product(options.head_dims, options.batches, options.contexts)
    shapes = [AttentionShape(head_dim=dim, batch=batch, context=context) for dim, batch, context in grid]
    shapes.append(AttentionShape(head_dim=512, rope=64, kv_heads=1, group=16, context=max(options.contexts)))
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(device),
        "versions": versions(),
        "rows": [],
    }
    for shape in shapes:
        found = bench_attention(shape, recipes=recipes, device=device, repeats=options.repeats, seconds=options.seconds)
        attention_report(console, found)
        result["rows"] += [row.as_json() for row in found]
        write_json(options.json, result)  # what is measured is kept, whatever comes after
    shared = AttentionShape(context=8192, batch=16)
    prefix = bench_prefix(shared, recipes=recipes, device=device, repeats=options.repeats, seconds=options.seconds)
    prefix_report(console, prefix)
    write_json(options.json, result | {"shared_prefix": [row.as_json() for row in prefix]})
    slower = [
        f"{row['recipe']} at {row['batch']} x {row['context']}, {row['head_dim']} dims: {row['vs_raw']:.2f}x"
        for row in result["rows"]
        if not row["rival"] and row["vs_raw"] is not None and row["vs_raw"] < 1
    ]
    console.print("slower than raw: " + ("; ".join(slower) or "nothing"))
    return result


def roofline(rows: Sequence[Row]) -> bytes:
    """A PNG: bytes a second against operations a byte, and speed against what bfloat16 could reach at best."""
    colors = dict(
        zip(dict.fromkeys(row["recipe"] for row in rows if not row["rival"]), map(LIGHT.get, TONES), strict=False)
    )
    figure = Figure(figsize=(11.5, 4.9), dpi=150, facecolor=LIGHT["paper"], layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set_facecolor(LIGHT["paper"])
        axes.grid(color=LIGHT["rule"], linewidth=0.8)
        axes.tick_params(length=0, labelcolor=LIGHT["muted"], labelsize=9)
        for spine in axes.spines.values():
            spine.set_visible(False)
    context = max(row["context"] for row in rows)
    batch = min(row["batch"] for row in rows)
    dims = sorted({row["head_dim"] for row in rows}, reverse=True)
    _intensity(left, [row for row in rows if (row["context"], row["batch"]) == (context, batch)], colors, dims)
    left.set_title(f"Roofline: {batch} x {context:,} tokens", loc="left", fontsize=11, color=LIGHT["ink"])
    _against_limit(right, [row for row in rows if row["head_dim"] == dims[0]], colors)
    right.set_title(f"Speed beside the limit of bfloat16, {dims[0]} dims", loc="left", fontsize=11, color=LIGHT["ink"])
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _intensity(axes: Axes, rows: Sequence[Row], colors: dict[str, Any], dims: Sequence[int]) -> None:
    """Heights are shares of the plain reads of a row's own turns: memory is not as fast at every moment."""
    roof = statistics.median(row["stream_gb_s"] for row in rows)
    axes.axhspan(roof, roof * 1.25, color=LIGHT["panel"])
    axes.axhline(roof, color=LIGHT["ink"], linewidth=1.6)
    axes.text(
        0.01,
        roof * 1.02,
        f"plain read of memory in the same run: {roof:.1f} GB/s",
        fontsize=9,
        color=LIGHT["ink"],
        transform=axes.get_yaxis_transform(),
        va="bottom",
    )
    below = -1.0
    for row in sorted(rows, key=lambda row: row["fraction_of_stream"]):
        wide = row["head_dim"] == dims[0]
        color = RIVAL if row["rival"] else colors[row["recipe"]]
        x, y = row["flops"] / row["bytes_read"], row["fraction_of_stream"] * roof
        marker = "s" if row["rival"] else "o"
        face = color if wide else LIGHT["paper"]
        axes.plot(x, y, marker, markersize=8, markerfacecolor=face, markeredgecolor=color, markeredgewidth=1.6)
        if wide and row["rival"]:
            below = max(y, below + roof / 22)  # labels keep their distance
            _label(axes, row["recipe"], (x, below), color, -9)
        elif wide:
            _label(axes, row["recipe"], (x, y), color, 9)
    axes.set_xscale("log", base=2)
    places = sorted({round(row["flops"] / row["bytes_read"]) for row in rows})
    low, high = min(places), max(places)
    axes.set_xlim(low / 4, high * 2.2)
    axes.set_ylim(0, roof * max(1.15, 1.05 * max(row["fraction_of_stream"] for row in rows)))
    ticks = [2**n for n in range(12) if low / 4 < 2**n < high * 2.2]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    key = "".join(f"   {mark} {dim} dims" for mark, dim in zip("●○", dims, strict=False))
    axes.set_xlabel("operations for each byte read" + key, fontsize=9.5, color=LIGHT["muted"])
    axes.set_ylabel("bytes read, GB/s", fontsize=9.5, color=LIGHT["muted"])


def _against_limit(axes: Axes, rows: Sequence[Row], colors: dict[str, Any]) -> None:
    batches = sorted({row["batch"] for row in rows})
    ends: list[tuple[float, str, str]] = []
    for batch, dash in zip(batches, ("-", "--", ":", "-."), strict=False):
        cell = [row for row in rows if row["batch"] == batch]
        for name in dict.fromkeys(row["recipe"] for row in cell if not row["rival"]):
            own = sorted((row["context"], row["vs_bf16_limit"]) for row in cell if row["recipe"] == name)
            axes.plot(*zip(*own, strict=True), dash, marker="o", markersize=4, color=colors[name], linewidth=1.6)
            if batch == batches[0]:
                ends.append((own[-1][1], name, colors[name]))
        best = [
            (context, max(row["vs_bf16_limit"] for row in cell if row["rival"] and row["context"] == context))
            for context in sorted({row["context"] for row in cell})
        ]
        axes.plot(*zip(*best, strict=True), dash, marker="s", markersize=4, color=RIVAL, linewidth=1.6)
        if batch == batches[0]:
            ends.append((best[-1][1], "best rival", RIVAL))
    axes.axhline(1, color=LIGHT["ink"], linewidth=1.6)
    contexts = sorted({row["context"] for row in rows})
    top = 1.12 * max(row["vs_bf16_limit"] for row in rows)
    limit = "the limit: bfloat16 at stream speed"
    axes.text(contexts[0], 1 + top / 100, limit, fontsize=9, va="bottom", color=LIGHT["ink"], path_effects=_halo())
    axes.set_ylim(0, max(top, 1.3))
    below = -1.0
    for value, name, color in sorted(ends):
        below = max(value, below + top / 22)  # labels keep their distance
        _label(axes, name, (contexts[-1], below), color, 9)
    axes.set_xscale("log", base=2)
    axes.set_xlim(contexts[0] / 1.15, contexts[-1] * 2)
    axes.set_xticks(contexts, [f"{context // 1024}k" if context % 1024 == 0 else str(context) for context in contexts])
    axes.minorticks_off()
    lines = "".join(f"   {mark} batch {batch}" for mark, batch in zip(("—", "- -", "···"), batches, strict=False))
    axes.set_xlabel("tokens in each sequence" + lines, fontsize=9.5, color=LIGHT["muted"])
    axes.set_ylabel("times faster than the limit", fontsize=9.5, color=LIGHT["muted"])


def _label(axes: Axes, text: str, at: tuple[float, float], color: str, aside: float) -> None:
    """``text``, so many points to the right (left, if negative) of a place."""
    align = "left" if aside > 0 else "right"
    axes.annotate(text, at, xytext=(aside, 0), textcoords="offset points", ha=align, va="center", fontsize=9,
                  color=color, annotation_clip=False, path_effects=_halo())  # fmt: skip


def _halo() -> list[Any]:
    """Text stays legible where a line runs through it."""
    return [withStroke(linewidth=2.5, foreground=LIGHT["paper"])]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default="raw,int8,int4,int2")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timed sweeps, for each cell of the grid")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--draw", type=Path, metavar="FILE", help="measure nothing, draw this result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
