"""How much each KV head needs far tokens: the gates of retrieval heads, as a file.

A gate of 1 says that a head finds things far back and must keep every token; one of 0 that it gets by with the first
and the latest ones, its streaming form (DuoAttention, arXiv 2410.10819). `kvfold profile --gates FILE` measures them.

Files are JSON::

    {
        "format": "kvfold-gates",
        "version": 1,
        "model_type": "llama",
        "sinks": 4,
        "recent": 64,
        "gates": {"0": [0.01, 0.93], "1": [0.2, 0.04]},
    }

``gates``: for each layer index a number from 0 to 1 for each KV head. ``sinks``, ``recent``: the tokens at either end
that a streaming head kept when they were measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvfold.errors import ModelError

__all__ = ["GATES_FILE", "Gates"]

GATES_FILE: Final = "gates.json"
"""The gates that lie beside a model's weights."""

_FORMAT: Final = "kvfold-gates"
_VERSION: Final = 1
_KEYS: Final = ("format", "version", "model_type", "sinks", "recent", "gates")
_HINT: Final = "name a file that kvfold profile --gates made"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """The gates of a model, by layer index and KV head. ModelError for what no file may hold."""

    model_type: str
    sinks: int
    recent: int
    heads: Mapping[int, tuple[float, ...]]

    def __post_init__(self) -> None:
        if reason := _fault(self):
            raise ModelError("bad gates", why=reason, hint=_HINT)
        ordered = {layer: tuple(map(float, self.heads[layer])) for layer in sorted(self.heads)}
        object.__setattr__(self, "heads", ordered)

    @classmethod
    def read(cls, path: str | Path) -> Gates:
        """The gates in a file; ModelError if there is none, or it is something else."""
        file, what = Path(path), f"no gates in {str(path)!r}"
        if not file.is_file():
            hint = "make it: kvfold profile --model MODEL --gates gates.json"
            raise ModelError(f"no gates at {str(path)!r}", why="no such file", hint=hint)
        try:
            return cls.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ModelError(what, why=str(error), hint=_HINT) from error
        except ModelError as error:
            raise ModelError(what, why=error.why, hint=_HINT) from error

    @classmethod
    def from_json(cls, data: object) -> Gates:
        """What `as_json` gave; ModelError if ``data`` is something else."""
        if reason := _misfit(data):
            raise ModelError("bad gates", why=reason, hint=_HINT)
        fields: Mapping[str, Any] = dict(data)  # type: ignore[call-overload] # `_misfit` has seen that it is a mapping
        return cls(
            model_type=fields["model_type"],
            sinks=fields["sinks"],
            recent=fields["recent"],
            heads={int(layer): tuple(values) for layer, values in fields["gates"].items()},
        )

    def as_json(self) -> dict[str, object]:
        """Plain data, as it stands in a file."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "model_type": self.model_type,
            "sinks": self.sinks,
            "recent": self.recent,
            "gates": {str(layer): list(values) for layer, values in self.heads.items()},
        }

    def write(self, path: str | Path) -> None:
        """Writes a file, whole or not at all, a line for each layer; ModelError if that cannot be."""
        file = Path(path)
        head, _, _ = json.dumps(self.as_json() | {"gates": {}}, indent=2).rpartition("{}")
        lines = ",\n".join(f'    "{layer}": {json.dumps(values)}' for layer, values in self.heads.items())
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            unfinished.write_text(f"{head}{{\n{lines}\n  }}\n}}\n", encoding="utf-8")
            unfinished.replace(file)
        except OSError as error:
            raise ModelError(f"cannot write the gates to {str(path)!r}", why=error.strerror or str(error)) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def full(self, count: int) -> dict[int, tuple[bool, ...]]:
        """Which heads keep every token if ``count`` of them may: those with the highest gates; of equal ones the first.

        By layer, in the shape of ``heads``.
        """
        ranked = sorted((-gate, layer, head) for layer, gates in self.heads.items() for head, gate in enumerate(gates))
        chosen = {(layer, head) for _, layer, head in ranked[: max(count, 0)]}
        return {
            layer: tuple((layer, head) in chosen for head in range(len(gates))) for layer, gates in self.heads.items()
        }


def _misfit(data: object) -> str:
    """Why plain data is not a file of gates, as far as its form tells; empty if it is one."""
    if not isinstance(data, dict):
        return "it is not a JSON object"
    if data.get("format") != _FORMAT:
        return f"its format is {data.get('format')!r}, not {_FORMAT!r}"
    if data.get("version") != _VERSION:
        return f"its version is {data.get('version')!r}; this kvfold reads version {_VERSION}"
    if missing := [key for key in _KEYS if key not in data]:
        return f"it has no {', '.join(missing)}"
    if unknown := [str(key) for key in data if key not in _KEYS]:
        return f"it has {', '.join(unknown)}, which is not known"
    gates = data["gates"]
    if not isinstance(gates, dict) or not all(isinstance(values, list) for values in gates.values()):
        return "its gates are not lists by layer index"
    odd = [name for name in gates if not (name.isascii() and name.isdecimal()) or str(int(name)) != name]
    return f"{odd[0]!r} is not the index of a layer" if odd else ""


def _fault(gates: Gates) -> str:
    """What is wrong with the values of gates; empty if nothing is."""
    model_type: object = gates.model_type  # what a caller or a file gives may be anything
    if not isinstance(model_type, str) or not model_type:
        return "model_type is not the name of one"
    for name in ("sinks", "recent"):
        value = getattr(gates, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return f"{name} is {value!r}, not a number of tokens"
    if not gates.heads:
        return "there is no layer"
    heads: Mapping[int, tuple[Any, ...]] = gates.heads
    for layer, values in heads.items():
        if not values:
            return f"layer {layer} has no heads"
        for head, gate in enumerate(values):
            if isinstance(gate, bool) or not isinstance(gate, int | float) or not 0 <= gate <= 1:  # NaN is neither
                return f"the gate of layer {layer}, head {head} is {gate!r}, not a number from 0 to 1"
    return ""
