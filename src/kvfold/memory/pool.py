"""The blocks of one group in one state: allocation, reference counts, and the cached blocks nobody references.

A block is *used* (referenced), *cached* (unreferenced, but findable in the prefix index, so kept until the room is
needed) or *free*. An extent in which nothing is used is given back at once if it is all free, and is *idle* if it holds
cached blocks: any pool that starves may then have it. All operations are O(log n).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from kvfold.errors import BudgetError
from kvfold.memory.arena import ALIGN, Arena, Lender

__all__ = ["BlockPool"]

_SLACK = 64  # stale entries an LRU heap may hold beyond twice the live ones


class _Extent:
    """What a pool knows of one extent it holds: free block ids (a heap), and how many blocks are used and cached."""

    __slots__ = ("cached", "free", "index", "listed", "used")

    def __init__(self, index: int, free: list[int]) -> None:
        self.index = index
        self.free = free
        self.used = 0
        self.cached = 0
        self.listed = False  # whether it stands in the pool's heap of extents with free blocks


class BlockPool:
    """Blocks of ``block_bytes`` bytes, cut from extents of ``arena``. Block id = extent * blocks_per_extent + slot."""

    def __init__(
        self, arena: Arena, name: str, block_bytes: int, *, on_evict: Callable[[int], None] | None = None
    ) -> None:
        """``on_evict(id)`` is called when a findable block's contents are given up for its room."""
        if block_bytes < 1 or block_bytes % ALIGN:
            raise ValueError(f"block bytes must be a positive multiple of {ALIGN}, got {block_bytes}")
        self.name = name
        self.block_bytes = block_bytes
        self.blocks_per_extent = arena.extent_bytes // block_bytes
        if self.blocks_per_extent < 1:
            raise BudgetError(f"an extent of {arena.extent_bytes} bytes holds no block of {block_bytes} bytes")
        self.evictions = 0
        self._arena = arena
        self._on_evict = on_evict
        self._extents: dict[int, _Extent] = {}
        self._refs: dict[int, int] = {}
        self._findable: set[int] = set()
        self._cached: dict[int, int] = {}  # id -> when it was last used
        self._free = 0
        self._open: list[int] = []  # heap of extents that are not idle and have free blocks; checked when popped
        self._idle: OrderedDict[int, int] = OrderedDict()  # extent -> when it fell idle, oldest first
        self._idle_free: dict[int, None] = {}  # the idle extents that also have free blocks
        self._lru: list[
            tuple[int, int]
        ] = []  # heap of (when, id), cached blocks of extents that are not idle; as above
        arena.register(self)

    # ------------------------------------------------------------------------------------------------ what there is

    @property
    def used_blocks(self) -> int:
        """Referenced blocks."""
        return len(self._refs)

    @property
    def cached_blocks(self) -> int:
        """Unreferenced blocks that are still findable."""
        return len(self._cached)

    @property
    def free_blocks(self) -> int:
        """Blocks of held extents that are neither used nor cached."""
        return self._free

    @property
    def extents(self) -> int:
        """Extents this pool holds."""
        return len(self._extents)

    @property
    def idle_extents(self) -> int:
        """Held extents in which nothing is referenced."""
        return len(self._idle)

    @property
    def active_extents(self) -> int:
        """Held extents in which something is referenced."""
        return len(self._extents) - len(self._idle)

    def refcount(self, block: int) -> int:
        """References to ``block``; 0 if it is cached or free."""
        return self._refs.get(block, 0)

    def findable(self, block: int) -> bool:
        """Whether the prefix index points at ``block``."""
        return block in self._findable

    def offset(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Byte offsets in the arena of blocks ``ids`` (any shape, int64)."""
        extent, slot = np.divmod(np.asarray(ids, dtype=np.int64), self.blocks_per_extent)
        offset: npt.NDArray[np.int64] = extent * self._arena.extent_bytes + slot * self.block_bytes
        return offset

    def in_place(self) -> int:
        """Blocks that can be had without another extent: free or cached ones beside used ones."""
        return self.active_extents * self.blocks_per_extent - len(self._refs)

    def forecast(self, pinned: Iterable[int], dropped: Iterable[int]) -> tuple[int, int]:
        """``(in_place, change of idle or free extents)`` if the cached blocks ``pinned`` were referenced and the blocks
        ``dropped``, referenced once, were not. Blocks stand in either list once.
        """
        change: dict[int, int] = {}
        for sign, blocks in ((1, pinned), (-1, dropped)):
            for block in blocks:
                extent = block // self.blocks_per_extent
                change[extent] = change.get(extent, 0) + sign
        slots, idle = self.in_place() - sum(change.values()), 0
        for extent, delta in change.items():
            used = self._extents[extent].used
            if used == 0 and delta > 0:
                idle -= 1
            elif used > 0 and used + delta == 0:
                idle += 1
        return slots - idle * self.blocks_per_extent, idle

    # ----------------------------------------------------------------------------------------------- taking blocks

    def allocate(self, *, early: bool = True) -> int | None:
        """A block with one reference, or None if there is no room.

        Order: a free block beside used ones (lowest id), a free block beside cached ones, a new extent; then what was
        used least recently: the oldest cached block beside used ones, or the longest idle extent of any pool. Without
        ``early``, an extent is touched only if there is no cached block left beside used ones.
        """
        block = self._take_open()
        if block is None and not early:
            block = self._take_oldest()
        if block is None and self._idle_free:
            self._activate(next(iter(self._idle_free)))
            block = self._take_open()
        if block is None:
            block = self._take_borrowed()
        if block is None:
            owner, oldest = self._arena.longest_idle(), self._oldest()
            since = owner.idle_since() if owner is not None else None
            if owner is None or since is None or (oldest is not None and oldest < since):
                block = self._take_oldest()
            else:
                block = self._take_idle(owner)
        if block is not None:
            self._refs[block] = 1
            self._extents[block // self.blocks_per_extent].used += 1
        return block

    def _take_open(self) -> int | None:
        while self._open:
            extent = self._extents.get(self._open[0])
            if extent is not None and extent.free and extent.index not in self._idle:
                block = heapq.heappop(extent.free)
                self._free -= 1
                if not extent.free:
                    heapq.heappop(self._open)
                    extent.listed = False
                return block
            heapq.heappop(self._open)
            if extent is not None:
                extent.listed = False
        return None

    def _oldest(self) -> int | None:
        """When the oldest cached block beside used ones was last used; it is then the first of the heap."""
        while self._lru:
            stamp, block = self._lru[0]
            if self._cached.get(block) == stamp and block // self.blocks_per_extent not in self._idle:
                return stamp
            heapq.heappop(self._lru)
        return None

    def _take_oldest(self) -> int | None:
        if self._oldest() is None:
            return None
        _, block = heapq.heappop(self._lru)
        self._evict(block)
        self._extents[block // self.blocks_per_extent].cached -= 1
        return block

    def _take_borrowed(self) -> int | None:
        index = self._arena.borrow()
        if index is None:
            return None
        first = index * self.blocks_per_extent
        extent = _Extent(index, list(range(first, first + self.blocks_per_extent)))
        self._extents[index] = extent
        self._free += self.blocks_per_extent
        self._list(extent)
        return self._take_open()

    def _take_idle(self, owner: Lender) -> int | None:
        """A block of the longest idle extent, which ``owner`` holds."""
        if owner is not self:
            owner.surrender()
            return self._take_borrowed()
        self._activate(next(iter(self._idle)))
        block = self._take_open()
        return block if block is not None else self._take_oldest()

    # --------------------------------------------------------------------------------------------------- references

    def ref(self, block: int) -> None:
        """One more reference to a used or cached block."""
        if block in self._refs:
            self._refs[block] += 1
            return
        if block not in self._cached:
            raise ValueError(f"block {block} of pool {self.name} is free")
        del self._cached[block]
        extent = self._extents[block // self.blocks_per_extent]
        extent.cached -= 1
        if extent.index in self._idle:
            self._activate(extent.index)
        extent.used += 1
        self._refs[block] = 1

    def unref(self, block: int) -> int:
        """One reference less; the number left. At 0 the block is cached if it is findable, else free."""
        left = self._refs.get(block, 0) - 1
        if left < 0:
            raise ValueError(f"block {block} of pool {self.name} is not referenced")
        if left:
            self._refs[block] = left
            return left
        del self._refs[block]
        extent = self._extents[block // self.blocks_per_extent]
        extent.used -= 1
        if block in self._findable:
            self._cache(block, extent)
        else:
            heapq.heappush(extent.free, block)
            self._free += 1
        self._settle(extent)
        return 0

    def mark(self, block: int) -> None:
        """The prefix index now points at the used block ``block``."""
        if block not in self._refs:
            raise ValueError(f"block {block} of pool {self.name} is not referenced")
        self._findable.add(block)

    def unmark(self, block: int) -> None:
        """The prefix index no longer points at ``block``: if nobody references it, it is free."""
        self._findable.discard(block)
        if self._cached.pop(block, None) is not None:
            extent = self._extents[block // self.blocks_per_extent]
            extent.cached -= 1
            heapq.heappush(extent.free, block)
            self._free += 1
            if extent.index in self._idle:
                self._idle_free[extent.index] = None
            self._settle(extent)

    # ----------------------------------------------------------------------------------------------------- extents

    def idle_since(self) -> int | None:
        """The arena's clock when the longest idle extent fell idle; None if none is."""
        return next(iter(self._idle.values())) if self._idle else None

    def surrender(self) -> None:
        """Evicts the cached blocks of the longest idle extent and gives it back."""
        extent = self._extents[next(iter(self._idle))]
        first = extent.index * self.blocks_per_extent
        for block in range(first, first + self.blocks_per_extent):
            if block in self._cached:
                self._evict(block)
                heapq.heappush(extent.free, block)
                self._free += 1
        extent.cached = 0
        self._settle(extent)

    def _settle(self, extent: _Extent) -> None:
        """Files ``extent`` where it belongs after a block of it was let go."""
        if extent.used:
            if extent.free:
                self._list(extent)
        elif not extent.cached:
            self._idle.pop(extent.index, None)
            self._idle_free.pop(extent.index, None)
            del self._extents[extent.index]
            self._free -= len(extent.free)
            self._arena.give_back(extent.index)
        elif extent.index not in self._idle:
            self._idle[extent.index] = self._arena.tick()
            if extent.free:
                self._idle_free[extent.index] = None

    def _activate(self, index: int) -> None:
        """An idle extent is about to be used again."""
        del self._idle[index]
        self._idle_free.pop(index, None)
        extent = self._extents[index]
        if extent.free:
            self._list(extent)
        if extent.cached:
            first = index * self.blocks_per_extent
            for block in range(first, first + self.blocks_per_extent):
                if block in self._cached:
                    heapq.heappush(self._lru, (self._cached[block], block))

    def _list(self, extent: _Extent) -> None:
        if not extent.listed:
            extent.listed = True
            heapq.heappush(self._open, extent.index)

    def _cache(self, block: int, extent: _Extent) -> None:
        stamp = self._arena.tick()
        self._cached[block] = stamp
        extent.cached += 1
        heapq.heappush(self._lru, (stamp, block))
        if len(self._lru) > 2 * len(self._cached) + _SLACK:
            per = self.blocks_per_extent
            self._lru = [(when, b) for b, when in self._cached.items() if b // per not in self._idle]
            heapq.heapify(self._lru)

    def _evict(self, block: int) -> None:
        del self._cached[block]
        self._findable.discard(block)
        self.evictions += 1
        if self._on_evict is not None:
            self._on_evict(block)

    # ------------------------------------------------------------------------------------------------------- audit

    def held(self) -> set[int]:
        """The extents this pool holds."""
        return set(self._extents)

    def references(self) -> dict[int, int]:
        """References by used block, a copy."""
        return dict(self._refs)

    def marked(self) -> set[int]:
        """The findable blocks, a copy."""
        return set(self._findable)

    def check(self) -> None:
        """Raises AssertionError unless every block of every held extent is exactly one of used, cached and free, and
        every list that speeds things up says the same.
        """
        seen_free, waiting, listed = 0, set(self._lru), set(self._open)
        for index, extent in self._extents.items():
            blocks = set(range(index * self.blocks_per_extent, (index + 1) * self.blocks_per_extent))
            used, cached, free = blocks & self._refs.keys(), blocks & self._cached.keys(), set(extent.free)
            idle, where = index in self._idle, f"pool {self.name}, extent {index}"
            seen_free += len(free)
            _must(len(used) + len(cached) + len(free) == len(blocks) == len(used | cached | free), where, "blocks")
            _must(len(free) == len(extent.free), where, "a block is free twice")
            _must((len(used), len(cached)) == (extent.used, extent.cached), where, "counts")
            _must(bool(used or cached), where, "an all free extent is held")
            _must(idle == (not used), where, "idle")
            _must((index in self._idle_free) == (idle and bool(free)), where, "idle with free blocks")
            _must(idle or not free or index in listed, where, "free blocks nobody can find")
            _must(idle or all((self._cached[b], b) in waiting for b in cached), where, "cached blocks nobody can evict")
        where = f"pool {self.name}"
        _must(seen_free == self._free, where, "count of free blocks")
        _must(self._idle.keys() <= self._extents.keys() and self._idle_free.keys() <= self._idle.keys(), where, "idle")
        _must(all(count > 0 for count in self._refs.values()), where, "a used block without references")
        _must(self._cached.keys() <= self._findable, where, "a cached block that cannot be found")
        _must(self._findable <= self._cached.keys() | self._refs.keys(), where, "a free block that can be found")
        per = self.blocks_per_extent
        _must(all(b // per in self._extents for b in [*self._refs, *self._cached]), where, "a block without extent")
        _must(len(set(self._cached.values())) == len(self._cached), where, "two cached blocks of the same moment")


def _must(holds: bool, where: str, what: str) -> None:
    if not holds:
        raise AssertionError(f"{where}: {what}")
