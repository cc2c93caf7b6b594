"""From a clause of a recipe to the method it names, with its options checked."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from kvfold.clause import Clause
from kvfold.errors import RecipeError
from kvfold.recipe import method_class
from kvfold.retention.method import RetentionMethod

if TYPE_CHECKING:
    from torch import nn

    from kvfold.geometry import Geometry
    from kvfold.recipe import Recipe

__all__ = ["build_method", "refusals"]


def refusals(recipe: Recipe, geometry: Geometry, model: nn.Module | None = None) -> list[str]:
    """Every reason why the retention of ``recipe`` cannot serve a model of this geometry, and this very ``model`` where
    one is given; RecipeError if its clause does not make sense.
    """
    if recipe.method is None:
        return []
    method = build_method(recipe.method)
    reasons = method.refusals(geometry)
    if model is not None and not reasons:
        reasons += method.model_refusals(model)
    if recipe.scales == "channel":
        reasons.append("pages with scales of channels are written whole: retention cannot move single tokens")
    if not any(layer.stores and layer.window is None for layer in geometry.layers):
        reasons.append("every layer has a window, behind which nothing is left for retention to drop")
    return reasons


def build_method(clause: Clause) -> RetentionMethod:
    """The method that ``clause`` (without the options of the rule) names.

    What stands in its brackets goes to the fields of its dataclass: clauses, in order, to those that hold a method or,
    as text, the name of a file; options to the others by name. RecipeError, with a hint, for what does not fit.
    """
    kind: type[RetentionMethod] = method_class("retention", clause, RetentionMethod)  # type: ignore[type-abstract]
    known: list[Field[Any]] = list(fields(kind)) if is_dataclass(kind) else []  # type: ignore[redundant-expr]
    positional = [field for field in known if _holds_clause(field)]
    options = {field.name: str(field.type) for field in known if not _holds_clause(field)}
    if len(clause.inner) > len(positional):
        takes = f"{len(positional)} in its brackets" if positional else "nothing but options"
        raise RecipeError(f"bad recipe clause {clause}", why=f"{clause.name} takes {takes}")
    values: dict[str, Any] = {}
    for field, part in zip(positional, clause.inner, strict=False):
        values[field.name] = build_method(part) if field.type == "RetentionMethod" else str(part)
    for field in positional[len(clause.inner) :]:
        if field.default is MISSING and field.default_factory is MISSING:
            why = f"{clause.name} builds on another method"
            raise RecipeError(f"bad recipe clause {clause}", why=why, hint=f"write {clause.name}(snapkv,keep=0.25)")
    values |= clause.typed(options, also=("keep", "budget", "every", "chunk"))
    try:
        return kind(**values)
    except ValueError as error:
        raise RecipeError(f"bad recipe clause {clause}", why=str(error)) from error


def _holds_clause(field: Field[Any]) -> bool:
    return field.type in ("RetentionMethod", "str")
