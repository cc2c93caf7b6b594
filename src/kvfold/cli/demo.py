"""``kvfold demo``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from kvfold.cli.options import JsonOption, ModelOption, parse_recipe_list, write_json
from kvfold.cli.progress import counted_progress
from kvfold.cli.start import start
from kvfold.recipe import Recipe

__all__ = ["EXAMPLES", "demo"]

EXAMPLES = "Examples:  kvfold demo   |   kvfold demo --recipes 'raw;int4' --json -   |   kvfold demo --answers"


def demo(
    recipes: Annotated[str | None, typer.Option(help="Recipes to compare, separated by ',' or ';'.")] = None,
    model: ModelOption = "bundled",
    tokens: Annotated[int, typer.Option(min=300, help="Length of the document.")] = 1800,
    seed: Annotated[int, typer.Option(help="Which document and facts.")] = 0,
    answers: Annotated[bool, typer.Option("--answers", help="Also list what was said to each question.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Answer questions about a long real document from a full and from folded caches, bytes and quality side by side;
    then time decoding where the cache matters, with many sequences at once.
    """
    chosen = None if recipes is None else parse_recipe_list(recipes)
    with counted_progress() as say:
        start(map(Recipe.parse, chosen or []))
        from kvfold.bench.demo import demo_speed
        from kvfold.bench_report import demo_speed_report
        from kvfold.engine.loading import load
        from kvfold.quality.demo import DEMO_RECIPES, run_demo
        from kvfold.report import demo_report

        say.steps = 1 + 2 * len({"raw", *(chosen or DEMO_RECIPES)})
        loaded, tokenizer = load(model)
        document, rows = run_demo(loaded, tokenizer, recipes=chosen, target_tokens=tokens, seed=seed, say=say)
        speed, why_not = demo_speed(loaded, [row.recipe for row in rows], seed=seed, say=say)
    if json_file != "-":
        demo_report(Console(), document, rows, answers=answers)
        demo_speed_report(Console(), speed, why_not)
    steps = {row.contestant: row.as_json() for row in speed}
    write_json(json_file, [row.as_json() | {"speed": steps.get(row.recipe)} for row in rows])
