"""The recipe: one frozen description of what becomes of the cache, with a one-line text form for people.

``Recipe.parse(text)`` and ``str(recipe)`` are inverse. The grammar::

    recipe  = word [ ":calibrated" [ "(" file ")" ] ] { "," option "=" value } { "+" clause }
    word    = "raw" | "int8" | "int4" | "int2" | "k" bits "v" bits
    bits    = 16 | 8 | 4 | 2   (16: that side stays raw)
    option  = "sinks" | "recent" | "block" | "group" | "rotation" | "scales"
    clause  = method [ "(" { clause | option "=" value } ")" ]

With ``:calibrated``, bits are the average over all dims and layers, in eighths: ``int2.5:calibrated``. A clause names a
method of retention (a file of ``retention/methods``; its outermost brackets say ``keep`` or ``budget``) or of retrieval
(a file of ``retrieval/methods``), one of each at most; a word that is not known is refused by name, never ignored.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import pkgutil
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Final, Literal, Protocol, TypeVar

from kvfold.clause import Clause
from kvfold.errors import RecipeError
from kvfold.formats import Rotation, Scales, VectorFormat
from kvfold.rule import KeepRule

__all__ = ["CALIBRATION_FILE", "METHOD_FILES", "Recipe", "known_methods", "method_class"]

CALIBRATION_FILE: Final = "calibration.safetensors"
"""The calibration that lies beside a model's weights, which ``:calibrated`` without a file means."""

METHOD_FILES: Final = {"duo": "gates.json", "learned": "scorer.safetensors"}
"""Methods that read a file: the one beside a model's weights, which the bare word means."""

_RAW_WIDTH: Final = 16  # how the text form writes "not quantized" in kXvY
_BITS: Final = (8, 4, 2)
_WORDS: Final = ("raw", "int8", "int4", "int2", "kXvY")
_LEAST_BITS: Final = 0.5  # of a calibrated side
_ROTATIONS: Final[tuple[Rotation, ...]] = ("hadamard", "none")
_SCALES: Final[tuple[Scales, ...]] = ("token", "channel")
_CHOICES: Final[dict[str, tuple[str, ...]]] = {"rotation": _ROTATIONS, "scales": _SCALES}
"""Options that take one of a few words."""

_OPTIONS: Final = {
    "sinks": "sinks",
    "recent": "recent",
    "block": "block_size",
    "group": "group",
    "rotation": "rotation",
    "scales": "scales",
}
"""Option word -> field of the recipe, in the order in which ``str`` writes them."""

_AXES: Final[tuple[Literal["retention", "retrieval"], ...]] = ("retention", "retrieval")
"""Fields of the recipe that hold a clause; also the rooms whose ``methods`` folder has a file for each of its words."""

_RULE_OPTIONS: Final = ("keep", "budget", "every", "chunk")
"""Options of a retention clause that every method has: see :class:`~kvfold.rule.KeepRule`."""

_DECODING_STRIDE: Final = 64
"""``every`` of a recipe that gives a ``budget``, unless it says otherwise."""

_LIMITS: Final = {"sinks": (0, 2**20), "recent": (0, 2**30), "block_size": (1, 1024), "group": (1, 2**16)}
_IN_BRACKETS: Final = r"(?:[^()]|\([^()]*\))*"
_PIECE: Final = re.compile(rf"\s*([,:]?)\s*([^,:()]*?)\s*(\({_IN_BRACKETS}\))?\s*(?=[,:]|$)", re.DOTALL)


class _Geometry(Protocol):
    """The part of :class:`kvfold.geometry.Geometry` a recipe asks."""

    def unsupported(self, recipe: Recipe | None = None) -> list[str]: ...


def _unknown(kind: str, word: str, known: Iterable[str], text: str) -> RecipeError:
    """The error for a word outside the grammar: names it, the known ones, and a close match if there is one."""
    return RecipeError(f"bad recipe {text!r}", why=f"unknown {kind} {word!r}", hint=_suggested(word, known))


