"""Which recipe of ours and which press of kvpress are one method, and what their names are for a share kept. Light: no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Final

from kvfold.errors import RequestError

__all__ = ["KEEPS", "METHODS", "Method", "choose", "parse_keeps", "with_recipes"]

KEEPS: Final = (0.75, 0.5, 0.25, 0.125, 0.0625)
"""Shares of a context that are kept, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Method:
    """``recipe``: our text, with ``{base}`` for what packs the tokens that stay and ``{keep}`` for their share.
    ``press``: kvpress's name for it among the rivals; None where there is none.
    """

    name: str
    recipe: str
    press: str | None

    def ours(self, keep: float, base: str) -> str:
        """The recipe that keeps this share."""
        return self.recipe.format(base=base, keep=f"{keep:g}")

    def theirs(self, keep: float) -> str | None:
        """The rival that keeps this share."""
        return None if self.press is None else f"kvpress-{self.press}-{1 - keep:g}"


def _built(name: str, clause: str, press: str | None) -> Method:
    """A method whose recipe has ``clause``, with an open bracket for its options."""
    return Method(name, "{base}+" + clause + "keep={keep})", press)


METHODS: Final = (
    _built("random", "random(", "random"),
    _built("streaming", "streaming(", "streamingllm"),
    _built("keydiff", "keydiff(", "keydiff"),
    _built("h2o", "h2o(", "observed-attention"),
    _built("tova", "tova(", "tova"),
    _built("snapkv", "snapkv(", "snapkv"),
    _built("pyramidkv", "pyramidkv(", "pyramidkv"),
    _built("expected", "expected_attention(", "expected-attention"),
    _built("criticalkv", "criticalkv(snapkv,", "criticalkv-snapkv"),
    _built("adakv", "adakv(snapkv,", "adakv-snapkv"),
    _built("adakv-expected", "adakv(expected_attention,", "adakv-expected-attention"),
    _built("criticaladakv", "adakv(criticalkv(snapkv),", "criticaladakv-snapkv"),
    _built("kvzip", "kvzip(", "kvzip"),
    _built("duo", "duo(", "duo"),
    _built("learned", "learned(", None),
    _built("keepkv", "keepkv(snapkv,", None),
    _built("attention-matching", "attention_matching(", None),
)
"""In the order of the table."""


def choose(patterns: str, methods: Sequence[Method] = METHODS) -> tuple[Method, ...]:
    """The methods that one of the patterns fits, which are separated by commas; ``none`` is none. RequestError for a
    pattern that fits none.
    """
    if patterns.strip() == "none":
        return ()
    wanted = [part.strip() for part in patterns.split(",") if part.strip()]
    for pattern in wanted or [patterns]:
        if not any(fnmatchcase(method.name, pattern) for method in methods):
            known = ", ".join(method.name for method in methods)
            raise RequestError(f"no method is like {pattern!r}", hint=f"known: none, {known}; '*' for all")
    return tuple(method for method in methods if any(fnmatchcase(method.name, pattern) for pattern in wanted))


def with_recipes(given: Sequence[str], methods: Sequence[Method] = METHODS) -> tuple[Method, ...]:
    """``methods`` with other recipes for some, given as ``NAME=TEXT``; a new name is a method without a press."""
    found: Mapping[str, Method] = {method.name: method for method in methods}
    for text in given:
        name, sign, recipe = text.partition("=")
        if not sign or not name or not recipe:
            raise RequestError(f"bad method {text!r}", hint="NAME=RECIPE, with {base} and {keep} in the recipe")
        try:
            recipe.format(base="raw", keep="0.5")
        except (KeyError, IndexError, ValueError) as error:
            raise RequestError(
                f"bad method {text!r}", why=f"{error} in braces", hint="only {base} and {keep} have a meaning"
            ) from error
        found = {**found, name: replace(found.get(name, Method(name, recipe, None)), recipe=recipe)}
    return tuple(found.values())


def parse_keeps(text: str) -> tuple[float, ...]:
    """Shares between 0 and 1, separated by commas, each once."""
    try:
        keeps = tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise RequestError(f"bad shares {text!r}", why=str(error), hint="numbers such as 0.5,0.25") from error
    if not keeps or not all(0 < keep < 1 for keep in keeps):
        raise RequestError(f"bad shares {text!r}", hint="numbers between 0 and 1 are needed")
    return keeps
