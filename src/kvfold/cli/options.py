"""What the verbs share: options, the checks that come before any work, progress, and writing a result."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from kvfold.errors import RequestError
from kvfold.recipe import Recipe

__all__ = [
    "JsonOption",
    "ModelOption",
    "check_target",
    "counted_progress",
    "parse_names",
    "parse_recipe_list",
    "share_progress",
    "write_json",
]

_OPTION_FOLLOWS = re.compile(r"\s*\w+\s*=")
_ESTIMATE_SECONDS = 3600.0  # units of work differ in length, so that only a long look back tells the speed


def check_target(option: str, file: Path, hint: str = "name a file in a folder that exists") -> Path:
    """Refuses a file that could not be written, before the work that is to be written there."""
    folder = file.parent
    why = ""
    if file.is_dir():
        why = "it is a folder"
    elif not folder.is_dir():
        why = f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK):
        why = f"the folder {folder} cannot be written"
    if why:
        raise RequestError(f"{option} {file}", why=why, hint=hint)
    return file


def _json_target(file: str | None) -> str | None:
    if file is not None and file != "-":
        check_target("--json", Path(file), "name a file in a folder that exists, or '-' for stdout")
    return file


JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", callback=_json_target, help="Write the result as JSON; '-' for stdout."),
]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="'bundled', a directory, or a hub id.")]


def parse_recipe_list(text: str) -> list[str]:
    """The recipes of an option, each of them legal; found out before a model is loaded.

    They are separated by ``;``, or by commas: those in brackets, and those before ``option=value``, belong to a recipe.
    """
    recipes, depth = [""], 0
    for at, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        between = depth <= 0 and (sign == ";" or (sign == "," and not _OPTION_FOLLOWS.match(text, at + 1)))
        recipes[-1:] = [recipes[-1], ""] if between else [recipes[-1] + sign]
    recipes = [recipe.strip() for recipe in recipes]
    for recipe in recipes:
        Recipe.parse(recipe)
    return recipes


def parse_names(text: str) -> list[str]:
    """Names in a list separated by ``;`` or ``,``."""
    return [name.strip() for name in re.split("[;,]", text)]


@contextmanager
def _bar(total: float) -> Iterator[tuple[Progress, Any]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, speed_estimate_period=_ESTIMATE_SECONDS) as progress:
        yield progress, progress.add_task("loading", total=total)


@contextmanager
def counted_progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr if that is a terminal; the function it gives says what begins and counts one of ``steps``."""
    with _bar(steps + 1) as (progress, task):

        def say(what: str) -> None:
            progress.update(task, advance=1, description=what)

        yield say


@contextmanager
def share_progress() -> Iterator[Callable[[str, float], None]]:
    """The same for work that knows which share of it is done."""
    with _bar(1.0) as (progress, task):

        def say(what: str, share: float) -> None:
            progress.update(task, completed=share, description=what)

        yield say


def write_json(file: str | None, data: Any) -> None:
    """To a file, which is there whole or as it was, or to stdout (``-``)."""
    if file is None:
        return
    text = json.dumps(data, indent=2)
    if file == "-":
        print(text)
        return
    unfinished = Path(file).with_name(f".{Path(file).name}.{os.getpid()}")
    try:
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(file)
    except OSError as error:
        raise RequestError(f"cannot write {file}", why=error.strerror or str(error)) from error
    finally:
        unfinished.unlink(missing_ok=True)
