"""Every invariant of the books, checked from scratch."""

from __future__ import annotations

from collections import Counter

import numpy as np

from kvfold.formats import first_live
from kvfold.memory.books import Books, SequenceState
from kvfold.memory.prefix import chain, root_hash
from kvfold.memory.table import SeqId, State

__all__ = ["audit"]

_Block = tuple[int, State, int]


def audit(books: Books) -> None:
    """Raises AssertionError if anything in the books contradicts anything else."""
    references: Counter[_Block] = Counter()
    entries = 0
    for seq, state in books.sequences.items():
        entries += _audit_sequence(books, seq, state, references)
    for seal, count in books.sealing.items():
        references[seal.group, "raw", seal.raw_id] += count
        references[seal.group, "packed", seal.packed_id] += count
    for unseal, count in books.unsealing.items():
        references[unseal.group, "packed", unseal.packed_id] += count
        references[unseal.group, "raw", unseal.raw_id] += count
    _must(entries == books.entries, f"{entries} table entries, counted {books.entries}")
    _must(entries <= books.max_entries, "more table entries than allowed")
    _audit_pools(books, references)
    _audit_index(books)
    for (group, raw), twin in books.twins.items():
        _must(books.pools[group, "raw"].refcount(raw) > 0, "a twin of a block nobody references")
        _must(books.pools[group, "packed"].refcount(twin.packed) > 0, "a twin nobody references")
        _must(books.twin_of.get((group, twin.packed)) == raw, "a twin of two blocks")
    _must(len(books.twins) == len(books.twin_of), "twins in one direction only")
    jobs = {(seal.group, seal.packed_id) for seal in books.sealing}
    _must(books.encoding == {(s.group, s.packed_id) for s in books.sealing if s.encode}, "blocks to be encoded")
    _must(books.publish_later.keys() <= jobs, "a block to be published that nobody seals")


def _audit_sequence(books: Books, seq: SeqId, state: SequenceState, references: Counter[_Block]) -> int:
    """Adds the sequence's references; the number of its table entries."""
    size, entries = books.block_size, 0
    _must(state.pending is not None or state.work is None, f"sequence {seq} has work without a reservation")
    _must(len(state.hashes) <= len(state.tokens) // size, f"sequence {seq} has more hashes than blocks")
    _must(not state.hashable or len(state.tokens) == state.length, f"sequence {seq} does not know its tokens")
    data = list(chain(root_hash(books.fingerprint, state.salt or b""), state.tokens, size))
    _must(state.hashes == [key for key, _ in data[: len(state.hashes)]], f"sequence {seq} has wrong hashes")
    for group, (spec, table) in enumerate(zip(books.specs, state.tables, strict=True)):
        where = f"sequence {seq}, group {spec.name}"
        _must(table.stop == -(-state.length // size), f"{where}: blocks end at {table.stop}, length {state.length}")
        # A truncated sequence lacks what the margin would have kept behind its window.
        needed = first_live(state.length, size, spec.kind, spec.window)
        _must(spec.live(state.length, size) <= table.first <= needed or not table.ids, f"{where}: live blocks")
        _must(table.packed_end <= max(table.sink_end, state.length // size), f"{where}: a partial block is packed")
        _must(
            max(table.packed_end, table.sink_end) >= spec.packed_end(state.length, size),
            f"{where}: a block did not seal",
        )
        _must(state.pending is not None or not table.more, f"{where}: blocks of no reservation")
        for index, block in table.blocks():
            references[group, table.state_of(index), block] += 1
        for block in table.kept:
            references[group, spec.kept_state, block] += 1
        _must(not table.gap or table.first == 0, f"{where}: both released and retained")
        _must(not table.gap or table.kept_end * size <= state.length, f"{where}: retention has run ahead")
        for index, block in enumerate(table.more, table.more_first):
            direct = table.direct_start <= index < table.direct_stop
            references[group, "packed" if direct else "raw", block] += 1
        entries += table.entries + len(table.more)
        if table.view is not None:
            view, table.view = table.view, None
            same = all(np.array_equal(old, new) for old, new in zip(view, table.make_view(), strict=True))
            table.view = view
            _must(same, f"{where}: a stale view")
    for group, blocks in enumerate(state.keeping.blocks if state.keeping else ()):
        for block in blocks:
            references[group, books.specs[group].kept_state, block] += 1
    for group, work in enumerate(state.work or ()):
        if work.copied >= 0:
            references[group, "raw", work.copied] += 1
        for _, packed in work.seals:
            references[group, "packed", packed] += 1
    return entries


def _audit_pools(books: Books, references: Counter[_Block]) -> None:
    held: set[int] = set()
    for (group, kind), pool in books.pools.items():
        pool.check()
        expected = {block: n for (g, k, block), n in references.items() if (g, k) == (group, kind)}
        found = pool.references()
        _must(found == expected, f"pool {pool.name}: references {found}, expected {expected}")
        _must(not held & pool.held(), f"pool {pool.name} holds another pool's extent")
        held |= pool.held()
    _must({(g, k) for g, k, _ in references} <= books.pools.keys(), "a block of no pool")
    books.arena.check(held)
    used = sum(pool.used_blocks * pool.block_bytes for pool in books.pools.values())
    _must(used <= books.arena.total_bytes, "more bytes in use than there are")
    if not books.growable:
        total = books.arena.total_bytes + 8 * books.max_entries
        _must(total <= books.budget_bytes, f"arena and tables take {total} of {books.budget_bytes} bytes")


def _audit_index(books: Books) -> None:
    books.index.check()
    findable = set(books.index.blocks())
    for group, kind, block in findable:
        _must(books.pools[group, kind].findable(block), f"the index points at block {block} of {group}, {kind}")
    marked = sum(len(pool.marked()) for pool in books.pools.values())
    _must(marked == len(findable), f"{marked} blocks are marked findable, {len(findable)} are")


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
