"""``python -m benchmarks.retention``: scores by the share kept, ours beside kvpress's."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from benchmarks.command import run_app
from benchmarks.retention.methods import KEEPS, METHODS, choose, parse_keeps, with_recipes

from kvfold.cli.options import ModelOption, parse_recipe_list
from kvfold.cli.progress import share_progress
from kvfold.cli.workload import CompressOption, TasksOption, TextOption

if TYPE_CHECKING:
    from benchmarks.retention.session import SweepPlan

TASKS = "niah_single,niah_multikey,niah_multiquery,vt,kv,copy"

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def run(  # noqa: PLR0913 # every option is a parameter
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the result goes.")],
    model: ModelOption = "bundled",
    methods: Annotated[str, typer.Option(help="Names or patterns, separated by ','; none: only merge.")] = "*",
    keeps: Annotated[str, typer.Option(help="Shares of the context that are kept.")] = ",".join(map(str, KEEPS)),
    base: Annotated[str, typer.Option(help="What our recipes pack the tokens with that stay.")] = "raw",
    recipe: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXT", help="Our recipe of a method, with {base} and {keep}.")
    ] = None,
    side: Annotated[str, typer.Option(metavar="both|ours|theirs", help="Whose rows are measured.")] = "both",
    tasks: TasksOption = TASKS,
    context: Annotated[int, typer.Option(help="Tokens of a task with its answer, and of a text passage.")] = 2048,
    samples: Annotated[int, typer.Option(help="Questions of each task.")] = 20,
    compress: CompressOption = "context",
    text: TextOption = None,
    windows: Annotated[int, typer.Option(help="Passages of the text.")] = 8,
    scored: Annotated[int, typer.Option(help="Tokens scored at the end of each passage.")] = 256,
    seed: Annotated[int, typer.Option(help="Which passages and questions.")] = 0,
    merge: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Add the rows of another result; may be repeated.")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a page with plots.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run with this --json stopped.")] = True,
) -> None:
    """Measure methods that drop tokens at several shares kept, and compare ours with kvpress's, method by method.

    Subsets can be run by --methods and --side into files of their own, and put together with --merge.
    """
    from benchmarks.rivals.catalog import check_installed

    known = with_recipes(recipe or [], METHODS)
    chosen, shares = choose(methods, known), parse_keeps(keeps)
    if side != "theirs":
        for method in chosen:
            parse_recipe_list(method.ours(shares[0], base))
    if side != "ours":
        check_installed(name for method in chosen if (name := method.theirs(shares[0])) is not None)

    # From here on it takes seconds to import.
    from benchmarks.retention.session import SweepPlan

    from kvfold.quality.settings import EvalSettings, parse_tasks

    if report is not None:
        from kvfold.quality.report import require_matplotlib

        require_matplotlib()
    settings = EvalSettings(
        tasks=parse_tasks(tasks),
        context=context,
        samples=samples,
        compress=compress,  # type: ignore[arg-type] # checked there
        text=text,
        text_windows=windows,
        scored_tokens=scored,
        generation_tokens=0,
        seed=seed,
    )
    plan = SweepPlan(
        model=model,
        methods=chosen,
        known=known,
        keeps=shares,
        base=base,
        side=side,
        settings=settings,
        command=shlex.join(["python", "-m", "benchmarks.retention", *sys.argv[1:]]),
        result=json_file,
        merge=merge or [],
        resume=resume,
    )
    _run(plan, report)


def _run(plan: SweepPlan, report: Path | None) -> None:
    from benchmarks.retention.session import run_sweep
    from benchmarks.retention.table import print_table
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with share_progress() as progress:
        sweep = run_sweep(plan, progress=progress)
    print_table(sweep)
    if report is not None:
        from benchmarks.retention.picture import write_sweep

        print(f"report: {write_sweep(sweep, report)}", file=sys.stderr)


def main() -> None:
    """Entry point."""
    run_app(app, "retention", "the same command goes on from here")


if __name__ == "__main__":
    main()
