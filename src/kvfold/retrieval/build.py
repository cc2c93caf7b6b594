"""From a clause of a recipe to the retrieval method it names, with its options checked."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import fields
from typing import TYPE_CHECKING

from kvfold.clause import Clause
from kvfold.errors import RecipeError
from kvfold.recipe import known_methods
from kvfold.retrieval.method import RetrievalMethod

if TYPE_CHECKING:
    from kvfold.geometry import Geometry
    from kvfold.recipe import Recipe

__all__ = ["build_retrieval", "retrieval_refusals"]


def retrieval_refusals(recipe: Recipe, geometry: Geometry) -> list[str]:
    """Every reason why the retrieval of ``recipe`` cannot serve a model of this geometry; RecipeError if its clause
    does not make sense.
    """
    return [] if recipe.retrieval is None else build_retrieval(recipe.retrieval).refusals(geometry)


def build_retrieval(clause: Clause) -> RetrievalMethod:
    """The method that ``clause`` names, its options in the fields of its dataclass. RecipeError, with a hint, for what
    does not fit.
    """
    known = known_methods("retrieval")
    if clause.name not in known:
        close = difflib.get_close_matches(clause.name, known, n=1, cutoff=0.5)
        hint = (f"did you mean {close[0]!r}? " if close else "") + "known: " + ", ".join(known)
        raise RecipeError(f"bad recipe clause {clause}", why=f"unknown retrieval method {clause.name!r}", hint=hint)
    if clause.inner:
        raise RecipeError(f"bad recipe clause {clause}", why=f"{clause.name} takes nothing but options")
    kind = _method_class(clause.name)
    values = clause.typed({field.name: str(field.type) for field in fields(kind)})
    try:
        return kind(**values)  # type: ignore[arg-type]
    except ValueError as error:
        raise RecipeError(f"bad recipe clause {clause}", why=str(error)) from error


def _method_class(name: str) -> type[RetrievalMethod]:
    module = importlib.import_module(f"kvfold.retrieval.methods.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, RetrievalMethod) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must have one method, and has {len(found)}")
    return found[0]