def _suggested(word: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    listing = "known: " + ", ".join(known)
    return f"did you mean {close[0]!r}? {listing}" if close else listing


@dataclass(frozen=True, slots=True)
class Recipe:
    """What becomes of the cache. The default is the raw cache.

    ``k_bits``, ``v_bits``: width of a packed code (8, 4, 2), None keeps that side in the model dtype. ``rotation``: the
    orthogonal basis codes are taken in. ``sinks``, ``recent``: tokens at the start and at the end of a sequence that
    stay raw. ``block_size``: tokens a block holds. ``group``: dims sharing one scale and zero (at most the head dim).
    ``scales``: whether keys have these for each token, as values do, or for each channel of a block. ``calibration``: a
    file that ``kvfold calibrate`` made, whose bases take the place of the rotation, with ``k_bits`` and ``v_bits`` as
    averages; ``""`` means the one beside the model's weights (see :meth:`located`). ``retention``: the method that
    chooses which tokens stay, its options ``keep`` or ``budget``, ``every`` and ``chunk`` included (see :attr:`rule`);
    ``retrieval``: the method that chooses which pages a step reads.
    """

    k_bits: float | None = None
    v_bits: float | None = None
    rotation: Rotation = "hadamard"
    sinks: int = 4
    recent: int = 64
    block_size: int = 32
    group: int = 128
    calibration: str | None = None
    scales: Scales = "token"
    retention: Clause | None = None
    retrieval: Clause | None = None

    def __post_init__(self) -> None:
        for side, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if self.calibration is not None:
                if bits is None or not _LEAST_BITS <= bits <= max(_BITS) or bits * 8 % 1:
                    why = "calibrated keys and values take an average from 0.5 to 8 bits, in eighths"
                    raise RecipeError(f"bad recipe field {side}={bits!r}", why=why)
            elif bits is not None and (isinstance(bits, bool) or bits not in _BITS):
                hint = "use 8, 4 or 2, None keeps it raw; other averages need a calibration"
                raise RecipeError(f"bad recipe field {side}={bits!r}", hint=hint)
        if self.calibration is not None and (self.rotation, self.group, self.scales) != ("hadamard", 128, "token"):
            why = "calibrated codes bring their own basis and have one scale a token"
            raise RecipeError("bad recipe: rotation, group, scales with a calibration", why=why, hint="leave them out")
        file = self.calibration
        if file is not None and (file != str(file).strip() or not re.fullmatch(_IN_BRACKETS, file)):
            why = "it must be the name of a file without spaces at its ends, its brackets in pairs"
            raise RecipeError(f"bad recipe field calibration={file!r}", why=why)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise RecipeError(f"bad recipe field {name}={getattr(self, name)!r}", hint="use " + " or ".join(known))
        if self.scales == "channel" and self.k_bits is None:
            why = "only keys have scales of channels, and these keys are not packed"
            raise RecipeError("bad recipe field scales='channel'", why=why, hint="leave it out")
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise RecipeError(
                    f"bad recipe field {name}={value!r}", why=f"it must be an integer from {low} to {high}"
                )
        for axis in _AXES:
            clause = getattr(self, axis)
            if clause is not None and clause.name not in known_methods(axis):
                raise _unknown(f"{axis} method", clause.name, known_methods(axis), str(clause))
        if self.retention is not None:
            _rule_of(self.retention)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe that ``text`` describes; RecipeError names the first word that is not understood."""
        plain, *clauses = _cut_clauses(text)
        pieces = _split(plain, text)
        (_, head, args), rest = pieces[0], pieces[1:]
        if args:
            raise RecipeError(f"bad recipe {text!r}", why=f"{head!r} takes no arguments")
        calibrated = any(mark == ":" for mark, _, _ in rest)
        k_bits, v_bits = _parse_bits(head, text, calibrated)
        values: dict[str, int | str | Clause] = {}
        for mark, body, args in rest:
            if mark == ":" and body != "calibrated":
                raise _unknown("calibration word", body, ("calibrated",), text)
            if mark == ",":
                if args:
                    raise RecipeError(f"bad recipe {text!r}", why=f"option {body!r} takes no arguments")
                name, value = _parse_option(body, text)
            else:
                name, value = "calibration", args[1:-1].strip()
            if name in values:
                raise RecipeError(f"bad recipe {text!r}", why=f"{body.split('=')[0].strip()!r} is given twice")
            values[name] = value
        for part in clauses:
            clause = Clause.parse(part)
            axis = _axis_of(clause, text)
            if axis in values:
                why = f"{values[axis]} and {clause} are both of {axis}"
                raise RecipeError(
                    f"bad recipe {text!r}", why=why, hint="methods combine in brackets: adakv(snapkv,keep=0.25)"
                )
            values[axis] = clause
        return cls(k_bits=k_bits, v_bits=v_bits, **values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.k_bits == self.v_bits:
            word = "raw" if self.k_bits is None else f"int{self.k_bits:g}"
        else:
            word = f"k{self.k_bits or _RAW_WIDTH:g}v{self.v_bits or _RAW_WIDTH:g}"
        if self.calibration is not None:
            word += f":calibrated({self.calibration})" if self.calibration else ":calibrated"
        defaults = {field.name: field.default for field in fields(self)}
        options = [
            f"{option}={getattr(self, name)}"
            for option, name in _OPTIONS.items()
            if getattr(self, name) != defaults[name]
        ]
        clauses = [getattr(self, axis) for axis in _AXES]
        return "+".join([",".join([word, *options]), *(str(clause) for clause in clauses if clause is not None)])

    @classmethod
    def of(cls, recipe: Recipe | str, folder: str | Path | None) -> Recipe:
        """``recipe``, or the one that a text describes, located in the folder of a model, if it has one."""
        found = cls.parse(recipe) if isinstance(recipe, str) else recipe
        return found.located(folder) if folder else found

    def located(self, folder: str | Path) -> Recipe:
        """This recipe, with the files in a model's ``folder``, where there are such, in place of unnamed ones: the
        calibration, and those that retention methods read.
        """
        beside, file = Path(folder), Path(folder) / CALIBRATION_FILE
        calibration = str(file) if self.calibration == "" and file.is_file() else self.calibration
        retention = None if self.retention is None else _located(self.retention, beside)
        return replace(self, calibration=calibration, retention=retention)

    @property
    def rule(self) -> KeepRule | None:
        """When retention runs and how much it leaves; None without retention."""
        return None if self.retention is None else _rule_of(self.retention)

    @property
    def method(self) -> Clause | None:
        """The retention method alone, without the options of the rule."""
        return None if self.retention is None else self.retention.without(*_RULE_OPTIONS)

    @property
    def is_raw(self) -> bool:
        """Whether every number stays in the model dtype, so that nothing is ever packed."""
        return self.k_bits is None and self.v_bits is None

    def packed_format(self, dim: int, bits: float | None, dtype_bytes: int, scales: Scales = "token") -> VectorFormat:
        """How a vector of ``dim`` numbers is kept in a packed page at ``bits`` (``k_bits`` or ``v_bits``); None: as
        it is. ``scales``: the recipe's, for keys.
        """
        if bits is None:
            return VectorFormat.raw(dim, dtype_bytes)
        return VectorFormat(dim, int(bits), quantized=True, group=self.group, rotation=self.rotation, scales=scales)

    def supports(self, geometry: _Geometry) -> list[str]:
        """Every reason why this recipe cannot serve a model of this geometry; empty when it can."""
        return list(geometry.unsupported(self))

    def fingerprint(self) -> bytes:
        """32 bytes that are equal exactly for equal recipes, for keys of stored blocks."""
        return hashlib.sha256(str(self).encode()).digest()


@cache
def known_methods(axis: str) -> tuple[str, ...]:
    """The words of ``retention`` or ``retrieval``: the files of its ``methods`` folder."""
    folder = Path(__file__).parent / axis / "methods"
    return tuple(sorted(module.name for module in pkgutil.iter_modules([str(folder)])))


_T = TypeVar("_T")


def method_class(axis: str, clause: Clause, base: type[_T]) -> type[_T]:
    """The subclass of ``base`` in the file that ``clause`` names, of the ``methods`` folder of ``axis``; RecipeError,
    with a hint, if there is no such file.
    """
    if clause.name not in known_methods(axis):
        why, hint = f"unknown {axis} method {clause.name!r}", _suggested(clause.name, known_methods(axis))
        raise RecipeError(f"bad recipe clause {clause}", why=why, hint=hint)
    module = importlib.import_module(f"kvfold.{axis}.methods.{clause.name}")
    own = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    found = [x for x in own if issubclass(x, base)]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must have one method, and has {len(found)}")
    return found[0]


def _axis_of(clause: Clause, text: str) -> Literal["retention", "retrieval"]:
    for axis in _AXES:
        if clause.name in known_methods(axis):
            return axis
    raise _unknown("word", clause.name, [word for axis in _AXES for word in known_methods(axis)], text)


def _rule_of(clause: Clause) -> KeepRule:
    """The rule that the options of a retention clause give; RecipeError if they make no sense."""
    options = clause.option_map()
    keep, budget = options.get("keep"), options.get("budget")
    if (keep is None) == (budget is None):
        hint = f"write {clause.name}(keep=0.25), a share, or {clause.name}(budget=512), tokens"
        raise RecipeError(f"bad recipe clause {clause}", why="it needs one of keep and budget", hint=hint)
    if keep is not None and (isinstance(keep, str) or not 0 < keep <= 1):
        raise RecipeError(f"bad recipe clause {clause}", why="keep is a share above 0 and at most 1")
    for name in _RULE_OPTIONS[1:]:
        value = options.get(name, 1)
        if not isinstance(value, int) or value < (1 if name == "budget" else 0):
            raise RecipeError(f"bad recipe clause {clause}", why=f"{name} is a whole number of tokens, not {value!r}")
    if any(name in part.option_map() for part in _nested(clause) for name in _RULE_OPTIONS):
        why = f"{', '.join(_RULE_OPTIONS)} belong in the outermost brackets"
        raise RecipeError(f"bad recipe clause {clause}", why=why)
    every, chunk = options.get("every", _DECODING_STRIDE if budget else 0), options.get("chunk", 0)
    share = None if keep is None else float(keep)
    return KeepRule(share, None if budget is None else int(budget), every=int(every), chunk=int(chunk))


def _located(clause: Clause, folder: Path) -> Clause:
    """``clause``, and those in its brackets, with the files of ``folder`` that they need and do not name."""
    name = METHOD_FILES.get(clause.name)
    if name is not None and not clause.inner and (folder / name).is_file():
        return replace(clause, inner=(Clause(str(folder / name)),))
    return replace(clause, inner=tuple(_located(part, folder) for part in clause.inner))


def _nested(clause: Clause) -> Iterable[Clause]:
    for part in clause.inner:
        yield part
        yield from _nested(part)


def _cut_clauses(text: str) -> list[str]:
    """``text`` cut at each ``+`` outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, sign in enumerate(text):
        depth += (sign == "(") - (sign == ")")
        if sign == "+" and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]


