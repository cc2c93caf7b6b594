"""What the books know of one sequence: for every layer group, its live blocks in order and their states.

The blocks of a sequence in one group lie in three stretches: sinks (raw), then packed ones, then the raw tail; those a
sliding window has passed are gone from the front. While a reservation is open, the blocks it took follow behind. Once
retention has run, fewer blocks stand in the place of the first ones behind the sinks: they hold what was kept of them,
and have no position of their own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kvfold.formats import first_live, sealed_until, sink_blocks
from kvfold.rule import KeepRule

__all__ = ["GroupSpec", "GroupTable", "Ids", "PoolKey", "SeqId", "State", "TableView"]

State = Literal["raw", "packed"]
"""Which pool of its group a block belongs to."""

PoolKey = tuple[int, State]
"""(group number, state)."""

SeqId = int
"""A sequence's number; never used twice."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A layer group, as far as the books care: what a block weighs, and the rules its blocks live by.

    ``packed_block_bytes`` 0: never packed. ``sinks``, ``recent``, ``window``: tokens; ``kind`` as in
    `formats.first_live`. ``margin``: a window also keeps what it needs to go back by so many tokens. ``pages``: of a
    block, one for each layer and KV head. ``rule``: what retention leaves; None where everything stays.
    ``page_entries``: table entries that a kept page takes, its logit biases included.
    """

    name: str
    raw_block_bytes: int
    packed_block_bytes: int = 0
    sinks: int = 0
    recent: int = 0
    kind: str = "full"
    window: int | None = None
    margin: int = 0
    pages: int = 1
    rule: KeepRule | None = None
    page_entries: int = 1

    @property
    def seals(self) -> bool:
        """Whether any block is ever packed. Where the recent tokens cover the window, blocks leave before they could
        be.
        """
        short = (
            self.kind in ("sliding", "chunked")
            and self.window is not None
            and self.window + self.margin - 1 <= self.recent
        )
        return self.packed_block_bytes > 0 and not short

    def sink_end(self, block_size: int) -> int:
        """Blocks at the start that never seal."""
        return sink_blocks(self.sinks, block_size)

    def packed_end(self, length: int, block_size: int) -> int:
        """End of the packed stretch by the sealing rule; 0 if nothing seals."""
        return sealed_until(length, block_size, self.sinks, self.recent) if self.seals else 0

    @property
    def kept_state(self) -> State:
        """State of the blocks that hold what retention kept: those of the candidates, whose codes are moved."""
        return "packed" if self.seals else "raw"

    def candidates_end(self, length: int, block_size: int) -> int:
        """One past the last block from which retention may drop tokens; those before the sinks' end never are."""
        return sealed_until(length, block_size, self.sinks, self.recent)

    def kept_pages(self, length: int, block_size: int) -> int:
        """Pages that retention leaves of the candidates of a sequence of ``length`` tokens."""
        if self.rule is None:
            raise ValueError(f"group {self.name} has no retention")
        return self.rule.pages(length, self.pages, block_size=block_size, sinks=self.sinks, recent=self.recent)

    def kept_blocks(self, length: int, block_size: int) -> int:
        """Blocks that hold those pages; 0 where everything stays."""
        return 0 if self.rule is None else -(-self.kept_pages(length, block_size) // self.pages)

    def live(self, length: int, block_size: int) -> int:
        """First live block of a sequence of ``length`` tokens."""
        return first_live(max(0, length - self.margin), block_size, self.kind, self.window)


class TableView(NamedTuple):
    """Live blocks of a sequence in a group, by state, in position order (block index * block size), without those that
    hold what retention kept. int64.
    """

    raw_ids: Ids
    raw_block_index: Ids
    packed_ids: Ids
    packed_block_index: Ids


class GroupTable:
    """The blocks of one sequence in one group: ``ids[i]`` is block ``first + i``, packed if in ``[sink_end,
    packed_end)``.

    Where retention has run, no ids stand for blocks ``[sink_end, kept_end)``; the blocks ``kept`` hold what is left of
    them, for which the table has ``kept_entries``. Such groups release nothing: ``first`` is 0.

    ``more``: blocks of an open reservation, from block ``more_first`` on, packed if in ``[direct_start, direct_stop)``.
    """

    __slots__ = (
        "direct_start",
        "direct_stop",
        "first",
        "ids",
        "kept",
        "kept_end",
        "kept_entries",
        "more",
        "more_first",
        "packed_end",
        "sink_end",
        "view",
    )

    def __init__(self, sink_end: int) -> None:
        self.sink_end = sink_end
        self.first = 0
        self.ids: array[int] = array("q")
        self.packed_end = 0
        self.kept: tuple[int, ...] = ()
        self.kept_end = sink_end
        self.kept_entries = 0
        self.more: array[int] = array("q")
        self.more_first = self.direct_start = self.direct_stop = 0
        self.view: TableView | None = None

    @property
    def stop(self) -> int:
        """One past the last block."""
        return self.first + len(self.ids) + self.gap

    @property
    def gap(self) -> int:
        """Blocks that retention has replaced."""
        return self.kept_end - self.sink_end

    @property
    def entries(self) -> int:
        """Table entries of its blocks and kept pages, those of an open reservation aside."""
        return len(self.ids) + self.kept_entries

    def place(self, index: int) -> int:
        """Where in ``ids`` block ``index`` stands."""
        return index - self.first - (self.gap if index >= self.sink_end else 0)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(block index, id) of its blocks, in order, without the kept ones."""
        for index, block in enumerate(self.ids, self.first):
            yield (index if index < self.sink_end else index + self.gap), block

    def state_of(self, index: int) -> State:
        """State of block ``index``."""
        return "packed" if self.sink_end <= index < self.packed_end else "raw"

    def copy(self) -> GroupTable:
        """The same blocks for another sequence."""
        other = GroupTable(self.sink_end)
        other.first, other.ids, other.packed_end, other.view = self.first, self.ids[:], self.packed_end, self.view
        other.kept, other.kept_end, other.kept_entries = self.kept, self.kept_end, self.kept_entries
        return other

    def make_view(self) -> TableView:
        """The blocks as arrays of their own, those of an open reservation included."""
        if self.view is None:
            ids = np.array(self.ids, dtype=np.int64)
            index = np.arange(self.first, self.first + len(ids), dtype=np.int64)
            index[index >= self.sink_end] += self.gap
            a, b = _within(self.sink_end, self.packed_end - self.gap, self.first, len(ids))
            raw, packed = [ids[:a], ids[b:]], [ids[a:b]]
            raw_at, packed_at = [index[:a], index[b:]], [index[a:b]]
            if self.more:
                ids = np.array(self.more, dtype=np.int64)
                index = np.arange(self.more_first, self.more_first + len(ids), dtype=np.int64)
                a, b = _within(self.direct_start, self.direct_stop, self.more_first, len(ids))
                raw += [ids[:a], ids[b:]]
                packed.append(ids[a:b])
                raw_at += [index[:a], index[b:]]
                packed_at.append(index[a:b])
            join = np.concatenate
            self.view = TableView(join(raw), join(raw_at), join(packed), join(packed_at))
        return self.view


def _within(start: int, stop: int, first: int, count: int) -> tuple[int, int]:
    """Blocks ``[start, stop)`` as a slice of a list of ``count`` blocks that begins with block ``first``."""
    a = min(max(start - first, 0), count)
    return a, max(a, min(stop - first, count))
