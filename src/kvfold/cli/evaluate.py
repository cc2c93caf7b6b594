"""``kvfold eval``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvfold.cli.lm_eval import (
    Harness,
    LimitOption,
    LmEvalChatOption,
    LmEvalOption,
    LmEvalPathOption,
    LmEvalShotsOption,
    run_harness,
)
from kvfold.cli.options import JsonOption, ModelOption, check_dtype_option, parse_recipe_list, write_json
from kvfold.cli.progress import share_progress
from kvfold.cli.start import start
from kvfold.cli.workload import (
    CompressOption,
    ContextOption,
    DepthsOption,
    GenerationsOption,
    GenerationTokensOption,
    SamplesOption,
    ScoredOption,
    TasksOption,
    TextOption,
    WindowsOption,
)
from kvfold.errors import RequestError
from kvfold.quality.plans import EVAL_RECIPES, QUICK, QUICK_RECIPES, Plan
from kvfold.quality.results import Evaluation
from kvfold.quality.settings import EvalSettings, parse_depths, parse_tasks
from kvfold.recipe import Recipe

__all__ = ["EXAMPLES", "evaluate"]

EXAMPLES = (
    "Examples:  kvfold eval --quick   |   kvfold eval --recipes 'int4;k4v2' --tasks kv,vt --json eval.json --report out"
    "   |   kvfold eval --text notes.txt --tasks none"
)


def evaluate(
    model: ModelOption = "bundled",
    recipes: Annotated[str | None, typer.Option(help="Recipes, separated by ',' or ';'. raw is always there.")] = None,
    tasks: TasksOption = "all",
    context: ContextOption = None,
    samples: SamplesOption = None,
    depths: DepthsOption = "",
    text: TextOption = None,
    windows: WindowsOption = None,
    scored: ScoredOption = None,
    generation_tokens: GenerationTokensOption = None,
    generations: GenerationsOption = None,
    compress: CompressOption = "prompt",
    dtype: Annotated[
        str | None,
        typer.Option(callback=check_dtype_option, help="float32, bfloat16, float16; the saved one without."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which passages and questions.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer recipes, samples and tokens.")] = False,
    json_file: JsonOption = None,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a page with plots.")] = None,
    merge: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Add the rows of another result; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run with this --json stopped.")] = True,
    lm_eval: LmEvalOption = None,
    lm_eval_path: LmEvalPathOption = None,
    lm_eval_chat: LmEvalChatOption = False,
    lm_eval_shots: LmEvalShotsOption = None,
    limit: LimitOption = None,
) -> None:
    """Measure what recipes cost in quality: tasks, text and long generation, each beside the full cache."""
    chosen = None if recipes is None else parse_recipe_list(recipes)
    harness = Harness(tasks=lm_eval, path=lm_eval_path, chat=lm_eval_chat, shots=lm_eval_shots, limit=limit)
    if harness.tasks is not None:
        wanted = chosen or ["int8", "int4"]
        run_harness(harness, model, wanted, dtype=dtype, seed=seed, json_file=json_file, report=report)
        return
    given = {
        "tasks": parse_tasks(tasks),
        "context": context,
        "samples": samples,
        "depths": parse_depths(depths),
        "text": text,
        "text_windows": windows,
        "scored_tokens": scored,
        "generation_tokens": generation_tokens,
        "generation_passages": generations,
        "compress": compress,
        "seed": seed,
    }
    _check_report(report)
    for file in merge or []:
        Evaluation.read(file)
    _run(_plan(model, dtype, chosen, given, quick, json_file, resume, merge or []), json_file, report)


def _plan(
    model: str,
    dtype: str | None,
    recipes: Sequence[str] | None,
    given: Mapping[str, Any],
    quick: bool,
    json_file: str | None,
    resume: bool,
    merge: Sequence[Path],
) -> Plan:
    """What is asked for; ``given`` are settings, those of None as they are by default."""
    changes = {name: value for name, value in given.items() if value is not None}
    return Plan(
        model=model,
        dtype=dtype,
        recipes=recipes,
        usual=QUICK_RECIPES if quick else EVAL_RECIPES,
        settings=replace(QUICK if quick else EvalSettings(), **changes),
        command=shlex.join(["kvfold", *sys.argv[1:]]),
        result=None if json_file is None or json_file == "-" else Path(json_file),
        resume=resume,
        merge=merge,
    )


def _run(plan: Plan, json_file: str | None, report: Path | None) -> None:
    try:
        with share_progress() as progress:
            start(map(Recipe.parse, plan.recipes or []))
            from kvfold.quality.session import run_session
            from kvfold.report import eval_report

            result = run_session(plan, progress=progress, save=lambda found: write_json(json_file, found.as_json()))
    except KeyboardInterrupt:
        if plan.result is not None:
            print("kvfold: interrupted; the same command goes on from here", file=sys.stderr)
        raise
    if json_file != "-":
        eval_report(Console(), result)
    if report is not None:
        from kvfold.quality.report import write_report

        print(f"report: {write_report(result, report)}", file=sys.stderr)


def _check_report(folder: Path | None) -> None:
    """Refuses a report that could not be drawn or written, before any work."""
    if folder is None:
        return
    from kvfold.quality.report import require_matplotlib

    require_matplotlib()
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = f"{there} cannot be written" if there.is_dir() else f"{there} is a file"
        raise RequestError(f"--report {folder}", why=why, hint="name a folder, which need not exist yet")
