"""What foretells how much a token will matter: a small map for each layer, as a file.

For each layer, from the ``E`` numbers that its attention is given of a token to the natural logarithm of the token's
importance to each of its ``H`` KV heads: ``W h + b``, or ``W2 gelu(W1 h + b1) + b2``. `kvfold train-retention` fits
them to what KVzip measures.

Files are safetensors. Of layer ``i``: ``i.out.weight [H, M]`` and ``i.out.bias [H]``, and, where there is a layer of
``M`` between, ``i.in.weight [M, E]`` and ``i.in.bias [M]``; else ``M`` is ``E``. Their metadata say ``format``,
``version``, ``model_type``, and, for people, what they were trained on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from kvfold.errors import ModelError
from kvfold.geometry import Geometry

__all__ = ["Scorer", "TokenMap"]

_FORMAT: Final = "kvfold-scorer"
_VERSION: Final = 1
_HINT: Final = "name a file that kvfold train-retention made"
_PARTS: Final = ("in.weight", "in.bias", "out.weight", "out.bias")


@dataclass(frozen=True, slots=True)
class TokenMap:
    """The map of one layer: ``weight [H, M]``, ``bias [H]``, and, if something lies between, ``inner (weight [M, E],
    bias [M])``.
    """

    weight: Tensor
    bias: Tensor
    inner: tuple[Tensor, Tensor] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """``[T, E]`` to logarithms of importance, float32 ``[T, H]``."""
        x = hidden.to(self.weight.dtype)
        if self.inner is not None:
            x = functional.gelu(functional.linear(x, *self.inner))
        return functional.linear(x, self.weight, self.bias).float()

    @property
    def shape(self) -> tuple[int, int]:
        """(numbers of a token, KV heads)."""
        first = self.weight if self.inner is None else self.inner[0]
        return first.shape[1], self.weight.shape[0]


@dataclass(frozen=True, slots=True)
class Scorer:
    """A scorer file in memory: ``maps`` by layer, in float32."""

    path: str
    model_type: str
    maps: Mapping[int, TokenMap]

    @classmethod
    def load(cls, path: str | Path, device: torch.device | None = None) -> Scorer:
        """The scorer in a file; ModelError if there is none, or it is something else. Read once per version."""
        file = Path(path)
        if not file.is_file():
            hint = "make it: kvfold train-retention --model MODEL --text FILE -o scorer.safetensors"
            raise ModelError(f"no scorer at {str(path)!r}", why="no such file", hint=hint)
        stat = file.stat()
        return _load(str(file), stat.st_mtime_ns, stat.st_size, device or torch.device("cpu"))

    def save(self, dtype: torch.dtype, facts: Mapping[str, str | int]) -> None:
        """Writes the file, whole or not at all. ``facts``: more metadata. ModelError if that cannot be."""
        tensors: dict[str, Tensor] = {}
        for layer, of_layer in self.maps.items():
            own = (*(of_layer.inner or (None, None)), of_layer.weight, of_layer.bias)
            tensors |= {f"{layer}.{name}": x.to(dtype) for name, x in zip(_PARTS, own, strict=True) if x is not None}
        # One entry: safetensors writes several in any order, and equal scorers are to be equal files.
        metadata = {_FORMAT: json.dumps({"version": _VERSION, "model_type": self.model_type, **facts})}
        file = Path(self.path)
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            save_file({name: x.contiguous() for name, x in tensors.items()}, unfinished, metadata)
            unfinished.replace(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot write {self.path}", why=str(error)) from error
        finally:
            unfinished.unlink(missing_ok=True)

    def refusals(self, geometry: Geometry) -> list[str]:
        """Every reason why the scorer is not of a model of this geometry."""
        if self.model_type != geometry.model_type:
            return [f"the scorer {self.path} is of a {self.model_type} model, not of {geometry.model_type}"]
        wanted = {
            layer.index: (geometry.hidden, layer.kv_heads)
            for layer in geometry.layers
            if layer.stores and layer.window is None
        }
        if missing := [str(layer) for layer in wanted if layer not in self.maps]:
            return [f"the scorer {self.path} has no map for layers {', '.join(missing)}"]
        odd = [str(layer) for layer, shape in wanted.items() if self.maps[layer].shape != shape]
        return [f"the maps of the scorer {self.path} are of other widths at layers {', '.join(odd)}"] if odd else []


@lru_cache(maxsize=8)
def _load(path: str, changed: int, size: int, device: torch.device) -> Scorer:
    what = f"no scorer in {path!r}"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 # it is no dict
    except (SafetensorError, OSError) as error:
        raise ModelError(what, why=str(error), hint=_HINT) from error
    facts = _facts(metadata.get(_FORMAT, ""))
    if facts is None:
        raise ModelError(what, why=f"its metadata say nothing of a {_FORMAT}", hint=_HINT)
    if (found := facts.get("version")) != _VERSION:
        raise ModelError(what, why=f"its version is {found!r}; this kvfold reads {_VERSION}", hint=_HINT)
    for name, x in tensors.items():
        if not x.is_floating_point() or not bool(torch.isfinite(x).all()):
            raise ModelError(what, why=f"{name} is not of finite numbers", hint=_HINT)
    layers = sorted({int(first) for name in tensors if (first := name.partition(".")[0]).isdecimal()})
    maps = {layer: _map_of(layer, tensors) for layer in layers}
    sound = {layer: found for layer, found in maps.items() if found is not None}
    if not maps or len(sound) < len(maps) or sum(4 if m.inner else 2 for m in sound.values()) != len(tensors):
        raise ModelError(what, why="its tensors are not those of a map for each layer", hint=_HINT)
    return Scorer(path, str(facts.get("model_type")), sound)


def _facts(text: str) -> dict[str, object] | None:
    """The metadata; None if they are not of a scorer."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _map_of(layer: int, tensors: Mapping[str, Tensor]) -> TokenMap | None:
    """A layer's map; None if its tensors do not go together."""
    own = [tensors.get(f"{layer}.{name}") for name in _PARTS]
    inner_weight, inner_bias, weight, bias = (None if x is None else x.float() for x in own)
    if weight is None or bias is None or weight.dim() != 2 or bias.shape != weight.shape[:1]:
        return None
    if inner_weight is None or inner_bias is None:
        return TokenMap(weight, bias) if inner_weight is inner_bias else None
    if inner_weight.dim() != 2 or inner_bias.shape != inner_weight.shape[:1] or weight.shape[1:] != inner_bias.shape:
        return None
    return TokenMap(weight, bias, (inner_weight, inner_bias))
