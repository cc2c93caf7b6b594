"""What a calibration knows of a model, and how a budget of bits is spent by it.

For keys and values of each layer and KV head, `kvfold calibrate` finds the directions in which errors matter, sorted
by how much, and measures what a step of 8, 4 or 2 bits costs in each (in nats of KL divergence per token, by the
Fisher information). Bits then go where they save most: reverse water-filling over all layers of a side (Cover and
Thomas, section 10.3). A basis that is cut off where bits run out is a low rank.

Files are safetensors: for layer ``i`` and side ``s`` (``k``, ``v``) the float32 arrays ``i.s.encode [H, D, D]`` (its
columns the directions, in units of their standard deviation), ``i.s.decode [H, D, D]`` (its inverse),
``i.s.mean [H, D]`` (what comes off first; zero for values),
``i.s.step [H, 3, D]`` (best steps at 8, 4 and 2 bits) and ``i.s.distortion [H, 4, D]`` (at 8, 4, 2 and 0 bits).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
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
        """How each layer spends its part of ``bits`` a number on average, at most; all its heads alike.

        Every layer keeps its first 8 dims at 2 bits or more, which is the average where a head has no more than that.
        Bits that save nothing are not spent.
        """
        clusters = self._clusters()
        costs = {
            number: np.sum([self._cost(layer, side) for layer in members], axis=0)
            for number, members in enumerate(clusters)
        }
        sizes = {
            number: sum(self.shape(layer, side)[0] for layer in members) for number, members in enumerate(clusters)
        }
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

    def matrices(self, layer: int, side: Side, bands: Bands) -> tuple[Array, Array, Array]:
        """``encode [H, D, r]`` to steps of one, ``decode [H, r, D]`` back, of the dims in ``bands``, and the mean
        ``[H, D]`` that comes off first.
        """
        name = f"{layer}.{side}"
        step = self.arrays[f"{name}.step"]
        widths = np.repeat([WIDTHS.index(bits) for bits, _ in bands], [dims for _, dims in bands])
        rank = widths.size
        steps = step[:, widths, np.arange(rank)]
        encode = self.arrays[f"{name}.encode"][:, :, :rank] / steps[:, None, :]
        decode = self.arrays[f"{name}.decode"][:, :rank, :] * steps[:, :, None]
        return encode.astype(np.float32), decode.astype(np.float32), self.arrays[f"{name}.mean"]

    def _cost(self, layer: int, side: Side) -> Array:
        """``[4, D / unit]``: what units of dims cost at each of the widths and at none, all heads together."""
        cost = self.arrays[f"{layer}.{side}.distortion"].sum(0)
        units: Array = cost.reshape(len(WIDTHS) + 1, -1, _UNIT).sum(-1)
        return units

    def _clusters(self) -> list[list[int]]:
        """Layers that share a format, most sensitive first; their heads are of one shape."""
        weight = {layer: sum(float(self._cost(layer, side)[_row(0)].sum()) for side in _SIDES) for layer in self.layers}
        alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for layer in sorted(self.layers, key=lambda layer: (-weight[layer], layer)):
            alike.setdefault(tuple(self.shape(layer, side) for side in _SIDES), []).append(layer)
        clusters = []
        for order in alike.values():
            count = min(len(order), max(1, _FORMATS * len(order) // len(self.layers)))
            clusters += [[int(layer) for layer in part] for part in np.array_split(np.asarray(order), count)]
        return clusters


_PARTS: Final[Mapping[str, Callable[[int, int], tuple[int, ...]]]] = {
    "encode": lambda heads, dim: (heads, dim, dim),
    "decode": lambda heads, dim: (heads, dim, dim),
    "mean": lambda heads, dim: (heads, dim),
    "step": lambda heads, dim: (heads, len(WIDTHS), dim),
    "distortion": lambda heads, dim: (heads, len(WIDTHS) + 1, dim),
}
"""The arrays of a side, and their shapes."""

_SIDES: Final[tuple[Side, Side]] = ("k", "v")


def _row(bits: int) -> int:
    """Where a width stands in an array of distortions."""
    return WIDTHS.index(bits) if bits else len(WIDTHS)


def _fill(costs: Mapping[int, Array], sizes: Mapping[int, int], bits: float) -> dict[int, Bands]:
    """Spends ``bits`` a number: always the step up that saves most for each bit, as long as it can be paid for.

    ``costs [4, units]`` of layers that share their bands, ``sizes`` the heads of all of them.
    """
    level = {number: [0] * cost.shape[1] for number, cost in costs.items()}
    budget = bits * sum(len(units) * sizes[number] for number, units in level.items())
    queue: list[tuple[float, int, int, int, int]] = []

    def offer(number: int, unit: int) -> None:
        now = level[number][unit]
        cost = costs[number][:, unit]
        ups = [up for up in _LEVELS if up > now and (up - now) * sizes[number] <= budget]
        saved = [(float(cost[_row(now)] - cost[_row(up)]) / (up - now) / sizes[number], up) for up in ups]
        # A dim that hardly varies loses less when it is dropped than when it is rounded to a code.
        if saved and max(saved)[0] > 0:
            gain, up = max(saved)
            heapq.heappush(queue, (-gain, number, unit, now, up))

    for number, units in level.items():
        # A page holds something of every token: the first unit is not for sale.
        units[0] = _LEVELS[1]
        budget -= _LEVELS[1] * sizes[number]
    for number, units in level.items():
        for unit in range(len(units)):
            offer(number, unit)
    while queue:
        _, number, unit, now, up = heapq.heappop(queue)
        price = (up - now) * sizes[number]
        if price <= budget:
            level[number][unit] = up
            budget -= price
        offer(number, unit)
    return {
        number: tuple((width, units.count(width) * _UNIT) for width in WIDTHS if width in units)
        for number, units in level.items()
    }


@lru_cache(maxsize=8)
def _load(path: str, changed: int, size: int) -> Calibration:
    from safetensors import SafetensorError, safe_open

    what, hint = f"no calibration in {path!r}", "name a file that kvfold calibrate made"
    try:
        with safe_open(path, "numpy") as file:
            names = set(file.keys())
            layers = sorted({int(number) for name in names if (number := name.split(".")[0]).isdecimal()})
            # Names come first: numpy cannot read every dtype of other files.
            if not layers or names != {f"{i}.{side}.{part}" for i in layers for side in _SIDES for part in _PARTS}:
                raise ModelError(what, why="it holds other tensors", hint=hint)
            types = {name: file.get_slice(name).get_dtype() for name in names}
            arrays: dict[str, Array] = {name: file.get_tensor(name) for name in names if types[name] == "F32"}
    except (SafetensorError, OSError) as error:
        raise ModelError(what, why=str(error), hint=hint) from error
    bad = sorted(name for name in names if name not in arrays or not _is_sound(name, arrays))
    if bad:
        raise ModelError(what, why=f"the dtype, the shape or a number of {bad[0]} is wrong", hint=hint)
    return Calibration(path, tuple(layers), arrays)


def _is_sound(name: str, arrays: Mapping[str, Array]) -> bool:
    """Whether an array has the shape that goes with its side, and finite numbers."""
    side, part = name.rsplit(".", 1)
    encode = arrays.get(f"{side}.encode")
    if encode is None or encode.ndim != 3:
        return False
    heads, dim = encode.shape[:2]
    whole = heads > 0 and dim > 0 and dim % _UNIT == 0
    return whole and arrays[name].shape == _PARTS[part](heads, dim) and bool(np.isfinite(arrays[name]).all())
