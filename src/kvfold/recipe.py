"""The recipe: one frozen description of what becomes of the cache, with a one-line text form for people.

``Recipe.parse(text)`` and ``str(recipe)`` are inverse. The grammar::

    recipe  = word { "," option "=" value } word    = "raw" | "int8" | "int4" | "int2" | "k" bits "v" bits        bits
    = 16 | 8 | 4 | 2   (16: that side stays raw) option  = "sinks" | "recent" | "block" | "group" | "rotation"

``+word(args)`` and ``:word`` are kept free for further axes; a word that is not known is refused by name, never
ignored.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Final, Protocol

from kvfold.errors import RecipeError
from kvfold.formats import Rotation, VectorFormat

__all__ = ["Recipe"]

_RAW_WIDTH: Final = 16  # how the text form writes "not quantized" in kXvY
_BITS: Final = (8, 4, 2)
_WORDS: Final = ("raw", "int8", "int4", "int2", "kXvY")
_ROTATIONS: Final[tuple[Rotation, ...]] = ("hadamard", "none")
_OPTIONS: Final = {
    "sinks": "sinks",
    "recent": "recent",
    "block": "block_size",
    "group": "group",
    "rotation": "rotation",
}
"""Option word -> field of the recipe, in the order in which ``str`` writes them."""

_LIMITS: Final = {"sinks": (0, 2**20), "recent": (0, 2**30), "block_size": (1, 1024), "group": (1, 2**16)}
_PIECE: Final = re.compile(r"\s*([,:+]?)\s*([^,:+()]*?)\s*(\([^()]*\))?\s*(?=[,:+]|$)", re.DOTALL)


class _Geometry(Protocol):
    """The part of :class:`kvfold.geometry.Geometry` a recipe asks."""

    def unsupported(self) -> list[str]: ...


def _unknown(kind: str, word: str, known: Iterable[str], text: str) -> RecipeError:
    """The error for a word outside the grammar: names it, the known ones, and a close match if there is one."""
    known = list(known)
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    listing = "known: " + ", ".join(known)
    hint = f"did you mean {close[0]!r}? {listing}" if close else listing
    return RecipeError(f"bad recipe {text!r}", why=f"unknown {kind} {word!r}", hint=hint)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What becomes of the cache. The default is the raw cache.

    ``k_bits``, ``v_bits``: width of a packed code (8, 4, 2), None keeps that side in the model dtype. ``rotation``:
    the orthogonal basis codes are taken in. ``sinks``, ``recent``: tokens at the start and at the end of a sequence
    that stay raw. ``block_size``: tokens a block holds. ``group``: dims sharing one scale and zero (at most the head
    dim).
    """

    k_bits: int | None = None
    v_bits: int | None = None
    rotation: Rotation = "hadamard"
    sinks: int = 4
    recent: int = 64
    block_size: int = 32
    group: int = 128

    def __post_init__(self) -> None:
        for side, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if bits is not None and (isinstance(bits, bool) or bits not in _BITS):
                raise RecipeError(f"bad recipe field {side}={bits!r}", hint="use 8, 4 or 2; None keeps it raw")
        if self.rotation not in _ROTATIONS:
            raise RecipeError(f"bad recipe field rotation={self.rotation!r}", hint="use " + " or ".join(_ROTATIONS))
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise RecipeError(
                    f"bad recipe field {name}={value!r}", why=f"it must be an integer from {low} to {high}"
                )

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe that ``text`` describes; RecipeError names the first word that is not understood."""
        pieces = _split(text)
        (_, head, args), rest = pieces[0], pieces[1:]
        if args:
            raise RecipeError(f"bad recipe {text!r}", why=f"{head!r} takes no arguments")
        k_bits, v_bits = _parse_bits(head, text)
        values: dict[str, int | str] = {}
        for mark, body, args in rest:
            if mark == "+":
                raise _unknown("word", body, _WORDS, text)
            if mark == ":":
                raise _unknown("calibration word", body, (), text)
            if args:
                raise RecipeError(f"bad recipe {text!r}", why=f"option {body!r} takes no arguments")
            name, value = _parse_option(body, text)
            if name in values:
                raise RecipeError(f"bad recipe {text!r}", why=f"option {body.split('=')[0].strip()!r} is given twice")
            values[name] = value
        return cls(k_bits=k_bits, v_bits=v_bits, **values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.k_bits == self.v_bits:
            word = "raw" if self.k_bits is None else f"int{self.k_bits}"
        else:
            word = f"k{self.k_bits or _RAW_WIDTH}v{self.v_bits or _RAW_WIDTH}"
        defaults = {field.name: field.default for field in fields(self)}
        options = [
            f"{option}={getattr(self, name)}"
            for option, name in _OPTIONS.items()
            if getattr(self, name) != defaults[name]
        ]
        return ",".join([word, *options])

    @property
    def is_raw(self) -> bool:
        """Whether every number stays in the model dtype, so that nothing is ever packed."""
        return self.k_bits is None and self.v_bits is None

    def packed_format(self, dim: int, bits: int | None, dtype_bytes: int) -> VectorFormat:
        """How a vector of ``dim`` numbers is kept in a packed page at ``bits`` (``k_bits`` or ``v_bits``); None: as
        it is.
        """
        if bits is None:
            return VectorFormat.raw(dim, dtype_bytes)
        return VectorFormat(dim=dim, bits=bits, quantized=True, group=self.group, rotation=self.rotation)

    def supports(self, geometry: _Geometry) -> list[str]:
        """Every reason why this recipe cannot serve a model of this geometry; empty when it can."""
        return list(geometry.unsupported())

    def fingerprint(self) -> bytes:
        """32 bytes that are equal exactly for equal recipes, for keys of stored blocks."""
        return hashlib.sha256(str(self).encode()).digest()


def _split(text: str) -> list[tuple[str, str, str]]:
    """``text`` cut before each ``,``, ``:`` and ``+`` outside parentheses: (mark, body, "(args)" or "")."""
    if not text.strip():
        raise RecipeError(f"bad recipe {text!r}", why="it is empty", hint="known: " + ", ".join(_WORDS))
    pieces: list[tuple[str, str, str]] = []
    at = 0
    while at < len(text):
        match = _PIECE.match(text, at)
        if match is None or match.end() == at or not match[2] or bool(match[1]) != bool(pieces):
            raise RecipeError(
                f"bad recipe {text!r}",
                why=f"cannot read it from {text[at:]!r} on",
                hint="write a word, then options: int4,sinks=4,recent=64",
            )
        pieces.append((match[1], match[2], match[3] or ""))
        at = match.end()
    return pieces


def _parse_bits(word: str, text: str) -> tuple[int | None, int | None]:
    """(k_bits, v_bits) of the first word."""
    if word == "raw":
        return None, None
    if word in ("int8", "int4", "int2"):
        return int(word[3:]), int(word[3:])
    match = re.fullmatch(r"k([0-9]+)v([0-9]+)", word, re.ASCII)
    if match is None:
        raise _unknown("word", word, _WORDS, text)
    widths = [None if width == str(_RAW_WIDTH) else int(width) for width in match.groups()]
    if any(width is not None and width not in _BITS for width in widths):
        raise _unknown("word", word, (*_WORDS[:-1], "kXvY with X and Y of 16, 8, 4, 2"), text)
    return widths[0], widths[1]


def _parse_option(body: str, text: str) -> tuple[str, int | str]:
    """(field, value) of ``option=value``."""
    option, equals, value = (part.strip() for part in body.partition("="))
    if option not in _OPTIONS:
        raise _unknown("option", option, _OPTIONS, text)
    if not equals or not value:
        raise RecipeError(f"bad recipe {text!r}", why=f"option {option!r} has no value", hint=f"write {option}=...")
    if option == "rotation":
        if value not in _ROTATIONS:
            raise _unknown("rotation", value, _ROTATIONS, text)
        return option, value
    if re.fullmatch(r"[0-9]{1,12}", value, re.ASCII) is None:
        raise RecipeError(f"bad recipe {text!r}", why=f"option {option!r} needs a whole number, not {value!r}")
    return _OPTIONS[option], int(value)
