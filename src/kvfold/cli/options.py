"""What the verbs share: options, the checks that come before torch is loaded, and writing a result."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli.methods import check_recipe
from kvfold.engine.source import find_source
from kvfold.errors import RequestError
from kvfold.quality.plans import check_dtype
from kvfold.quality.tasks import read_text

__all__ = [
    "CorpusOption",
    "JsonOption",
    "ModelOption",
    "OtherModelOption",
    "OutputOption",
    "check_dtype_option",
    "check_target",
    "check_text",
    "parse_names",
    "parse_recipe_list",
    "split_recipes",
    "write_json",
]

_OPTION_FOLLOWS = re.compile(r"\s*\w+\s*=")


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


def _model(name: str | None) -> str | None:
    if name is not None:
        find_source(name, downloaded=False)
    return name


ModelOption = Annotated[
    str, typer.Option("--model", "-m", callback=_model, help="'bundled', a directory, or a hub id.")
]
OtherModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", callback=_model, help="A real model instead: 'bundled', a directory, a hub id."),
]


def check_dtype_option(name: str | None) -> str | None:
    """``name``, which is the name of a dtype or None; RequestError otherwise."""
    return None if name is None else check_dtype(name)


def check_text(file: Path | None) -> Path | None:
    """``file``, which can be read as a text, or None; RequestError otherwise."""
    if file is not None and not read_text(file).strip():
        raise RequestError(f"text {file}", why="it is empty", hint="give a plain text file in UTF-8")
    return file


CorpusOption = Annotated[
    Path | None,
    typer.Option(callback=check_text, help="A UTF-8 text like those to be served; without one, Python's own."),
]


def _output(file: Path) -> Path:
    return check_target("--output", file)


OutputOption = Annotated[Path, typer.Option("--output", "-o", callback=_output, help="The file to write.")]


def parse_recipe_list(text: str) -> list[str]:
    """The recipes of an option, each of them legal; found out before torch is loaded."""
    recipes = split_recipes(text)
    for recipe in recipes:
        check_recipe(recipe)
    return recipes


def split_recipes(text: str) -> list[str]:
    """The texts of the recipes of an option.

    They are separated by ``;``, or by commas: those in brackets, and those before ``option=value``, belong to a recipe.
    """
    recipes, depth = [""], 0
    for at, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        between = depth <= 0 and (sign == ";" or (sign == "," and not _OPTION_FOLLOWS.match(text, at + 1)))
        recipes[-1:] = [recipes[-1], ""] if between else [recipes[-1] + sign]
    return [recipe.strip() for recipe in recipes]


def parse_names(text: str) -> list[str]:
    """Names in a list separated by ``;`` or ``,``."""
    return [name.strip() for name in re.split("[;,]", text)]


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