def _split(plain: str, text: str) -> list[tuple[str, str, str]]:
    """``plain``, the part of ``text`` before its clauses, cut before each ``,`` and ``:`` outside parentheses: (mark,
    body, "(args)" or "").
    """
    if not text.strip():
        raise RecipeError(f"bad recipe {text!r}", why="it is empty", hint="known: " + ", ".join(_WORDS))
    pieces: list[tuple[str, str, str]] = []
    at = 0
    while at < len(plain) or not pieces:
        match = _PIECE.match(plain, at)
        if match is None or match.end() == at or not match[2] or bool(match[1]) != bool(pieces):
            raise RecipeError(
                f"bad recipe {text!r}",
                why=f"cannot read it from {(plain or text)[at:]!r} on",
                hint="write a word, then options: int4,sinks=4,recent=64",
            )
        pieces.append((match[1], match[2], match[3] or ""))
        at = match.end()
    return pieces


def _parse_bits(word: str, text: str, calibrated: bool) -> tuple[float | None, float | None]:
    """(k_bits, v_bits) of the first word."""
    if word == "raw" and not calibrated:
        return None, None
    number = r"([0-9]+(?:\.[0-9]+)?)"
    match = re.fullmatch(f"int{number}|k{number}v{number}", word, re.ASCII)
    if match is None:
        if word == "raw":
            raise RecipeError(f"bad recipe {text!r}", why="raw keys and values take no calibration")
        raise _unknown("word", word, _WORDS, text)
    both, *sides = match.groups()
    widths = [float(both)] * 2 if both else [float(side) for side in sides]
    if calibrated:
        return widths[0], widths[1]
    if any(width not in ((*_BITS, _RAW_WIDTH) if not both else _BITS) for width in widths):
        hint = "kXvY with X and Y of 16, 8, 4, 2; other averages with :calibrated"
        raise _unknown("word", word, (*_WORDS[:-1], hint), text)
    k_bits, v_bits = (None if width == _RAW_WIDTH else int(width) for width in widths)
    return k_bits, v_bits


def _parse_option(body: str, text: str) -> tuple[str, int | str]:
    """(field, value) of ``option=value``."""
    option, equals, value = (part.strip() for part in body.partition("="))
    if option not in _OPTIONS:
        raise _unknown("option", option, _OPTIONS, text)
    if not equals or not value:
        raise RecipeError(f"bad recipe {text!r}", why=f"option {option!r} has no value", hint=f"write {option}=...")
    if option in _CHOICES:
        if value not in _CHOICES[option]:
            raise _unknown(option, value, _CHOICES[option], text)
        return option, value
    if re.fullmatch(r"[0-9]{1,12}", value, re.ASCII) is None:
        raise RecipeError(f"bad recipe {text!r}", why=f"option {option!r} needs a whole number, not {value!r}")
    return _OPTIONS[option], int(value)
