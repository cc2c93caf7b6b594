"""The whole calibration of a model, and what it says about where the bits go."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from kvfold.calibration import Calibration, Side
from kvfold.errors import RequestError
from kvfold.quality.calibrate.fit import fit
from kvfold.quality.calibrate.observe import Observer

__all__ = ["CalibrationReport", "LayerEnergy", "calibrate"]

_BITS = (2.0, 2.5, 3.0, 4.0)
_ENERGY = 0.99


@dataclass(frozen=True, slots=True)
class LayerEnergy:
    """Of a layer: in how many directions 99 % of what could be lost lies, of how many, and how 3 bits are spent."""

    layer: int
    k_rank: int
    v_rank: int
    k_dim: int
    v_dim: int
    k_bands: tuple[tuple[int, int], ...]
    v_bands: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What was found. ``costs``: for bits a number, the predicted KL divergence per token of keys and of values."""

    file: str
    tokens: int
    entropy: float
    layers: tuple[LayerEnergy, ...]
    costs: dict[str, tuple[float, float]]

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def calibrate(
    model: PreTrainedModel,
    passages: Sequence[Sequence[int]],
    file: Path,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> CalibrationReport:
    """Calibrates ``model`` (best in float32) on ``passages`` and writes ``file``, whole or not at all.

    UnsupportedError for a model whose attention cannot be observed, NumericsError for one that answers NaN.
    ``progress`` is told of every passage and of the fit.
    """
    if not passages or not all(passages):
        raise RequestError("a calibration on nothing", why="there are no passages, or empty ones")
    generator = torch.Generator().manual_seed(seed)
    observer = Observer(model)
    try:
        entropies = []
        for number, passage in enumerate(passages, start=1):
            progress(f"passage {number} of {len(passages)}")
            entropies.append(observer.observe(passage, generator))
    finally:
        observer.release()
    progress("fitting")
    arrays = {
        f"{layer}.{side}.{name}": tensor
        for layer, sides in observer.moments.items()
        for side, moments in zip("kv", sides, strict=True)
        for name, tensor in fit(moments, centred=side == "k").items()
    }
    written = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(arrays, written)
        written.replace(file)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"cannot write {file}", why=str(error)) from error
    finally:
        written.unlink(missing_ok=True)
    found = Calibration.load(file)
    return CalibrationReport(
        file=str(file),
        tokens=sum(map(len, passages)),
        entropy=sum(entropies) / len(entropies),
        layers=_energies(found),
        costs={f"{bits:g}": (found.cost("k", bits), found.cost("v", bits)) for bits in _BITS},
    )


def _energies(found: Calibration) -> tuple[LayerEnergy, ...]:
    keys, values = found.bands("k", 3), found.bands("v", 3)
    return tuple(
        LayerEnergy(
            layer,
            _rank(found, layer, "k"),
            _rank(found, layer, "v"),
            found.shape(layer, "k")[1],
            found.shape(layer, "v")[1],
            keys[layer],
            values[layer],
        )
        for layer in found.layers
    )


def _rank(found: Calibration, layer: int, side: Side) -> int:
    """Leading directions that hold 99 % of a layer's energy."""
    energy = found.arrays[f"{layer}.{side}.distortion"][:, -1].sum(0).cumsum()
    return int((energy < _ENERGY * energy[-1]).sum()) + 1
