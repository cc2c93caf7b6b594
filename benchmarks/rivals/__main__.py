"""``python -m benchmarks.rivals``: rivals on the work of ``kvfold eval``, and with ``--recipes`` the whole table."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from benchmarks.command import run_app
from benchmarks.rivals.catalog import check_installed, parse_rivals

from kvfold.cli.options import JsonOption, ModelOption, parse_recipe_list, write_json
from kvfold.cli.progress import share_progress
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

if TYPE_CHECKING:
    from kvfold.quality.results import Evaluation
    from kvfold.quality.settings import EvalSettings

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def run(  # noqa: PLR0913 # every option is a parameter
    model: ModelOption = "bundled",
    rivals: Annotated[str, typer.Option(help="Names or patterns, separated by ','; all.")] = "all",
    recipes: Annotated[str | None, typer.Option(help="Our recipes for the same table, separated by ';'.")] = None,
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
    seed: Annotated[int, typer.Option(help="Which passages and questions.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples and tokens, as `kvfold eval --quick`.")] = False,
    json_file: JsonOption = None,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a page with plots.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run with this --json stopped.")] = True,
) -> None:
    """Measure rivals exactly as ``kvfold eval`` measures recipes. Take the options given there to merge the two.

    With --recipes our own rows are measured too and put beside the rivals', which are kept by themselves in
    FILE.rivals.json.
    """
    names = parse_rivals(rivals)
    ours = None if recipes is None else parse_recipe_list(recipes)
    if ours is not None and json_file in (None, "-"):
        raise RequestError("--recipes", why="two results are to be kept", hint="name a file: --json FILE")
    check_installed(names)
    # quanto compiles an extension at its first use, and looks for ninja, which is beside this Python
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

    # From here on it takes seconds to import.
    from transformers.utils import logging as transformers_logging

    from kvfold.quality.settings import parse_depths, parse_tasks

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if report is not None:
        from kvfold.quality.report import require_matplotlib

        require_matplotlib()
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
    result = _measure(model, names, ours, _settings(quick, given), json_file, resume)
    if json_file != "-":
        from rich.console import Console

        from kvfold.report import eval_report

        eval_report(Console(), result)
    if report is not None:
        from kvfold.quality.report import write_report

        print(f"report: {write_report(result, report)}", file=sys.stderr)


def _settings(quick: bool, given: dict[str, Any]) -> EvalSettings:
    """What `kvfold eval` makes of the same options."""
    from dataclasses import replace

    from kvfold.quality.plans import QUICK
    from kvfold.quality.settings import EvalSettings

    return replace(
        QUICK if quick else EvalSettings(), **{name: value for name, value in given.items() if value is not None}
    )


def _measure(
    model: str,
    rivals: Sequence[str],
    recipes: Sequence[str] | None,
    settings: EvalSettings,
    json_file: str | None,
    resume: bool,
) -> Evaluation:
    """The rivals' rows, and with ``recipes`` the whole table, written where they belong."""
    from benchmarks.rivals.session import RivalPlan, run_rivals, run_table

    target = None if json_file in (None, "-") else Path(str(json_file))
    theirs = target.with_name(target.name + ".rivals.json") if target is not None and recipes is not None else target

    def save(found: Evaluation) -> None:
        write_json(json_file if theirs is None else str(theirs), found.as_json())

    def save_table(found: Evaluation) -> None:
        write_json(json_file, found.as_json())

    command = shlex.join(["python", "-m", "benchmarks.rivals", *sys.argv[1:]])
    plan = RivalPlan(model=model, rivals=rivals, settings=settings, command=command, result=theirs, resume=resume)
    with share_progress() as progress:
        result = run_rivals(plan, progress=progress, save=save)
        if recipes is not None and target is not None:
            result = run_table(plan, recipes, target, progress=progress, save=save_table)
    return result


def main() -> None:
    """Entry point."""
    run_app(app, "rivals", "the same command goes on from here if it has a --json FILE")


if __name__ == "__main__":
    main()
