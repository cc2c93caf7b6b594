"""``kvfold generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvfold.cli.methods import check_recipe
from kvfold.cli.options import JsonOption, ModelOption, check_text, write_json
from kvfold.cli.progress import counted_progress
from kvfold.cli.start import start
from kvfold.engine.request import SamplingParams
from kvfold.errors import BudgetError, RequestError
from kvfold.formats import parse_bytes
from kvfold.quality.tasks import read_text

__all__ = ["EXAMPLES", "generate"]

EXAMPLES = (
    "Examples:  kvfold generate 'def add(a, b):'   |   kvfold generate --file notes.txt --recipe int4 --stats"
    "   |   cat question.txt | kvfold generate --chat"
)


def _size(text: str | None) -> str | None:
    if text is not None and parse_bytes(text) < 1:
        raise BudgetError(f"--kv-memory {text}", why="a cache needs memory", hint="write 2GiB or 512MiB")
    return text


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; '-' or nothing reads stdin.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", callback=check_text, help="Read the prompt from a file.")
    ] = None,
    model: ModelOption = "bundled",
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="raw, int8, int4, int2, k8v4,recent=128, ...")] = "raw",
    kv_memory: Annotated[str | None, typer.Option(callback=_size, help="Hard budget for the cache, e.g. 2GiB.")] = None,
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
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    wanted = check_recipe(recipe)
    text = _prompt(prompt, file)
    with counted_progress():
        start([wanted])
        from kvfold.engine import Engine
        from kvfold.report import stats_report

        made = Engine(model, recipe=recipe, kv_memory=kv_memory)
    with made as engine:
        print(engine.capacity_report(), file=sys.stderr)
        asked: Any = [{"role": "user", "content": text}] if chat else text
        final = None
        for chunk in engine.stream(asked, params, raise_errors=False):
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
            write_json(
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


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and prompt != "-" and file is not None:
        raise RequestError("a prompt and --file", why="one of them is the prompt", hint="give only one")
    if file is not None:
        return read_text(file)
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin.isatty():
        raise RequestError("no prompt", hint="kvfold generate 'text', --file FILE, or pipe text in")
    return sys.stdin.read()
