"""What a step asks of the books and what it gets: demands, reservations, and the work they leave to the caller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from kvfold.memory.table import GroupSpec, PoolKey, SeqId, State

__all__ = ["NOTHING", "Copy", "Demand", "GroupPlan", "Keeping", "Reservation", "Run", "Seal", "Unseal", "plan_group"]


class Run(NamedTuple):
    """Some of a step's new tokens in one block.

    Tokens ``token_start, token_start + 1, ...`` of the step (counted from 0 within the sequence's new tokens) go to
    slots ``[slot_start, slot_stop)`` of block ``block_id`` in the pool of ``state``. Their first position is
    ``block_index * block_size + slot_start``, which is the reservation's ``start + token_start``.
    """

    state: State
    block_id: int
    block_index: int
    slot_start: int
    slot_stop: int
    token_start: int


class Copy(NamedTuple):
    """Copy on write: block ``src`` must be copied to ``dst`` (same group, same pool) before the step writes."""

    group: int
    state: State
    src: int
    dst: int


class Seal(NamedTuple):
    """Raw block ``raw_id`` became ``packed_id``. ``encode``: the caller must encode it; False: another sequence's seal
    does.
    """

    group: int
    raw_id: int
    packed_id: int
    encode: bool = True


class Unseal(NamedTuple):
    """Packed block ``packed_id`` was cut through: the caller must decode it into ``raw_id``."""

    group: int
    packed_id: int
    raw_id: int


class Reservation(NamedTuple):
    """Room for ``new_tokens`` tokens of ``seq`` from position ``start`` on.

    ``runs[group]`` cover ``[start, start + new_tokens)`` in order, but for tokens that a sliding window has passed by
    the end of the step: those need no room.
    """

    seq: SeqId
    start: int
    new_tokens: int
    copies: tuple[Copy, ...]
    runs: tuple[tuple[Run, ...], ...]


class Keeping(NamedTuple):
    """Room for what retention is about to keep of ``seq``: ``blocks[group]``, in the place of all blocks before
    ``end[group]`` but those of the sinks; None where everything stays.
    """

    seq: SeqId
    blocks: tuple[tuple[int, ...], ...]
    end: tuple[int | None, ...]


class Demand(Mapping[PoolKey, int]):
    """Blocks a step may need at worst, by pool. Demands add up; seals of a shared block are counted once.

    ``shared``: (group, raw id) of shared blocks that would seal. ``pinned``: cached blocks that would be taken back
    into use. ``entries``: new entries of block tables.
    """

    __slots__ = ("_blocks", "entries", "pinned", "shared")

    def __init__(
        self,
        blocks: Mapping[PoolKey, int] | None = None,
        *,
        shared: frozenset[tuple[int, int]] = frozenset(),
        pinned: frozenset[tuple[PoolKey, int]] = frozenset(),
        entries: int = 0,
    ) -> None:
        self._blocks = {key: count for key, count in (blocks or {}).items() if count}
        self.shared = shared
        self.pinned = pinned
        self.entries = entries

    def totals(self) -> dict[PoolKey, int]:
        """Blocks by pool, shared seals included."""
        if not self.shared:
            return self._blocks
        totals = dict(self._blocks)
        for group, _ in self.shared:
            totals[group, "packed"] = totals.get((group, "packed"), 0) + 1
        return totals

    def __getitem__(self, key: PoolKey) -> int:
        return self.totals()[key]

    def __iter__(self) -> Iterator[PoolKey]:
        return iter(self.totals())

    def __len__(self) -> int:
        return len(self.totals())

    def __add__(self, other: Demand) -> Demand:
        if not isinstance(other, Demand):
            return NotImplemented
        if self is NOTHING or other is NOTHING:
            return other if self is NOTHING else self
        blocks = dict(self._blocks)
        for key, count in other._blocks.items():
            blocks[key] = blocks.get(key, 0) + count
        return Demand(
            blocks,
            shared=self.shared | other.shared,
            pinned=self.pinned | other.pinned,
            entries=self.entries + other.entries,
        )

    def __repr__(self) -> str:
        return f"Demand({self.totals()}, pinned={len(self.pinned)}, entries={self.entries})"


NOTHING: Final = Demand()
"""The demand of a step that takes no block."""


class GroupPlan(NamedTuple):
    """What becomes of one group's blocks in a step from ``start`` to ``end`` tokens. Ranges are of block indices.

    ``write``: first position that is stored. ``tail``: whether the last block there is gets written. New blocks are
    ``[new, stop)``, of which ``[direct, direct_stop)`` are packed at once. Blocks ``[seal, seal_stop)`` there are seal
    at the end; those before ``live`` are released; packed blocks then end at ``packed_end``.
    """

    write: int
    tail: bool
    new: int
    stop: int
    direct: int
    direct_stop: int
    seal: int
    seal_stop: int
    packed_end: int
    live: int

    @property
    def raw_blocks(self) -> int:
        """New raw blocks, copies not counted."""
        return self.stop - self.new - (self.direct_stop - self.direct)


def plan_group(
    spec: GroupSpec, block_size: int, *, start: int, end: int, packed_end: int, first: int = 0, expected: int = 0
) -> GroupPlan:
    """The plan for a group whose packed blocks end at ``packed_end``; those before ``first`` are gone. ``expected``:
    the length the sequence is on its way to; what is packed there is packed as soon as it is whole. Pure.
    """
    there, stop = -(-start // block_size), -(-end // block_size)
    live = max(first, spec.live(end, block_size))
    ahead = min(spec.packed_end(expected, block_size), end // block_size) if expected > end else 0
    packed_after = max(packed_end, spec.packed_end(end, block_size), ahead)
    sink_end = spec.sink_end(block_size)
    new = min(max(there, live), stop)
    direct = max(new, sink_end)
    direct_stop = max(direct, min(packed_after, stop))
    seal = max(packed_end, sink_end, live)
    return GroupPlan(
        write=min(max(start, live * block_size), end),
        tail=start % block_size != 0 and live < there,
        new=new,
        stop=stop,
        direct=direct,
        direct_stop=direct_stop,
        seal=seal,
        seal_stop=max(seal, min(packed_after, there)),
        packed_end=packed_after,
        live=live,
    )
