"""Retention in the books: room for what is kept, and the change of blocks once it lies there.

What is kept goes to new blocks, so that shared ones stay as they are and everything can still be undone: reserve, move
the tokens, then keep; or roll back. Kept blocks are never written again, so forks share them.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvfold.errors import RequestError
from kvfold.memory.books import Books, SequenceState
from kvfold.memory.reservation import Demand, Keeping
from kvfold.memory.table import GroupTable, PoolKey, SeqId

__all__ = ["candidates", "demand_keep", "has_to_drop", "keep", "reserve_keep", "rollback_keep"]


def demand_keep(books: Books, length: int) -> Demand:
    """The blocks that retention of a sequence of ``length`` tokens may need. Pure."""
    blocks: dict[PoolKey, int] = {}
    entries = 0
    for group, spec in enumerate(books.specs):
        if spec.rule is not None:
            count = spec.kept_blocks(length, books.block_size)
            blocks[group, spec.kept_state] = count
            entries += count * (1 + spec.pages * spec.page_entries)
    return Demand(blocks, entries=entries)


def has_to_drop(books: Books, seq: SeqId) -> bool:
    """Whether retention would drop anything of a sequence. Pure."""
    state = books.settled(seq)
    return any(_end(books, state, group) is not None for group in range(len(books.specs)))


def reserve_keep(books: Books, seq: SeqId) -> Keeping | None:
    """Blocks for what retention leaves of a sequence: all of them, or CacheFullError and nothing has changed. None if
    no group has anything to drop.
    """
    state = books.settled(seq)
    ends = tuple(_end(books, state, group) for group in range(len(books.specs)))
    if all(end is None for end in ends):
        return None
    demand = demand_keep(books, state.length)
    books.make_room(demand)
    allowance = books.allowance(demand)
    blocks = tuple(
        tuple(
            books.take((group, spec.kept_state), allowance)
            for _ in range(0 if end is None else spec.kept_blocks(state.length, books.block_size))
        )
        for group, (spec, end) in enumerate(zip(books.specs, ends, strict=True))
    )
    state.keeping = Keeping(seq, blocks, ends)
    return state.keeping


def _end(books: Books, state: SequenceState, group: int) -> int | None:
    """Where the blocks end that retention would replace; None if all that is there may stay."""
    spec, table, size = books.specs[group], state.tables[group], books.block_size
    if spec.rule is None:
        return None
    end = max(table.kept_end, spec.candidates_end(state.length, size))
    have = (len(table.kept) + end - table.kept_end) * spec.pages
    return end if spec.kept_pages(state.length, size) < have else None


def candidates(books: Books, keeping: Keeping, group: int) -> list[int]:
    """Ids of the blocks, behind what was kept before, that retention is about to replace, in order."""
    table = books.state(keeping.seq).tables[group]
    end = keeping.end[group]
    return [] if end is None else list(table.ids[table.place(table.kept_end) : table.place(end)])


def keep(books: Books, keeping: Keeping, used: Sequence[int], entries: Sequence[int]) -> None:
    """What was kept lies in the first ``used[group]`` of the reserved blocks, with ``entries[group]`` table entries:
    they take the place of what it was kept of, which is let go, as are the blocks not used.
    """
    state = _open(books, keeping)
    for group, table in enumerate(state.tables):
        end = keeping.end[group]
        if end is not None:
            _replace(books, group, table, candidates(books, keeping, group), keeping.blocks[group], used[group])
            books.entries += entries[group]
            table.kept_entries, table.kept_end = entries[group], end
    state.keeping = None
    # What follows is computed from what was kept: nobody may find it by the tokens alone.
    state.hashable = False
    state.quiet_until = 0
    books.touch(state)


def _replace(
    books: Books, group: int, table: GroupTable, old: Sequence[int], fresh: tuple[int, ...], used: int
) -> None:
    """The first ``used`` of the ``fresh`` blocks in the place of kept and ``old`` ones."""
    state, first = books.specs[group].kept_state, table.place(table.kept_end)
    del table.ids[first : first + len(old)]
    books.entries -= len(old)
    books.drop_kept(group, table)
    for block in (*reversed(old), *fresh[used:]):
        books.drop(group, state, block)
    table.kept, table.view = fresh[:used], None


def rollback_keep(books: Books, keeping: Keeping) -> None:
    """Gives back everything that `reserve_keep` took."""
    state = _open(books, keeping)
    for group, blocks in enumerate(keeping.blocks):
        for block in reversed(blocks):
            books.drop(group, books.specs[group].kept_state, block)
    state.keeping = None


def _open(books: Books, keeping: Keeping) -> SequenceState:
    state = books.state(keeping.seq)
    if state.keeping is not keeping:
        raise RequestError(f"the retention of sequence {keeping.seq} is not open", why="it is done or undone")
    return state
