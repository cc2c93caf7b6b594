"""The one allocation of exactly the byte budget, cut into extents that pools borrow and return.

The arena holds no memory itself: it hands out extent numbers. Whoever owns the tensor places extent ``e`` at bytes
``[e * extent_bytes, (e + 1) * extent_bytes)``.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from kvfold.errors import BudgetError
from kvfold.formats import format_bytes

__all__ = ["ALIGN", "Arena", "ExtentPlan", "Lender", "plan_extents"]

ALIGN: Final = 64
"""Every extent and every block starts at a multiple of this many bytes."""

_SHARE: Final = 64  # an extent is about this share of the budget ...
_LARGEST: Final = 4 * 2**20  # ... but no larger than this many bytes, unless blocks are large
_BLOCKS: Final = 8  # large blocks: up to this many in an extent, so that little is cut off at its end
_CANDIDATES: Final = 4096  # extent counts tried one by one; beyond, only those that fit some block well


class ExtentPlan(NamedTuple):
    """How a budget is cut: ``n_extents`` extents of ``extent_bytes`` bytes."""

    n_extents: int
    extent_bytes: int


def plan_extents(budget_bytes: int, block_bytes: Sequence[int]) -> ExtentPlan:
    """Cuts ``budget_bytes`` into extents that hold blocks of the sizes ``block_bytes`` with little waste.

    Three kinds of waste are weighed: the end of an extent that holds no whole block (mean over the sizes), half an
    extent for every pool (its last one is on average half used), and the end of the budget that makes no whole extent.
    Raises BudgetError if not even one extent holds the largest block.
    """
    biggest = max(block_bytes)
    most = budget_bytes // biggest
    if most < 1:
        raise BudgetError(
            f"a KV budget of {format_bytes(budget_bytes)} holds no block",
            why=f"the largest block takes {format_bytes(biggest)}",
            hint="raise the budget, or take a smaller block size",
        )
    target = max(biggest, min(budget_bytes // _SHARE, _LARGEST))
    fewest = max(1, min(budget_bytes // max(2 * target, _BLOCKS * biggest), most // 2))
    finest = min(most, max(1, 2 * budget_bytes // target))
    candidates = set(range(fewest, min(finest, fewest + _CANDIDATES) + 1))
    for size in block_bytes:
        for count in range(1, max(2, 2 * target // size) + 1) if 2 * target // size <= _CANDIDATES else ():
            candidates.add(min(finest, max(fewest, budget_bytes // (count * size))))

    def waste(n: int) -> tuple[float, int]:
        extent = budget_bytes // n // ALIGN * ALIGN
        cut = sum(extent % size for size in block_bytes) / (extent * len(block_bytes))
        return cut + len(block_bytes) / (2 * n) + (budget_bytes - n * extent) / budget_bytes, n

    usable = [n for n in candidates if budget_bytes // n // ALIGN * ALIGN >= biggest]
    if not usable:
        raise BudgetError(
            f"a KV budget of {format_bytes(budget_bytes)} holds no block",
            why=f"the largest block takes {format_bytes(biggest)}, aligned to {ALIGN} bytes",
        )
    best = min(usable, key=waste)
    return ExtentPlan(best, budget_bytes // best // ALIGN * ALIGN)


class Lender(Protocol):
    """What the arena asks of the pools that borrow from it."""

    @property
    def idle_extents(self) -> int:
        """Extents of this pool in which no block is referenced (their blocks are only cached)."""
        ...

    def idle_since(self) -> int | None:
        """The arena's clock when this pool's longest idle extent fell idle; None if none is idle."""
        ...

    def surrender(self) -> None:
        """Evicts the cached blocks of the longest idle extent and gives it back."""
        ...


class Arena:
    """Extents of a byte budget, lent to pools. ``total_bytes`` never exceeds the budget unless `grow` is called."""

    def __init__(self, budget_bytes: int, max_block_bytes: int, *, block_bytes: Sequence[int] = ()) -> None:
        """``block_bytes``: all the block sizes that will be cut from extents (default: the largest alone)."""
        self.n_extents, self.extent_bytes = plan_extents(budget_bytes, list(block_bytes) or [max_block_bytes])
        self.budget_bytes = budget_bytes
        self.generation = 0
        """Changes whenever ``total_bytes`` does: the owner of the memory then allocates anew and copies."""
        self._free = list(range(self.n_extents))
        self._lent: set[int] = set()
        self._given_back: set[int] = set()
        self._pools: list[Lender] = []
        self._clock = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all extents: what the owner allocates."""
        return self.n_extents * self.extent_bytes

    @property
    def free_extents(self) -> int:
        """Extents that no pool holds."""
        return len(self._free)

    @property
    def lent_extents(self) -> int:
        """Extents that pools hold."""
        return len(self._lent)

    @property
    def idle_extents(self) -> int:
        """Lent extents in which nothing is referenced: a starving pool can have them."""
        return sum(pool.idle_extents for pool in self._pools)

    def register(self, pool: Lender) -> None:
        """Makes ``pool`` known, so that its idle extents can be reclaimed for others."""
        self._pools.append(pool)

    def tick(self) -> int:
        """The next moment of the clock that orders uses of cached blocks, over all pools."""
        self._clock += 1
        return self._clock

    def borrow(self) -> int | None:
        """Lends the lowest free extent; None if there is none."""
        if not self._free:
            return None
        extent = heapq.heappop(self._free)
        self._lent.add(extent)
        self._given_back.discard(extent)
        return extent

    def give_back(self, extent: int) -> None:
        """Takes a lent extent back."""
        if extent not in self._lent:
            raise ValueError(f"extent {extent} is not lent")
        self._lent.remove(extent)
        self._given_back.add(extent)
        heapq.heappush(self._free, extent)

    def take_given_back(self) -> list[tuple[int, int]]:
        """Byte ranges ``(first, last)``, as long as can be, of the extents that were given back since this was last
        asked and are still free: what they hold is of no use any more.
        """
        ranges: list[tuple[int, int]] = []
        for extent in sorted(self._given_back):
            first, last = extent * self.extent_bytes, (extent + 1) * self.extent_bytes
            if ranges and ranges[-1][1] == first:
                first = ranges.pop()[0]
            ranges.append((first, last))
        self._given_back.clear()
        return ranges

    def longest_idle(self) -> Lender | None:
        """The pool whose longest idle extent has been idle the longest; None if no extent is idle."""
        found, oldest = None, 0
        for pool in self._pools:
            since = pool.idle_since()
            if since is not None and (found is None or since < oldest):
                found, oldest = pool, since
        return found

    def grow(self, n_extents: int) -> None:
        """Adds ``n_extents`` extents at the end. Offsets of blocks stay; ``generation`` changes."""
        for extent in range(self.n_extents, self.n_extents + n_extents):
            heapq.heappush(self._free, extent)
        self.n_extents += n_extents
        self.budget_bytes = max(self.budget_bytes, self.total_bytes)
        self.generation += 1

    def check(self, held: set[int]) -> None:
        """Raises AssertionError unless exactly the extents in ``held`` are lent and all others free."""
        if held != self._lent:
            raise AssertionError(f"lent {sorted(self._lent)}, held {sorted(held)}")
        if len(set(self._free)) != len(self._free) or set(self._free) | held != set(range(self.n_extents)):
            raise AssertionError(f"{self.n_extents} extents, but free {sorted(self._free)} and lent {sorted(held)}")
        if set(self._free) & held or self.total_bytes > self.budget_bytes:
            raise AssertionError("an extent is both free and lent, or the arena is above its budget")
