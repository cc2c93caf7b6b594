"""``kvfold profile``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvfold.cli.methods import check_recipe
from kvfold.cli.options import CorpusOption, JsonOption, ModelOption, check_target, write_json
from kvfold.cli.progress import share_progress
from kvfold.cli.start import start
from kvfold.quality.settings import check_profile_context

__all__ = ["EXAMPLES", "profile"]

EXAMPLES = (
    "Examples:  kvfold profile   |   kvfold profile --text notes.txt --context 4096 -o notes.html   |   "
    "kvfold profile --model ./my-model --gates my-model/gates.json --json -"
)


def _output(file: Path) -> Path:
    return check_target("--output", file)


def _gates(file: Path | None) -> Path | None:
    return None if file is None else check_target("--gates", file)


def profile(
    model: ModelOption = "bundled",
    text: CorpusOption = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a passage of the text, and of the texts to look things up in. [2048]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text in all.")] = 4096,
    recipe: Annotated[
        str,
        typer.Option(help="Its quantization error is shown; streaming heads keep its sinks and window."),
    ] = "int4",
    output: Annotated[Path, typer.Option("--output", "-o", callback=_output, help="The page to write.")] = Path(
        "profile.html"
    ),
    page: Annotated[bool, typer.Option(help="Write the page (needs matplotlib).")] = True,
    gates: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=_gates, help="Write the gates of retrieval heads as JSON.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which passages and lookups.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """See where a model's attention goes: distances, sinks, retrieval heads, budgets per head, and a recipe to try."""
    from kvfold.quality.report import require_matplotlib

    wanted = check_recipe(recipe)
    if context is not None:
        check_profile_context(context, wanted.sinks + wanted.recent)
    if page:
        require_matplotlib()
    with share_progress() as progress:
        start([wanted])
        from kvfold.quality.profile import Plan, run_profile
        from kvfold.report import profile_report

        plan = Plan(
            model=model,
            command=shlex.join(["kvfold", *sys.argv[1:]]),
            text=text,
            context=context,
            tokens=tokens,
            recipe=recipe,
            seed=seed,
            gates=gates is not None,
        )
        found = run_profile(plan, progress)
        if page:
            from kvfold.quality.profile.page import write_page

            progress("drawing", 1.0)
            write_page(found, output)
    if gates is not None and found.retrieval is not None:
        found.retrieval.gates.write(gates)
    if json_file != "-":
        profile_report(Console(), found)
    write_json(json_file, found.as_json())
    if page:
        print(f"page: {output}", file=sys.stderr)
