"""Banded transform codes and their variations: which weights, whose bits, which levels, how far calibrated.

Row ``banded`` goes through kvfold's own calibration, encoder and decoder. The others are written out here, since
kvfold does not offer them; a test holds the two equal where they should be.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from benchmarks.codecs.learn import SIDES, Learned, Weight
from benchmarks.codecs.protocol import Fold
from benchmarks.codecs.rivals import Codec, by_side, native
from torch import Tensor

from kvfold.calibration import WIDTHS, Side
from kvfold.formats import BandFormat

__all__ = ["AVERAGES", "SHIPPED", "VARIATIONS", "Variation", "banded", "bases_of", "shipped", "varied"]

Scheme = Literal["head", "layer", "uniform"]
Key = tuple[int, Side, int]
"""Layer, side, KV head."""

AVERAGES: Final = (4.0, 3.0, 2.5, 2.25, 2.0)
SHIPPED: Final = "banded"
_UNIT: Final = 8  # dims that get bits together
_ROOM, _PER_OCTAVE = 1.25, 8  # as `kvfold.codecs.banded` has them
_ONE_BIT_STEPS: Final = (1.2, 1.4, 1.6, 1.8, 2.1)


@dataclass(frozen=True, slots=True)
class Variation:
    """A banded code that differs from the shipped one. ``short``: calibrated on passages of half the length;
    ``centred``: the mean of each head's keys, which is static, is taken out first.
    """

    name: str
    scheme: Scheme = "layer"
    weight: Weight = "fisher"
    stretch: bool = True
    levels: tuple[int, ...] = (0, 2, 4, 8)
    short: bool = False
    centred: bool = True


VARIATIONS: Final = (
    Variation("bits by query weight", weight="query"),
    Variation("bits by layer and head", scheme="head"),
    Variation("one pattern for all layers", scheme="uniform"),
    Variation("a 1-bit level as well", levels=(0, 1, 2, 4, 8)),
    Variation("mean of keys left in", centred=False),
    Variation("without the stretch byte", stretch=False),
    Variation("calibrated on half the length", short=True),
)


@dataclass(frozen=True, slots=True)
class Basis:
    """Of one side of one layer: ``mean [H, 1, D]``, which comes off first; ``encode`` and ``decode`` ``[H, D, D]``;
    best steps and costs ``[H, D]`` by bits.
    """

    mean: Tensor
    encode: Tensor
    decode: Tensor
    step: Mapping[int, Tensor]
    cost: Mapping[int, Tensor]


def banded(learned: Learned, short: Learned) -> Iterator[Codec]:
    """The shipped code and its variations at every average. ``short``: what was learned on shorter passages."""
    for average in AVERAGES:
        bits, fold = shipped(learned, average)
        yield Codec("banded", f"{SHIPPED}, {average:g} bits (`int{average:g}:calibrated`)", bits, fold)
    for variation in VARIATIONS:
        bases = bases_of(short if variation.short else learned, variation)
        for average in AVERAGES:
            bits, fold = varied(bases, variation, average)
            yield Codec("variations", f"{variation.name}, {average:g} bits", bits, fold)


def shipped(learned: Learned, average: float) -> tuple[float, Fold]:
    """What kvfold does with ``:calibrated``; and the bits it stores for each number."""
    calibration = learned.calibration()
    formats = {
        (i, side): BandFormat(learned.dim, bands)
        for side in SIDES
        for i, bands in calibration.bands(side, average).items()
    }
    bits = sum(8 * fmt.token_bytes for fmt in formats.values()) / len(formats) / learned.dim
    return bits, native(learned, formats)


def bases_of(learned: Learned, variation: Variation) -> dict[tuple[int, Side], Basis]:
    """The bases in which a variation takes its codes."""
    return {(i, side): _basis(learned, i, side, variation) for i in learned.layers for side in SIDES}


def varied(bases: Mapping[tuple[int, Side], Basis], variation: Variation, average: float) -> tuple[float, Fold]:
    """A variation, and the bits it stores for each number."""
    widths = _widths(bases, variation, average)
    stacked = {
        (i, side): torch.stack([widths[i, side, h] for h in range(len(basis.encode))])
        for (i, side), basis in bases.items()
    }
    mean = float(torch.stack(list(stacked.values())).double().mean())
    dim = next(iter(bases.values())).encode.shape[-1]

    def code(layer: int, side: Side, x: Tensor) -> Tensor:
        return _code(x, bases[layer, side], stacked[layer, side], stretch=variation.stretch)

    fold = by_side(lambda i, k: code(i, "k", k), lambda i, v: code(i, "v", v))
    return mean + (8 / dim if variation.stretch else 0), fold


def _basis(learned: Learned, layer: int, side: Side, variation: Variation) -> Basis:
    fitted = learned.fit_by(layer, side, variation.weight, centred=variation.centred)
    distortion, mean = fitted["distortion"], fitted["mean"][:, None]
    x = (learned.rows(layer, side) - mean) @ fitted["encode"]
    errors = torch.stack([(torch.where(x < 0, -step, step) / 2 - x).square().mean(1) for step in _ONE_BIT_STEPS])
    least, which = errors.min(0)
    # Costs are errors in units of deviations, times what those units cost.
    price = distortion[:, -1] / x.square().mean(1).clamp_min(1e-30)
    step = {bits: fitted["step"][:, i] for i, bits in enumerate(WIDTHS)} | {1: torch.tensor(_ONE_BIT_STEPS)[which]}
    cost = {bits: distortion[:, i] for i, bits in enumerate((*WIDTHS, 0))} | {1: least * price}
    return Basis(mean, fitted["encode"], fitted["decode"], step, cost)


def _code(x: Tensor, basis: Basis, widths: Tensor, *, stretch: bool) -> Tensor:
    """Vectors ``[H, T, D]`` as they are read back, with bits ``widths [H, D]``: see `kvfold.codecs.banded`."""
    step = torch.ones(widths.shape)
    for bits, best in basis.step.items():
        step = torch.where(widths == bits, best, step)
    half = ((2.0**widths - 1) / 2)[:, None]
    y = ((x - basis.mean) @ basis.encode) / step[:, None]
    grow = torch.ones_like(y[..., :1])
    if stretch:
        # Nearly every token has a number beyond the range of one bit; only the wider codes ask for a stretch.
        excess = (y.abs() / (half + 0.5) * (widths > 1)[:, None]).amax(-1, keepdim=True) / _ROOM
        grow = torch.exp2((excess.log2() * _PER_OCTAVE).ceil().clamp_min(0) / _PER_OCTAVE)
    codes = torch.minimum((y / grow + half + 0.5).floor().clamp_min(0), 2 * half)
    read: Tensor = (codes - half) * grow * step[:, None]
    return read @ basis.decode + basis.mean


def _widths(bases: Mapping[tuple[int, Side], Basis], variation: Variation, average: float) -> dict[Key, Tensor]:
    """Bits ``[D]`` of every layer, side and head."""
    found: dict[Key, Tensor] = {}
    for budget in SIDES:
        keys = [(i, side, h) for (i, side), basis in bases.items() if side == budget for h in range(len(basis.encode))]
        groups = _groups(keys, variation.scheme)
        costs = [
            {bits: sum(_units(bases[i, s].cost[bits][h]) for i, s, h in group) for bits in variation.levels}
            for group in groups
        ]
        for group, widths in zip(groups, _fill(costs, list(map(len, groups)), average), strict=True):
            found |= dict.fromkeys(group, torch.tensor(widths).repeat_interleave(_UNIT))
    return found


def _groups(keys: Sequence[Key], scheme: Scheme) -> list[list[Key]]:
    """Who shares a pattern of bits."""
    if scheme == "uniform":
        return [list(keys)]
    if scheme == "head":
        return [[key] for key in keys]
    pairs = dict.fromkeys((i, side) for i, side, _ in keys)
    return [[key for key in keys if key[:2] == pair] for pair in pairs]


def _units(cost: Tensor) -> Tensor:
    units: Tensor = cost.double().unflatten(0, (-1, _UNIT))
    return units.sum(-1)


def _fill(costs: Sequence[Mapping[int, Tensor | int]], sizes: Sequence[int], average: float) -> list[list[int]]:
    """Always the step up that saves most for each bit: what `kvfold.calibration` does, at any levels."""
    table = [{bits: torch.as_tensor(x).tolist() for bits, x in cost.items()} for cost in costs]
    levels = sorted(table[0])
    now = [[0] * len(cost[0]) for cost in table]
    budget = average * sum(len(units) * size for units, size in zip(now, sizes, strict=True))
    queue: list[tuple[float, int, int, int, int]] = []

    def offer(group: int, unit: int) -> None:
        at = now[group][unit]
        cost = table[group]
        ups = [up for up in levels if up > at and (up - at) * sizes[group] <= budget]
        saved = [((cost[at][unit] - cost[up][unit]) / (up - at) / sizes[group], up) for up in ups]
        if saved and max(saved)[0] > 0:
            gain, up = max(saved)
            heapq.heappush(queue, (-gain, group, unit, at, up))

    for group, units in enumerate(now):
        units[0] = levels[1]  # a page holds something of every token
        budget -= levels[1] * sizes[group]
    for group, units in enumerate(now):
        for unit in range(len(units)):
            offer(group, unit)
    while queue:
        _, group, unit, at, up = heapq.heappop(queue)
        price = (up - at) * sizes[group]
        if price <= budget:
            now[group][unit] = up
            budget -= price
        offer(group, unit)
    return now
