"""Decode attention over a grid of shapes, in one run, and a roofline of it.

    python benchmarks/attention.py --json benchmarks/results/attention.json --picture docs/attention-roofline.png

Every cell is what `kvfold bench attention` measures, its correctness gate included; the last rows are a shared prefix
walked once and for each sequence (`--shared-prefix`). A picture can be drawn again from a result: ``--draw FILE``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.roofline import roofline
from kvfold.bench.attention import bench_attention
from kvfold.bench.pages import AttentionShape
from kvfold.bench.prefix import bench_prefix
from kvfold.cli.options import parse_recipe_list
from kvfold.quality.environment import hardware, versions
from kvfold.report import attention_report, prefix_report


def main() -> None:
    options = parse()
    if options.draw:
        result = json.loads(options.draw.read_text(encoding="utf-8"))
    else:
        result = measure(options)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.picture:
        options.picture.write_bytes(roofline(result["rows"]))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    console = Console()
    recipes = parse_recipe_list(options.recipes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for dim, batch, context in itertools.product(options.head_dims, options.batches, options.contexts):
        shape = AttentionShape(head_dim=dim, batch=batch, context=context)
        found = bench_attention(
            shape, recipes=recipes, device=device, repeats=options.repeats, seconds=options.seconds
        )
        attention_report(console, found)
        rows += found
    prefix = bench_prefix(
        AttentionShape(context=8192, batch=16), recipes=recipes, device=device, repeats=options.repeats
    )
    prefix_report(console, prefix)
    slower = [
        f"{row.recipe} at {row.batch} x {row.context}, {row.head_dim} dims: {row.vs_raw:.2f}x"
        for row in rows
        if not row.rival and row.vs_raw is not None and row.vs_raw < 1
    ]
    console.print("slower than raw: " + ("; ".join(slower) or "nothing"))
    return {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(device),
        "versions": versions(),
        "rows": [row.as_json() for row in rows],
        "shared_prefix": [row.as_json() for row in prefix],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default="raw,int8,int4,int2")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=6.0, help="of timed sweeps, for each cell of the grid")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--draw", type=Path, metavar="FILE", help="measure nothing, draw this result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
