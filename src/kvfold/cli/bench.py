"""``kvfold bench``: decode steps, and attention alone."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvfold.bench.shapes import FILL_TOKENS, AttentionShape, check_rivals, check_shape
from kvfold.cli.options import (
    JsonOption,
    OtherModelOption,
    check_dtype_option,
    parse_names,
    parse_recipe_list,
    write_json,
)
from kvfold.cli.progress import counted_progress
from kvfold.cli.start import start
from kvfold.errors import RequestError
from kvfold.recipe import Recipe

if TYPE_CHECKING:
    import torch

__all__ = ["ATTENTION_EXAMPLES", "DECODE_EXAMPLES", "EXAMPLES", "bench_attention_command", "bench_decode_command"]

EXAMPLES = "Examples:  kvfold bench decode --vs transformers   |   kvfold bench attention --context 4096"
DECODE_EXAMPLES = (
    "Examples:  kvfold bench decode --context 3072 --batch 8 --vs transformers   |   "
    "kvfold bench decode --shape llama-3.2-1b --context 16384 --batch 8 --recipes raw,int4 --json -"
)
ATTENTION_EXAMPLES = (
    "Examples:  kvfold bench attention   |   kvfold bench attention --context 4096 --batch 16 --head-dim 64   |   "
    "kvfold bench attention --recipes 'raw,k8v4,int4,scales=channel' --json attention.json   |   "
    "kvfold bench attention --shared-prefix --context 8192 --batch 16   |   "
    "kvfold bench attention --kv-heads 1 --head-dim 512 --rope 64 --group 16"
)

RecipesOption = Annotated[str, typer.Option(help="Recipes, separated by ',' or ';'.")]
DtypeOption = Annotated[
    str, typer.Option(callback=check_dtype_option, help="bfloat16, float16 or float32, for what is drawn at random.")
]


def bench_decode_command(
    shape: Annotated[str | None, typer.Option(help="A named shape with random weights, e.g. llama-3.2-1b.")] = None,
    model: OtherModelOption = None,
    recipes: RecipesOption = "raw,int8,int4,int2",
    context: Annotated[int, typer.Option(min=1, help="Tokens already in each sequence.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps at most; the median counts.")] = 16,
    vs: Annotated[str | None, typer.Option(help="Rivals in the same run, separated by ',': transformers.")] = None,
    dtype: DtypeOption = "bfloat16",
    seed: Annotated[int, typer.Option(help="Weights, cache contents and tokens.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Time whole decode steps over synthetically filled caches, after a correctness gate, beside the speed of memory,
    and say which parts take the time.
    """
    if (shape is not None) and (model is not None):
        raise RequestError("--shape and --model", why="one of them names the model", hint="give only one")
    if shape is not None:
        check_shape(shape)
    rivals = parse_names(vs) if vs else []
    check_rivals(rivals)
    chosen = parse_recipe_list(recipes)
    parsed = [Recipe.parse(recipe) for recipe in chosen]
    with counted_progress(-(-context // FILL_TOKENS) + steps + len(chosen) + 2) as say:
        start(parsed)
        from kvfold.bench.decode import bench_decode, spare_positions
        from kvfold.bench.shapes import random_model
        from kvfold.bench_report import bench_report
        from kvfold.engine.loading import load

        if shape is not None:
            positions = context + steps + spare_positions(parsed)
            loaded = random_model(shape, dtype=_dtype(dtype), max_positions=positions, seed=seed)
        else:
            loaded, _ = load(model or "bundled")
        rows = bench_decode(
            loaded,
            recipes=chosen,
            context=context,
            batch=batch,
            steps=steps,
            rivals=rivals,
            seed=seed,
            say=say,
        )
    if json_file != "-":
        bench_report(Console(), rows)
    _write(json_file, rows, loaded.device)


def bench_attention_command(
    recipes: RecipesOption = "raw,int8,int4,int2",
    context: Annotated[int, typer.Option(min=1, help="Tokens in each sequence.")] = 32768,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    head_dim: Annotated[int, typer.Option(min=1, help="Dims of a head.")] = 128,
    group: Annotated[int, typer.Option(min=1, help="Query heads to a KV head.")] = 4,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 8,
    rope: Annotated[
        int, typer.Option(min=0, help="Latent (MLA) pages: a key of head-dim + rope dims, its first part the value.")
    ] = 0,
    dtype: DtypeOption = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds at most; the median counts.")] = 15,
    seconds: Annotated[float, typer.Option(min=0, help="For all rounds together; slow ones get fewer.")] = 30.0,
    shared_prefix: Annotated[
        bool, typer.Option("--shared-prefix", help="The context is one prefix of all: walked for each, and once.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Keys, values and queries.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Time decode attention alone, one layer after the other, against SDPA and matmul in bfloat16, after a correctness
    gate and beside the speed of memory. On the GPU if there is one.
    """
    chosen = parse_recipe_list(recipes)
    shape = AttentionShape(context=context, batch=batch, head_dim=head_dim, group=group, kv_heads=kv_heads, rope=rope)
    with counted_progress(len(chosen) + 1 + repeats) as say:
        start(Recipe.parse(recipe) for recipe in chosen)
        import torch

        from kvfold.bench.attention import bench_attention
        from kvfold.bench.prefix import bench_prefix
        from kvfold.bench_report import attention_report, prefix_report

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settings: dict[str, Any] = {"dtype": _dtype(dtype), "repeats": repeats, "seconds": seconds, "seed": seed}
        bench: Callable[..., Sequence[Any]] = bench_prefix if shared_prefix else bench_attention
        report: Callable[..., None] = prefix_report if shared_prefix else attention_report
        rows = bench(shape, recipes=chosen, device=device, say=say, **settings)
    if json_file != "-":
        report(Console(), rows)
    _write(json_file, rows, device)


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _write(json_file: str | None, rows: Sequence[Any], device: torch.device) -> None:
    from kvfold.quality.environment import hardware, versions

    record = {
        "command": shlex.join(["kvfold", *sys.argv[1:]]),
        "hardware": hardware(device),
        "versions": versions(),
        "rows": [row.as_json() for row in rows],
    }
    write_json(json_file, record)
