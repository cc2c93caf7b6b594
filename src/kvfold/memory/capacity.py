"""How much fits: bounds on the blocks that sequences hold at worst, at extent granularity.

A pool reuses its free blocks before it borrows, so it never holds more extents than its peak number of blocks needs.
Bounds on peaks are therefore bounds on extents, whatever happened in between. All counts here are never below the
truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Final, NamedTuple

from kvfold.formats import TABLE_ENTRY_BYTES, BlockCounts, block_counts
from kvfold.memory.arena import plan_extents
from kvfold.memory.books import block_sizes, table_entries
from kvfold.memory.reservation import plan_group
from kvfold.memory.table import GroupSpec, PoolKey

__all__ = ["UNBOUNDED", "Capacity", "Counts", "budget_for"]

UNBOUNDED: Final = 1 << 40
"""Said of tokens or sequences when no limit was found: sliding layers alone never fill up."""

Counts = BlockCounts

_FINENESS: Final = 64  # `budget_for` is at most this share too much


class _Peak(NamedTuple):
    """Blocks of one sequence during a step, at worst: those whose number does not grow with the length."""

    raw: int
    packed: int | None  # None: as many as there are


class Capacity:
    """What an empty arena of ``n_extents`` extents can hold. ``blocks_per_extent``: by pool."""

    def __init__(
        self,
        specs: Sequence[GroupSpec],
        block_size: int,
        n_extents: int,
        blocks_per_extent: Mapping[PoolKey, int],
    ) -> None:
        self._specs = tuple(specs)
        self._size = block_size
        self._n_extents = n_extents
        self._per_extent = dict(blocks_per_extent)
        self._peaks: dict[tuple[int, int], _Peak] = {}

    def resting(self, group: int, length: int) -> Counts:
        """Blocks a sequence of ``length`` tokens holds between steps."""
        spec = self._specs[group]
        return block_counts(
            length,
            block_size=self._size,
            kind=spec.kind,
            window=spec.window,
            sinks=spec.sinks,
            recent=spec.recent,
            packs=spec.seals,
        )

    def retained(self, group: int, length: int) -> Counts:
        """As `resting`, of a prompt on which retention has run."""
        spec, rest = self._specs[group], self.resting(group, length)
        if spec.rule is None:
            return rest
        gone = max(0, spec.candidates_end(length, self._size) - spec.sink_end(self._size))
        kept = min(gone, spec.kept_blocks(length, self._size))
        return Counts(rest.raw, rest.packed - gone + kept) if spec.seals else Counts(rest.raw - gone + kept, 0)

    def peak(self, group: int, length: int, chunk: int) -> Counts:
        """Blocks, at most, that a sequence holds at any moment on its way to ``length`` tokens in steps of at most
        ``chunk``.
        """
        spec, size = self._specs[group], self._size
        if length < 1:
            return Counts(0, 0)
        steady = self._steady(group, min(chunk, length))
        raw = min(steady.raw, -(-length // size))
        kept = spec.kept_blocks(length, size)  # what retention keeps lies beside what it is chosen from
        if not spec.seals:
            return Counts(raw + kept, 0)
        packed = max(0, spec.packed_end(length, size) - spec.sink_end(size))
        return Counts(raw, kept + (packed if steady.packed is None else min(packed, steady.packed)))

    def extents(self, counts: Sequence[Counts]) -> int:
        """Extents that pools need for these blocks of each group."""
        return _extents(counts, self._per_extent)

    def surely_fits(self, length: int, chunk: int) -> bool:
        """Whether a lone sequence gets to ``length`` tokens, whatever its steps of at most ``chunk`` tokens. Errs to
        False.
        """
        groups = range(len(self._specs))
        return self.extents([self.peak(group, length, chunk) for group in groups]) <= self._n_extents

    def cannot_fit(self, length: int) -> bool:
        """Whether a sequence of ``length`` tokens is too much even at rest. Errs to False."""
        groups = range(len(self._specs))
        return self.extents([self.retained(group, length) for group in groups]) > self._n_extents

    def tokens(self) -> int:
        """Tokens a lone sequence surely gets to, one at a time."""
        return _largest(lambda length: self.surely_fits(length, 1), UNBOUNDED)

    def concurrency(self, length: int) -> float:
        """Sequences of ``length`` tokens that surely fit at once, filled one after the other in steps of any size.

        The fraction is the share of one more sequence's extents that is left. Below 1: the share of one that fits.
        """
        groups = range(len(self._specs))
        rest = [self.retained(group, length) for group in groups]
        peak = [self.peak(group, length, length) for group in groups]

        def needed(sequences: int) -> int:
            others = sequences - 1
            return self.extents(
                [Counts(p.raw + others * r.raw, p.packed + others * r.packed) for p, r in zip(peak, rest, strict=True)]
            )

        whole = _largest(lambda sequences: needed(sequences) <= self._n_extents, UNBOUNDED)
        if whole >= UNBOUNDED:
            return float(UNBOUNDED)
        if whole == 0:
            return min(self.tokens() / length, 1 - 2**-20)
        spent = needed(whole)
        return whole + (self._n_extents - spent) / (needed(whole + 1) - spent) * (1 - 2**-20)

    def _steady(self, group: int, chunk: int) -> _Peak:
        key = (group, chunk)
        if key not in self._peaks:
            self._peaks[key] = self._search(self._specs[group], chunk)
        return self._peaks[key]

    def _search(self, spec: GroupSpec, chunk: int) -> _Peak:
        """The worst step, far from the start of the sequence, where everything repeats with the block size.

        For a given start, longer steps take more until they reach a period, so the last period of ends is enough.
        """
        size, sinks = self._size, spec.sink_end(self._size)
        window = spec.window if spec.kind in ("sliding", "chunked") else None
        if spec.kind == "chunked" and window is not None:
            # Where a chunk begins within its block varies. Blocks of a chunk there are, and of the one it grows into.
            span = -(-window // size) + 1
            bound = span + min(span, -(-chunk // size) + 1)
            full = (
                self._search(GroupSpec("", 64, 64, spec.sinks, spec.recent), chunk) if spec.seals else _Peak(bound, 0)
            )
            return _Peak(min(bound, full.raw), bound)
        if window is None and not spec.seals:
            return _Peak(UNBOUNDED, None)
        base = (-(-(spec.recent + (window or 0)) // size) + sinks + 2) * size
        raw = packed = 0
        # With a window, blocks that are packed ahead (see `plan_group`) or taken from the prefix index leave before the
        # rule would have packed them: fewer raw ones, more packed ones.
        for start, ahead in product(range(base, base + size), (False, True) if window is not None else (False,)):
            top = start + min(chunk, spec.recent + (window or 0) + 3 * size)
            packed_end = start // size if ahead else spec.packed_end(start, size)
            live, there = spec.live(start, size), -(-start // size)
            for end in range(max(start + 1, top - size + 1), top + 1):
                expected = end + spec.recent + size if ahead else 0
                plan = plan_group(spec, size, start=start, end=end, packed_end=packed_end, expected=expected)
                old_packed = max(0, packed_end - max(live, sinks))
                raw = max(raw, there - live - old_packed + plan.raw_blocks)
                sealed = plan.direct_stop - plan.direct + plan.seal_stop - plan.seal
                packed = max(packed, old_packed + sealed)
        # The sinks of a full layer are among its raw blocks at any length; those of a sliding one only at the start.
        return _Peak(raw + (sinks if window is not None else 0), None if window is None else packed)


def budget_for(specs: Sequence[GroupSpec], block_size: int, *, length: int, chunk: int, sequences: int) -> int:
    """A budget, in bytes and hardly more than the least, with which as many ``sequences`` of ``length`` tokens surely
    fit, filled one after the other in steps of at most ``chunk`` tokens: tables and the ends of extents included.
    """
    room, sizes = Capacity(specs, block_size, 0, {}), block_sizes(specs)
    counts = []
    for group in range(len(specs)):
        peak, rest = room.peak(group, length, chunk), room.resting(group, length)
        counts.append(Counts(peak.raw + (sequences - 1) * rest.raw, peak.packed + (sequences - 1) * rest.packed))
    needed = sum(
        count.raw * spec.raw_block_bytes + count.packed * spec.packed_block_bytes
        for count, spec in zip(counts, specs, strict=True)
    )
    budget = max(needed, 2 * max(sizes))
    while True:
        for_blocks = budget - table_entries(budget, specs) * TABLE_ENTRY_BYTES
        if for_blocks < max(sizes):
            budget += max(sizes)
            continue
        extents, extent_bytes = plan_extents(for_blocks, sizes)
        per_extent: dict[PoolKey, int] = {}
        for group, spec in enumerate(specs):
            per_extent[group, "raw"] = extent_bytes // spec.raw_block_bytes
            if spec.seals:
                per_extent[group, "packed"] = extent_bytes // spec.packed_block_bytes
        if _extents(counts, per_extent) <= extents:
            return budget
        budget += max(budget // _FINENESS, max(sizes))


def _extents(counts: Sequence[Counts], per_extent: Mapping[PoolKey, int]) -> int:
    total = 0
    for group, count in enumerate(counts):
        total += -(-count.raw // per_extent[group, "raw"])
        if count.packed:
            total += -(-count.packed // per_extent[group, "packed"])
    return total


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` that fits, if those that do come first; 0 if not even 1 does."""
    low, high = 0, 1
    while high < limit and fits(high):
        low, high = high, min(2 * high, limit)
    if high >= limit and fits(limit):
        return limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
