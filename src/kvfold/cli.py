"""The ``kvfold`` command: ``demo``, ``generate``, ``bench decode``. Data on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from kvfold import __version__
from kvfold.errors import KVFoldError, RequestError
from kvfold.recipe import Recipe
from kvfold.telemetry import Settings

__all__ = ["app", "main"]

app = typer.Typer(
    name="kvfold",
    help="A KV-cache runtime for LLM inference: paged, packed, shared; honest bytes beside measured quality.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(help="Speed, as a ratio against a named rival in the same run.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


def _json_target(file: str | None) -> str | None:
    """Refuses a file that could not be written, before the work that is to be written there."""
    if file is not None and file != "-" and (Path(file).is_dir() or not Path(file).parent.is_dir()):
        why = "it is a folder" if Path(file).is_dir() else f"there is no folder {Path(file).parent}"
        raise RequestError(f"--json {file}", why=why, hint="name a file in a folder that exists, or '-' for stdout")
    return file


JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", callback=_json_target, help="Write the result as JSON; '-' for stdout."),
]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="'bundled', a directory, or a hub id.")]


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    import torch
    from transformers.utils import logging as transformers_logging

    settings = Settings.from_env()
    logging.basicConfig(level=settings.log.upper(), format="%(message)s", stream=sys.stderr, force=True)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)


@app.command(
    epilog="Examples:  kvfold demo   |   kvfold demo --recipes 'raw;int4' --json -   |   kvfold demo --answers"
)
def demo(
    recipes: Annotated[str | None, typer.Option(help="Recipes to compare, separated by ';'.")] = None,
    model: ModelOption = "bundled",
    tokens: Annotated[int, typer.Option(min=300, help="Length of the document.")] = 1800,
    seed: Annotated[int, typer.Option(help="Which document and facts.")] = 0,
    answers: Annotated[bool, typer.Option("--answers", help="Also list what was said to each question.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Answer questions about a long real document from a full and from folded caches, bytes, speed and quality side by
    side.
    """
    from kvfold.engine.loading import load
    from kvfold.quality.demo import DEMO_RECIPES, run_demo
    from kvfold.report import demo_report

    chosen = _recipes(recipes) if recipes else list(DEMO_RECIPES)
    loaded, tokenizer = load(model)
    with _progress(2 * len({"raw", *chosen})) as say:
        document, rows = run_demo(loaded, tokenizer, recipes=chosen, target_tokens=tokens, seed=seed, say=say)
    if json_file != "-":
        demo_report(Console(), document, rows, answers=answers)
    _write_json(json_file, [row.as_json() for row in rows])


@app.command(
    epilog="Examples:  kvfold generate 'def add(a, b):'   |   kvfold generate --file notes.txt --recipe int4 --stats"
    "   |   cat question.txt | kvfold generate --chat"
)
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' or nothing reads stdin.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    model: ModelOption = "bundled",
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="raw, int8, int4, int2, k8v4,recent=128, ...")] = "raw",
    kv_memory: Annotated[str | None, typer.Option(help="Hard budget for the cache, e.g. 2GiB.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0: all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Bytes, speed and blocks, on stderr.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Generate from a prompt (argument, file or stdin) and stream the text to stdout."""
    from kvfold.engine import Engine, SamplingParams
    from kvfold.report import stats_report

    text = _prompt(prompt, file)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    with Engine(model, recipe=recipe, kv_memory=kv_memory) as engine:
        print(engine.capacity_report(), file=sys.stderr)
        asked: Any = [{"role": "user", "content": text}] if chat else text
        final = None
        for chunk in engine.stream(asked, params):
            if json_file != "-":
                print(chunk.text_delta, end="", flush=True)
            final = chunk.final or final
        if json_file != "-":
            print()
        if final is not None and final.error is not None:
            raise final.error
        report = engine.stats()
        if stats:
            stats_report(Console(stderr=True), report)
        if final is not None:
            _write_json(
                json_file,
                {
                    "text": final.text,
                    "token_ids": final.token_ids,
                    "finish_reason": final.finish_reason,
                    "prompt_tokens": len(final.prompt_token_ids),
                    "recipe": recipe,
                    "stats": report,
                },
            )


@bench_app.command(
    "decode",
    epilog="Examples:  kvfold bench decode --context 4096 --batch 4 --vs transformers   |   "
    "kvfold bench decode --shape tiny --context 32768 --recipes 'raw;int4' --json -",
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
    chosen = _recipes(recipes)
    with _progress(steps + 1) as say:
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
    _write_json(
        json_file,
        {
            "command": " ".join(["kvfold", *sys.argv[1:]]),
            "threads": torch.get_num_threads(),
            "rows": [row.as_json() for row in rows],
        },
    )


def _recipes(text: str) -> list[str]:
    """The recipes of an option, each of them legal; found out before a model is loaded."""
    recipes = [part.strip() for part in text.split(";")]
    for recipe in recipes:
        Recipe.parse(recipe)
    return recipes


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and prompt != "-" and file is not None:
        raise RequestError("a prompt and --file", why="one of them is the prompt", hint="give only one")
    if file is not None:
        if not file.is_file():
            raise RequestError(f"prompt file {file}", why="no such file")
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"prompt file {file}", why="it is not UTF-8", hint="give a plain text file") from error
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin.isatty():
        raise RequestError("no prompt", hint="kvfold generate 'text', --file FILE, or pipe text in")
    return sys.stdin.read()


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr if that is a terminal; the function it gives says what begins and counts one of ``steps``."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=steps + 1)

        def say(what: str) -> None:
            progress.update(task, advance=1, description=what)

        yield say


def _write_json(file: str | None, data: Any) -> None:
    if file is None:
        return
    text = json.dumps(data, indent=2)
    if file == "-":
        print(text)
    else:
        Path(file).write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Entry point: our own errors end with exit code 2 and one clear message, Ctrl-C with 130."""
    try:
        app()
    except KVFoldError as error:
        print(f"kvfold: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
