"""What a calibration knows of a model, and how a budget of bits is spent by it.

For keys and values of each layer and KV head, `kvfold calibrate` finds the directions in which errors matter, sorted
by how much, and measures what a step of 8, 4 or 2 bits costs in each (in nats of KL divergence per token, by the
Fisher information). Bits then go where they save most: reverse water-filling over all layers of a side (Cover and
Thomas, section 10.3). A basis that is cut off where bits run out is a low rank.

Files are safetensors: for layer ``i`` and side ``s`` (``k``, ``v``) the float32 arrays ``i.s.encode [H, D, D]`` (its
columns the directions, in units of their standard deviation), ``i.s.decode [H, D, D]`` (its inverse),
``i.s.step [H, 3, D]`` (best steps at 8, 4 and 2 bits) and ``i.s.distortion [H, 4, D]`` (at 8, 4, 2 and 0 bits).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from kvfold.errors import ModelError

__all__ = ["WIDTHS", "Bands", "Calibration", "Side"]

Array = np.ndarray[Any, np.dtype[np.float32]]
Bands = tuple[tuple[int, int], ...]
"""``(bits, dims)`` from the most important dims on."""
Side = Literal["k", "v"]

WIDTHS: Final = (8, 4, 2)
"""Bits of a code, in the order of the arrays."""

_LEVELS: Final = (0, 2, 4, 8)
_UNIT: Final = 8  # dims that get bits together: whole bytes at every width, and whole registers
_FORMATS: Final = 4  # layers are put into at most so many groups: every group has tables of its own in every step


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration file in memory. ``arrays`` by name, as in the module's docstring."""

    path: str
    layers: tuple[int, ...]
    arrays: Mapping[str, Array]

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """The calibration in a file; ModelError if there is none, or it is something else. Read once per version."""
        file = Path(path)
        if not file.is_file():
            hint = "make it: kvfold calibrate --model MODEL --text FILE -o calibration.safetensors"
            raise ModelError(f"no calibration at {str(path)!r}", why="no such file", hint=hint)
        stat = file.stat()
        return _load(str(file), stat.st_mtime_ns, stat.st_size)

    def shape(self, layer: int, side: Side) -> tuple[int, int]:
        """(KV heads, dim) of a layer's keys or values."""
        heads, dim, _ = self.arrays[f"{layer}.{side}.encode"].shape
        return heads, dim

    def bands(self, side: Side, bits: float) -> dict[int, Bands]:
        """How each layer spends its part of ``bits`` a number on average; all its heads alike."""
        clusters = self._clusters()
        costs = {
            number: np.sum([self._cost(layer, side) for layer in members], axis=0)
            for number, members in enumerate(clusters)
        }
        sizes = {number: len(members) for number, members in enumerate(clusters)}
        spent = _fill(costs, sizes, bits)
        return {layer: spent[number] for number, members in enumerate(clusters) for layer in members}

    def cost(self, side: Side, bits: float) -> float:
        """What the codes of a side cost at ``bits`` a number: nats of KL divergence per token, all layers together, as
        far as it is quadratic.
        """
        total = 0.0
        for layer, bands in self.bands(side, bits).items():
            widths = [width for width, dims in bands for _ in range(dims)]
            cost = self.arrays[f"{layer}.{side}.distortion"].sum(0)
            widths += [0] * (cost.shape[1] - len(widths))
            total += float(sum(cost[_row(width), dim] for dim, width in enumerate(widths)))
        return total

    def matrices(self, layer: int, side: Side, bands: Bands) -> tuple[Array, Array]:
        """``encode [H, D, r]`` to steps of one, and ``decode [H, r, D]`` back, of the dims in ``bands``."""
        name = f"{layer}.{side}"
        step = self.arrays[f"{name}.step"]
        widths = np.repeat([WIDTHS.index(bits) for bits, _ in bands], [dims for _, dims in bands])
        rank = widths.size
        steps = step[:, widths, np.arange(rank)]
        encode = self.arrays[f"{name}.encode"][:, :, :rank] / steps[:, None, :]
        decode = self.arrays[f"{name}.decode"][:, :rank, :] * steps[:, :, None]
        return encode.astype(np.float32), decode.astype(np.float32)

    def _cost(self, layer: int, side: Side) -> Array:
        """``[4, D / unit]``: what units of dims cost at each of the widths and at none, all heads together."""
        cost = self.arrays[f"{layer}.{side}.distortion"].sum(0)
        units: Array = cost.reshape(len(WIDTHS) + 1, -1, _UNIT).sum(-1)
        return units

    def _clusters(self) -> list[list[int]]:
        """Layers that share a format, most sensitive first."""
        weight = {layer: sum(float(self._cost(layer, side)[_row(0)].sum()) for side in _SIDES) for layer in self.layers}
        order = sorted(self.layers, key=lambda layer: (-weight[layer], layer))
        parts = np.array_split(np.asarray(order), min(_FORMATS, len(order)))
        return [[int(layer) for layer in part] for part in parts]


_PARTS: Final = ("encode", "decode", "step", "distortion")
_SIDES: Final[tuple[Side, Side]] = ("k", "v")


def _row(bits: int) -> int:
    """Where a width stands in an array of distortions."""
    return WIDTHS.index(bits) if bits else len(WIDTHS)


def _fill(costs: Mapping[int, Array], sizes: Mapping[int, int], bits: float) -> dict[int, Bands]:
    """Spends ``bits`` a number: always the step up that saves most for each bit, as long as it can be paid for."""
    level = {number: [0] * cost.shape[1] for number, cost in costs.items()}
    budget = bits * sum(len(units) * sizes[number] for number, units in level.items())
    queue: list[tuple[float, int, int, int, int]] = []

    def offer(number: int, unit: int) -> None:
        now = level[number][unit]
        cost = costs[number][:, unit]
        saved = [
            (float(cost[_row(now)] - cost[_row(up)]) / (up - now) / sizes[number], up) for up in _LEVELS if up > now
        ]
        if saved:
            gain, up = max(saved)
            heapq.heappush(queue, (-gain, number, unit, now, up))

    for number, units in level.items():
        # A page holds something of every token: the first unit is not for sale.
        units[0] = _LEVELS[1]
        budget -= _LEVELS[1] * sizes[number]
        for unit in range(len(units)):
            offer(number, unit)
    while queue:
        _, number, unit, now, up = heapq.heappop(queue)
        price = (up - now) * sizes[number]
        if level[number][unit] != now or price > budget:
            continue
        level[number][unit] = up
        budget -= price
        offer(number, unit)
    return {
        number: tuple((width, units.count(width) * _UNIT) for width in WIDTHS if width in units)
        for number, units in level.items()
    }


@lru_cache(maxsize=8)
def _load(path: str, changed: int, size: int) -> Calibration:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        layers = sorted({int(name.split(".")[0]) for name in arrays})
        wanted = {f"{i}.{side}.{part}" for i in layers for side in _SIDES for part in _PARTS}
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"no calibration in {path!r}", why=str(error)) from error
    if not layers or wanted != set(arrays):
        raise ModelError(f"no calibration in {path!r}", why="it holds other tensors", hint="name a calibration file")
    return Calibration(path, tuple(layers), arrays)
