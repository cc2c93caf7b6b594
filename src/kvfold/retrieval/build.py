"""From a clause of a recipe to the retrieval method it names, with its options checked."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from kvfold.clause import Clause
from kvfold.errors import RecipeError
from kvfold.recipe import method_class
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
    kind: type[RetrievalMethod] = method_class("retrieval", clause, RetrievalMethod)  # type: ignore[type-abstract]
    if clause.inner:
        raise RecipeError(f"bad recipe clause {clause}", why=f"{clause.name} takes nothing but options")
    values = clause.typed({field.name: str(field.type) for field in fields(kind)})
    try:
        return kind(**values)  # type: ignore[arg-type]
    except ValueError as error:
        raise RecipeError(f"bad recipe clause {clause}", why=str(error)) from error
