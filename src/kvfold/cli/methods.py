"""The options that methods in recipes take, read off their source, so that a recipe is checked without torch.

A method is a dataclass in a file of its own (``retention/methods``, ``retrieval/methods``) that builds on a class of
``method.py`` beside that folder. Its fields are its options, its methods and its files.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Final

import kvfold
from kvfold.clause import Clause
from kvfold.errors import ModelError, RecipeError
from kvfold.recipe import METHOD_FILES, Recipe, known_methods

__all__ = ["check_recipe", "method_fields"]

_RULE_OPTIONS: Final = ("keep", "budget", "every", "chunk")
_FILES: Final = {
    "calibrated": ("calibration", "kvfold calibrate --model MODEL --text FILE -o calibration.safetensors"),
    "duo": ("gates", "kvfold profile --model MODEL --gates gates.json"),
    "learned": ("scorer", "kvfold train-retention --model MODEL --text FILE -o scorer.safetensors"),
}
"""Word of a recipe that names a file: what the file holds, and the command that makes it."""


def check_recipe(text: str) -> Recipe:
    """The recipe that ``text`` describes, its methods' options and the files it names looked at. RecipeError or
    ModelError for what cannot be.
    """
    recipe = Recipe.parse(text)
    if recipe.calibration:
        _check_file("calibrated", recipe.calibration)
    if recipe.method is not None:
        _check_clause("retention", recipe.method, _RULE_OPTIONS)
    if recipe.retrieval is not None:
        _check_clause("retrieval", recipe.retrieval)
    return recipe


@cache
def method_fields(axis: str, name: str) -> dict[str, str]:
    """The fields of the method ``name`` of ``axis`` (``retention`` or ``retrieval``) and their types, as written."""
    room = Path(kvfold.__file__).parent / axis
    classes = {**_classes(room / "method.py"), **_classes(room / "methods" / f"{name}.py")}
    own = next(node for node in _classes(room / "methods" / f"{name}.py").values() if _is_dataclass(node))
    chain = [own]
    while bases := [base.id for base in chain[-1].bases if isinstance(base, ast.Name) and base.id in classes]:
        chain.append(classes[bases[0]])
    found: dict[str, str] = {}
    for node in reversed(chain):
        for line in node.body if _is_dataclass(node) else ():
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                kind = ast.unparse(line.annotation)
                if not kind.startswith("ClassVar"):
                    found[line.target.id] = kind
    return found


def _classes(file: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _check_clause(axis: str, clause: Clause, also: tuple[str, ...] = ()) -> None:
    fields = method_fields(axis, clause.name)
    builds_on = [name for name, kind in fields.items() if kind == "RetentionMethod"]
    files = [name for name, kind in fields.items() if kind == "str"]
    clause.typed({name: kind for name, kind in fields.items() if name not in (*builds_on, *files)}, also)
    if len(clause.inner) > len(builds_on) + len(files):
        takes = f"{len(builds_on) + len(files)} in its brackets" if builds_on or files else "nothing but options"
        raise RecipeError(f"bad recipe clause {clause}", why=f"{clause.name} takes {takes}")
    for inner in clause.inner:
        if clause.name in METHOD_FILES:
            _check_file(clause.name, str(inner))
        elif inner.name not in known_methods(axis):
            why, hint = f"unknown {axis} method {inner.name!r}", "known: " + ", ".join(known_methods(axis))
            raise RecipeError(f"bad recipe clause {clause}", why=why, hint=hint)
        else:
            _check_clause(axis, inner, also)


def _check_file(word: str, name: str) -> None:
    what, command = _FILES[word]
    if not Path(name).is_file():
        raise ModelError(f"no {what} at {name!r}", why="no such file", hint=f"make it: {command}")
