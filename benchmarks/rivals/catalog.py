"""The rivals by name. Light: neither torch nor a rival is imported before one is made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final

from kvfold.errors import RequestError, UnsupportedError

if TYPE_CHECKING:
    from benchmarks.rivals.stock import Rival
    from transformers import PreTrainedModel

__all__ = [
    "DEFAULT",
    "KNOWN",
    "PACKAGES",
    "PRESSES",
    "RATIOS",
    "REFERENCE",
    "check_installed",
    "make_rival",
    "parse_rivals",
]

REFERENCE: Final = "transformers-full"
RATIOS: Final = ("0.5", "0.75", "0.875")
_ALL_RATIOS: Final = ("0.25", *RATIOS, "0.9375")
_USUAL: Final = ("knorm", "snapkv", "expected-attention", "streamingllm", "tova", "keydiff", "adakv-snapkv")

PRESSES: Final = (
    *("random", "knorm", "streamingllm", "observed-attention", "tova", "snapkv", "pyramidkv", "keydiff"),
    *("expected-attention", "criticalkv-snapkv", "criticalkv-expected-attention", "adakv-snapkv"),
    *("adakv-expected-attention", "criticaladakv-snapkv", "criticaladakv-expected-attention", "kvzip", "duo"),
)
"""The names of kvpress's methods here."""

DEFAULT: Final = (
    REFERENCE,
    *("transformers-hqq-8bit", "transformers-hqq-4bit", "transformers-hqq-4bit-g32", "transformers-hqq-2bit"),
    *("transformers-hqq-2bit-mixed", "transformers-hqq-2bit-token-g32"),
    *("transformers-quanto-4bit", "transformers-quanto-4bit-channel", "transformers-quanto-4bit-channel-g32"),
    *("transformers-quanto-4bit-kivi-g128", "transformers-quanto-2bit", "transformers-quanto-2bit-kivi"),
    *("transformers-quanto-2bit-kivi-g32", "transformers-quanto-2bit-channel-g128", "transformers-fp8"),
    *(f"kvpress-{press}-{ratio}" for press in _USUAL for ratio in RATIOS),
    *(f"truncation-{ratio}" for ratio in RATIOS),
)
"""What runs unless told otherwise. Names without layout and group have transformers' defaults."""

KNOWN: Final = tuple(
    dict.fromkeys([*DEFAULT, *(f"kvpress-{press}-{ratio}" for press in PRESSES for ratio in _ALL_RATIOS)])
)
"""What patterns are compared with."""

PACKAGES: Final = {
    "hqq": ("hqq", "termcolor", "einops"),
    "quanto": ("optimum-quanto", "ninja"),
    "kvpress": ("kvpress", "datasets", "cachetools", "requests"),
}
"""What must be installed for which rival."""

_BITS: Final = {"hqq": (2, 4, 8), "quanto": (2, 4)}
_LAYOUTS: Final = {"hqq": ("strided", "token", "mixed"), "quanto": ("token", "channel", "kivi")}
_QUANTIZED: Final = re.compile(r"transformers-(hqq|quanto)-(\d+)bit(?:-([a-z]+))?(?:-g(\d+))?")
_DROPPING: Final = re.compile(r"(?:kvpress-([a-z0-9-]+?)|truncation)-(0\.\d+)")
_SETUP: Final = "run benchmarks/rivals/setup.sh, and take the Python it names"


@dataclass(frozen=True, slots=True)
class _Quantized:
    backend: str
    bits: int
    layout: str
    group: int


@dataclass(frozen=True, slots=True)
class _Dropping:
    press: str | None
    ratio: float


def parse_rivals(text: str) -> tuple[str, ...]:
    """Names separated by commas, each once: names or patterns (``kvpress-*``) of `KNOWN`, or names like them with
    other bits, layouts, groups and ratios. ``all`` is `DEFAULT`. RequestError for a name that means nothing.
    """
    found: dict[str, None] = {}
    for name in (part.strip() for part in text.split(",")):
        if not name:
            continue
        if name == "all":
            names: Sequence[str] = DEFAULT
        elif any(sign in name for sign in "*?["):
            names = [known for known in KNOWN if fnmatchcase(known, name)]
            if not names:
                raise RequestError(f"no rival is like {name!r}", hint="known: " + ", ".join(DEFAULT))
        else:
            _spec(name)
            names = (name,)
        found.update(dict.fromkeys(names))
    if not found:
        raise RequestError(f"bad rivals {text!r}", why="none is named", hint="known: all, " + ", ".join(DEFAULT))
    return tuple(found)


def check_installed(names: Iterable[str]) -> None:
    """UnsupportedError if a package is missing that one of the rivals needs.

    To be called before transformers is imported: with hqq but without its termcolor that fails in an odd place.
    """
    for name in names:
        spec = _spec(name)
        packages: tuple[str, ...] = ()
        if isinstance(spec, _Quantized):
            packages = PACKAGES[spec.backend]
        elif isinstance(spec, _Dropping) and spec.press is not None:
            packages = PACKAGES["kvpress"]
        if missing := [package for package in packages if not _is_installed(package)]:
            raise UnsupportedError(f"rival {name}", why=f"{', '.join(missing)} not installed", hint=_SETUP)


def make_rival(name: str, model: PreTrainedModel) -> Rival:
    """The rival of that name on a model. UnsupportedError if it cannot serve the model."""
    from benchmarks.rivals.quantized import Fp8Rival, QuantizedRival
    from benchmarks.rivals.stock import FullCache
    from benchmarks.rivals.truncated import TruncatedRival

    spec = _spec(name)
    if isinstance(spec, _Quantized):
        return QuantizedRival(model, name, spec.backend, bits=spec.bits, layout=spec.layout, group=spec.group)
    if isinstance(spec, _Dropping):
        if spec.press is None:
            return TruncatedRival(model, name, spec.ratio)
        from benchmarks.rivals.pressed import PressRival

        return PressRival(model, name, spec.press, spec.ratio)
    return FullCache(model, name) if name == REFERENCE else Fp8Rival(model, name)


def _spec(name: str) -> _Quantized | _Dropping | None:
    """What a name says; None for one that says all by itself."""
    if name in (REFERENCE, "transformers-fp8"):
        return None
    if match := _QUANTIZED.fullmatch(name):
        backend, bits, group = match[1], int(match[2]), int(match[4] or 64)
        layout = match[3] or _LAYOUTS[backend][0]
        if bits not in _BITS[backend]:
            known = ", ".join(map(str, _BITS[backend]))
            raise RequestError(f"unknown rival {name!r}", hint=f"{backend} has bits {known}")
        if layout not in _LAYOUTS[backend]:
            raise RequestError(f"unknown rival {name!r}", hint=f"{backend} has layouts {', '.join(_LAYOUTS[backend])}")
        return _Quantized(backend, bits, layout, group)
    if match := _DROPPING.fullmatch(name):
        if match[1] is not None and match[1] not in PRESSES:
            raise RequestError(f"unknown rival {name!r}", hint="presses: " + ", ".join(PRESSES))
        return _Dropping(match[1], float(match[2]))
    raise RequestError(f"unknown rival {name!r}", hint="known: all, " + ", ".join(DEFAULT))


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
