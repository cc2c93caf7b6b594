"""Clauses of a recipe: ``name(inner, key=value)``, as in ``adakv(kvzip,keep=0.2)``. Text and data are inverse."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvfold.errors import RecipeError

__all__ = ["Clause"]

_NAME = re.compile(r"[^\s(),=+;]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)

Value = int | float | str


@dataclass(frozen=True, slots=True)
class Clause:
    """A word with what stands in its brackets: further clauses (methods it builds on, files) and options.

    ``options`` are sorted by name; numbers are numbers, everything else is text.
    """

    name: str
    inner: tuple[Clause, ...] = ()
    options: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Clause:
        """The clause that ``text`` describes. RecipeError if it cannot be read, or gives an option twice."""
        name, bracket, rest = text.strip().partition("(")
        name = name.strip()
        if not _NAME.fullmatch(name) or (bracket and not rest.rstrip().endswith(")")):
            hint = "write name, name(option=value), or name(inner,option=value)"
            raise RecipeError(f"bad recipe clause {text!r}", why="it cannot be read", hint=hint)
        inner: list[Clause] = []
        options: dict[str, Value] = {}
        for part in _parts(rest.rstrip()[:-1]) if bracket else ():
            key, equals, value = (x.strip() for x in part.partition("="))
            if not equals or "(" in key:
                inner.append(cls.parse(part))
            elif key in options:
                raise RecipeError(f"bad recipe clause {text!r}", why=f"option {key!r} is given twice")
            elif not _NAME.fullmatch(key) or not _NAME.fullmatch(value):
                raise RecipeError(f"bad recipe clause {text!r}", why=f"option {part.strip()!r} cannot be read")
            else:
                options[key] = _value(value)
        return cls(name, tuple(inner), tuple(sorted(options.items())))

    def __str__(self) -> str:
        parts = [*map(str, self.inner), *(f"{key}={_text(value)}" for key, value in self.options)]
        return f"{self.name}({','.join(parts)})" if parts else self.name

    def without(self, *keys: str) -> Clause:
        """The same clause without these options."""
        return Clause(self.name, self.inner, tuple(item for item in self.options if item[0] not in keys))

    def option_map(self) -> Mapping[str, Value]:
        """The options by name."""
        return dict(self.options)

    def typed(self, known: Mapping[str, str], also: Sequence[str] = ()) -> dict[str, int | float]:
        """The options by name, as numbers of the ``known`` types (``"int"``, ``"float"``). RecipeError for an option
        that is not known (``also``: others that are, for its hint) and for what is no such number.
        """
        values: dict[str, int | float] = {}
        for name, value in self.options:
            if name not in known:
                hint = "known: " + (", ".join([*also, *known]) or "none")
                raise RecipeError(f"bad recipe clause {self}", why=f"unknown option {name!r}", hint=hint)
            whole = known[name] == "int"
            if isinstance(value, str) or (whole and not isinstance(value, int)):
                kind = "a whole number" if whole else "a number"
                raise RecipeError(f"bad recipe clause {self}", why=f"{name} is {kind}, not {value!r}")
            values[name] = value if whole else float(value) if known[name] == "float" else value
        return values


def _parts(text: str) -> list[str]:
    """``text`` cut at the commas outside of brackets; none if it is blank."""
    parts, depth, start = [], 0, 0
    for at, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if sign == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return parts if text.strip() else []


def _value(text: str) -> Value:
    if _NUMBER.fullmatch(text) is None:
        return text
    return int(text) if re.fullmatch(r"[+-]?\d+", text, re.ASCII) else float(text)


def _text(value: Value) -> str:
    return repr(value) if isinstance(value, float) else str(value)
