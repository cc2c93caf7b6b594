"""``kvfold bench decode``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from kvfold.cli.options import JsonOption, counted_progress, parse_recipe_list, write_json
from kvfold.errors import RequestError

__all__ = ["EXAMPLES", "bench_decode_command"]

EXAMPLES = (
    "Examples:  kvfold bench decode --context 4096 --batch 4 --vs transformers   |   "
    "kvfold bench decode --shape tiny --context 32768 --recipes 'raw;int4' --json -"
)


def bench_decode_command(
    shape: Annotated[str | None, typer.Option(help="A named shape with random weights, e.g. llama-3.2-1b.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A real model instead: 'bundled', a directory, a hub id.")
    ] = None,
    recipes: Annotated[str, typer.Option(help="Recipes, separated by ';'.")] = "raw;int8;int4;int2",
    context: Annotated[int, typer.Option(min=1, help="Tokens already in each sequence.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps; the median counts.")] = 16,
    vs: Annotated[str | None, typer.Option(help="Rivals in the same run, separated by ';': transformers.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32, for random weights.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Weights, cache contents and tokens.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Time whole decode steps over synthetically filled caches, after a correctness gate, beside the speed of
    memory.
    """
    import torch

    from kvfold.bench.decode import bench_decode
    from kvfold.bench.shapes import random_model
    from kvfold.engine.loading import load
    from kvfold.report import bench_report

    if (shape is not None) and (model is not None):
        raise RequestError("--shape and --model", why="one of them names the model", hint="give only one")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise RequestError(f"unknown dtype {dtype!r}", hint="known: bfloat16, float16, float32")
    chosen = parse_recipe_list(recipes)
    with counted_progress(steps + 1) as say:
        if shape is not None:
            loaded = random_model(shape, dtype=getattr(torch, dtype), max_positions=context + steps + 2, seed=seed)
        else:
            loaded, _ = load(model or "bundled")
        rows = bench_decode(
            loaded,
            recipes=chosen,
            context=context,
            batch=batch,
            steps=steps,
            rivals=[rival.strip() for rival in vs.split(";")] if vs else [],
            seed=seed,
            say=say,
        )
    if json_file != "-":
        bench_report(Console(), rows)
    write_json(
        json_file,
        {
            "command": " ".join(["kvfold", *sys.argv[1:]]),
            "threads": torch.get_num_threads(),
            "rows": [row.as_json() for row in rows],
        },
    )
