"""The shared state of the memory manager, and the few operations on blocks that everything else is made of.

References to blocks have exactly these holders: entries of block tables, open reservations (what they took, and the
block that a copy on write replaces), unfinished seals and unseals (both ends). Twins and the prefix index hold none.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeVar

from kvfold.errors import BudgetError, CacheFullError, RequestError
from kvfold.formats import TABLE_ENTRY_BYTES, format_bytes
from kvfold.memory.arena import ALIGN, Arena
from kvfold.memory.pool import BlockPool
from kvfold.memory.prefix import BlockHash, PrefixEntry, PrefixIndex
from kvfold.memory.reservation import Demand, Keeping, Reservation, Seal, Unseal
from kvfold.memory.table import GroupSpec, GroupTable, PoolKey, SeqId, State

__all__ = ["Allowance", "Books", "GroupWork", "SequenceState", "Twin", "block_sizes", "table_entries"]

_Job = TypeVar("_Job", Seal, Unseal)

_TABLE_SHARE: Final = 256  # at least this share of the budget is kept for the tables of sequences that share blocks


class Allowance:
    """How many extents may be taken before cached blocks beside used ones have all been reused.

    ``due``: extents that a pool needs in any case. ``spare``: those that nobody needs, which may be taken to keep a
    cached block that was used more recently. Never taking more leaves enough for every pool of the demand.
    """

    __slots__ = ("_due", "_spare")

    def __init__(self, due: dict[PoolKey, int], spare: int) -> None:
        self._due = due
        self._spare = spare

    def of(self, key: PoolKey) -> bool:
        """Whether this pool may take an extent now."""
        return self._spare > 0 or self._due.get(key, 0) > 0

    def spend(self, key: PoolKey) -> None:
        """This pool took an extent."""
        if self._due.get(key, 0) > 0:
            self._due[key] -= 1
        else:
            self._spare -= 1


class Twin:
    """The packed block a shared raw block seals into: whoever seals it second takes this one."""

    __slots__ = ("encoded", "packed")

    def __init__(self, packed: int) -> None:
        self.packed = packed
        self.encoded = False  # whether some sequence has committed the seal that encodes it


class GroupWork:
    """What an open reservation will do to one group at commit."""

    __slots__ = ("copied", "live", "packed_end", "seals")

    def __init__(self, copied: int, seals: list[tuple[int, int]], packed_end: int, live: int) -> None:
        self.copied = copied  # the shared raw block that the last table entry stood for; -1: none
        self.seals = seals  # (block index, packed id)
        self.packed_end = packed_end
        self.live = live


class SequenceState:
    """A sequence: its length, tables, open reservation, and the tokens and hashes by which its blocks are found."""

    __slots__ = (
        "expected",
        "hashable",
        "hashes",
        "keeping",
        "length",
        "pending",
        "quiet_until",
        "salt",
        "tables",
        "tokens",
        "version",
        "work",
    )

    def __init__(self, tables: list[GroupTable], *, hashable: bool) -> None:
        self.length = 0
        self.expected = 0  # the length it is on its way to: blocks packed there are packed as soon as they are whole
        self.tables = tables
        self.version = 0
        self.quiet_until = 0  # steps that end here or before change no block list, seal and share nothing
        self.pending: Reservation | None = None
        self.work: list[GroupWork] | None = None
        self.keeping: Keeping | None = None
        self.hashable = hashable  # whether every token so far is known
        self.salt: bytes | None = None
        self.tokens: array[int] = array("q")
        self.hashes: list[BlockHash] = []


class Books:
    """Arena, pools, prefix index, sequences, and what is under way."""

    def __init__(
        self,
        specs: Sequence[GroupSpec],
        budget_bytes: int,
        block_size: int,
        *,
        growable: bool,
        fingerprint: bytes,
        prefix_caching: bool,
    ) -> None:
        self.specs = tuple(specs)
        self.block_size = block_size
        self.growable = growable
        self.fingerprint = fingerprint
        self.prefix_caching = prefix_caching
        sizes = block_sizes(specs)
        if growable:
            budget_bytes = max(budget_bytes, max(sizes))
            self.max_entries = sys.maxsize // TABLE_ENTRY_BYTES
            self.arena = Arena(budget_bytes, max(sizes), block_bytes=sizes)
        else:
            self.max_entries = table_entries(budget_bytes, specs)
            for_blocks = budget_bytes - self.max_entries * TABLE_ENTRY_BYTES
            if for_blocks < max(sizes):
                raise BudgetError(
                    f"a KV budget of {format_bytes(budget_bytes)} holds no block",
                    why=f"a block of {block_size} tokens takes {format_bytes(max(sizes))}, and tables their share",
                    hint="raise the budget, or take a smaller block size (block=16 in the recipe)",
                )
            self.arena = Arena(for_blocks, max(sizes), block_bytes=sizes)
        self.budget_bytes = budget_bytes
        self.index = PrefixIndex()
        self.pools: dict[PoolKey, BlockPool] = {}
        for group, spec in enumerate(specs):
            self._add_pool(group, "raw", spec.raw_block_bytes)
            if spec.seals:
                self._add_pool(group, "packed", spec.packed_block_bytes)
        self.sequences: dict[SeqId, SequenceState] = {}
        self.next_id = 0
        self.next_version = 0
        self.entries = 0  # of all block tables, open reservations included
        self.twins: dict[
            tuple[int, int], Twin
        ] = {}  # by (group, raw id); a twin lives while both blocks are referenced
        self.twin_of: dict[tuple[int, int], int] = {}  # (group, packed id) -> raw id
        self.sealing: Counter[Seal] = Counter()
        self.encoding: set[tuple[int, int]] = set()  # (group, packed id) still to be encoded by the caller
        self.publish_later: dict[tuple[int, int], tuple[BlockHash, bytes]] = {}
        self.unsealing: Counter[Unseal] = Counter()
        self.query_tokens = self.hit_tokens = self.sealed_blocks = self.copied_blocks = 0

    def _add_pool(self, group: int, state: State, block_bytes: int) -> None:
        self.pools[group, state] = BlockPool(
            self.arena,
            f"{self.specs[group].name}/{state}",
            block_bytes,
            on_evict=lambda block: self.index.forget(group, state, block),
        )

    def state(self, seq: SeqId) -> SequenceState:
        """The sequence of this number; RequestError if there is none."""
        state = self.sequences.get(seq)
        if state is None:
            raise RequestError(f"no sequence {seq}", why="it was never created, or has been freed")
        return state

    def settled(self, seq: SeqId) -> SequenceState:
        """The sequence of this number; RequestError if a reservation of it is open."""
        state = self.state(seq)
        if state.pending is not None or state.keeping is not None:
            raise RequestError(f"sequence {seq} has an open reservation", why="commit or roll it back first")
        return state

    def touch(self, state: SequenceState) -> None:
        """The block lists of a sequence have changed."""
        self.next_version += 1
        state.version = self.next_version

    # -------------------------------------------------------------------------------------------------------- room

    def fits(self, demand: Demand, dropping: Mapping[PoolKey, Sequence[int]] | None = None) -> bool:
        """Whether ``demand`` can be met, once the blocks ``dropping`` (each referenced once) are let go. Exact, if what
        is taken stays within the `allowance`.
        """
        return self.growable or (self.missing_extents(demand, dropping) <= 0 and self.entries_fit(demand.entries))

    def entries_fit(self, more: int) -> bool:
        """Whether the block tables may have ``more`` entries more."""
        return self.entries + more <= self.max_entries

    def missing_extents(self, demand: Demand, dropping: Mapping[PoolKey, Sequence[int]] | None = None) -> int:
        """Extents that ``demand`` needs beyond those that are free or idle; negative if there are more."""
        pinned: dict[PoolKey, list[int]] = {}
        for key, block in demand.pinned:
            if self.pools[key].refcount(block) == 0:
                pinned.setdefault(key, []).append(block)
        have, wanted = self.arena.free_extents + self.arena.idle_extents, 0
        totals = demand.totals()
        for key in totals.keys() | pinned.keys() | (dropping or {}).keys():
            pool, need = self.pools[key], totals.get(key, 0)
            if key in pinned or (dropping and key in dropping):
                slots, idle = pool.forecast(pinned.get(key, ()), (dropping or {}).get(key, ()))
                have += idle
            else:
                slots = pool.in_place()
            if need > slots:
                wanted += -(-(need - slots) // pool.blocks_per_extent)
        return wanted - have

    def allowance(self, demand: Demand) -> Allowance | None:
        """The extents that may be taken to meet ``demand``; None, any, if free blocks and free extents are enough."""
        due: dict[PoolKey, int] = {}
        wanted = 0
        for key, need in demand.totals().items():
            pool = self.pools[key]
            wanted += max(0, -(-(need - pool.free_blocks) // pool.blocks_per_extent))
            due[key] = max(0, -(-(need - pool.in_place()) // pool.blocks_per_extent))
        if wanted <= self.arena.free_extents:
            return None
        return Allowance(due, self.arena.free_extents + self.arena.idle_extents - sum(due.values()))

    def make_room(self, demand: Demand, dropping: Mapping[PoolKey, Sequence[int]] | None = None) -> None:
        """Makes sure that ``demand`` fits: a growable arena grows, any other raises CacheFullError."""
        if self.fits(demand, dropping) and not self.growable:
            return
        missing = self.missing_extents(demand, dropping)
        if self.growable:
            if missing > 0:
                self.arena.grow(max(missing, self.arena.n_extents))
            return
        raise CacheFullError("the KV cache is full")  # `CacheManager` says what fits

    # ------------------------------------------------------------------------------------------------------ blocks

    def take(self, key: PoolKey, allowance: Allowance | None) -> int:
        """A new block, within the allowance of a demand that was found to fit."""
        pool = self.pools[key]
        active = pool.active_extents
        block = pool.allocate(early=allowance is None or allowance.of(key))
        if block is None:
            raise AssertionError(f"pool {pool.name} has no room, although it was found to have")
        if allowance is not None and pool.active_extents > active:
            allowance.spend(key)
        return block

    def drop(self, group: int, state: State, block: int) -> None:
        """Drops one reference; a twin does not outlive either of its blocks."""
        if self.pools[group, state].unref(block) == 0:
            self.forget_twin(group, block if state == "raw" else self.twin_of.get((group, block), -1))

    def forget_twin(self, group: int, raw: int) -> None:
        """The packed twin of a raw block, if there is one, is no longer known as such."""
        twin = self.twins.pop((group, raw), None)
        if twin is not None:
            del self.twin_of[group, twin.packed]

    def publish(self, group: int, state: State, block: int, final: tuple[BlockHash, bytes]) -> None:
        """Makes a finished, referenced block findable, unless another that is in use holds the same."""
        pool, (key, tokens) = self.pools[group, state], final
        if pool.findable(block):
            return
        entry = self.index.get(group, key)
        if entry is not None:
            old = self.pools[group, entry.state]
            if old.refcount(entry.block):
                return
            self.index.forget(group, entry.state, entry.block)
            old.unmark(entry.block)
        self.index.put(group, key, PrefixEntry(state, block, tokens))
        pool.mark(block)

    def drop_tail(self, group: int, table: GroupTable, keep: int) -> None:
        """Lets go of all blocks from block index ``keep`` on, the last first, so that they are also evicted first."""
        for index, block in reversed(list(table.blocks())):
            if index < keep:
                break
            self.drop(group, table.state_of(index), block)
            table.ids.pop()
            self.entries -= 1
        if keep < table.kept_end:
            self.drop_kept(group, table)
            table.kept_end = table.sink_end

    def drop_kept(self, group: int, table: GroupTable) -> None:
        """Lets go of what retention left, whatever then stands in its place."""
        for block in reversed(table.kept):
            self.drop(group, self.specs[group].kept_state, block)
        self.entries -= table.kept_entries
        table.kept, table.kept_entries = (), 0

    def finish(self, seals: Iterable[Seal]) -> None:
        """The caller has encoded ``seals``: raw blocks are let go, packed ones become findable."""
        for seal in seals:
            _done(self.sealing, seal)
            where = (seal.group, seal.packed_id)
            if seal.encode:
                self.encoding.discard(where)
            if where not in self.encoding:
                final = self.publish_later.pop(where, None)
                if final is not None:
                    self.publish(seal.group, "packed", seal.packed_id, final)
            self.drop(seal.group, "raw", seal.raw_id)
            self.drop(seal.group, "packed", seal.packed_id)

    def finish_unseals(self, unseals: Iterable[Unseal]) -> None:
        """The caller has decoded ``unseals``: both ends are let go."""
        for unseal in unseals:
            _done(self.unsealing, unseal)
            self.drop(unseal.group, "packed", unseal.packed_id)
            self.drop(unseal.group, "raw", unseal.raw_id)


def _done(under_way: Counter[_Job], job: _Job) -> None:
    if under_way[job] < 1:
        del under_way[job]
        raise RequestError(f"{job} is not under way", why="it was finished before, or never returned")
    under_way[job] -= 1
    if not under_way[job]:
        del under_way[job]


def table_entries(budget_bytes: int, specs: Sequence[GroupSpec]) -> int:
    """Entries of block tables that a budget sets room aside for; the rest of it is for blocks of the groups ``specs``.

    An unshared sequence needs an entry for each of its blocks, and where retention has run for each of its pages;
    sharing needs more entries than there are blocks.
    """
    unshared = 0
    for spec in specs:
        per_block = 1 if spec.rule is None else 1 + spec.pages * spec.page_entries
        unshared = max(unshared, *(-(-budget_bytes * per_block // size) for size in _sizes(spec)))
    return max(unshared, budget_bytes // _TABLE_SHARE // TABLE_ENTRY_BYTES)


def block_sizes(specs: Sequence[GroupSpec]) -> list[int]:
    """Bytes of a block, for every pool of the groups."""
    return [size for spec in specs for size in _sizes(spec)]


def _sizes(spec: GroupSpec) -> list[int]:
    sizes = [spec.raw_block_bytes] + ([spec.packed_block_bytes] if spec.seals else [])
    if min(sizes) < 1 or any(size % ALIGN for size in sizes):
        raise ValueError(f"group {spec.name}: block bytes must be positive multiples of {ALIGN}, got {sizes}")
    return sizes
