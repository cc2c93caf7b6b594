"""Sequences that share blocks: prefix hits, forks, truncation, and letting go."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from kvfold.errors import CacheFullError, RequestError, UnsupportedError
from kvfold.formats import first_live
from kvfold.memory.books import Allowance, Books, SequenceState
from kvfold.memory.prefix import BlockHash, PrefixEntry, chain, root_hash
from kvfold.memory.reservation import Demand, Unseal
from kvfold.memory.table import GroupTable, PoolKey, SeqId

__all__ = ["Hit", "adopt", "create", "find", "fork", "free", "pins", "truncate"]


class Hit(NamedTuple):
    """What the index holds of a prompt: ``blocks[group]`` from block ``first[group]`` on, and all hashes."""

    blocks: tuple[tuple[PrefixEntry, ...], ...]
    first: tuple[int, ...]
    hashes: tuple[BlockHash, ...]


def create(books: Books) -> SeqId:
    """A new, empty sequence."""
    tables = [GroupTable(spec.sink_end(books.block_size)) for spec in books.specs]
    return _enter(books, SequenceState(tables, hashable=books.prefix_caching))


def _enter(books: Books, state: SequenceState) -> SeqId:
    seq = books.next_id
    books.next_id += 1
    books.sequences[seq] = state
    books.touch(state)
    return seq


def find(books: Books, tokens: Sequence[int], salt: bytes, *, exactly: int | None = None) -> Hit:
    """The longest prefix of ``tokens`` that every group still has the needed blocks of (``exactly``: that many tokens
    or none). Whole blocks only, and never all tokens.
    """
    size = books.block_size
    limit = (len(tokens) - 1) // size if exactly is None else exactly // size
    hashes: list[BlockHash] = []
    found: list[list[PrefixEntry | None]] = [[] for _ in books.specs]
    whole = [spec.window is None or spec.kind not in ("sliding", "chunked") for spec in books.specs]
    root = root_hash(books.fingerprint, salt)
    for key, piece in chain(root, tokens[: limit * size], size) if books.prefix_caching else ():
        entries = [books.index.find(group, key, piece) for group in range(len(books.specs))]
        if any(entry is None and need for entry, need in zip(entries, whole, strict=True)):
            break
        hashes.append(key)
        for group, entry in enumerate(entries):
            found[group].append(entry)
    count = _longest(books, found, len(hashes))
    if exactly is not None and count * size != exactly:
        count = 0
    first = tuple(spec.live(count * size, size) for spec in books.specs)
    blocks = tuple(
        tuple(entry for entry in entries[begin:count] if entry is not None)
        for begin, entries in zip(first, found, strict=True)
    )
    return Hit(blocks, first, tuple(hashes[:count]))


def _longest(books: Books, found: Sequence[Sequence[PrefixEntry | None]], limit: int) -> int:
    """The largest number of blocks for which each group has all its live blocks."""
    size = books.block_size
    unbroken = []  # per group and block: how many blocks in a row are there, this one the last
    for entries in found:
        runs, row = [], 0
        for entry in entries:
            row = row + 1 if entry is not None else 0
            runs.append(row)
        unbroken.append(runs)
    for count in range(limit, 0, -1):
        if all(
            runs[count - 1] >= count - spec.live(count * size, size)
            for spec, runs in zip(books.specs, unbroken, strict=True)
        ):
            return count
    return 0


def pins(books: Books, hit: Hit) -> Demand:
    """The demand of adopting ``hit``: its blocks that are only cached would be in use again."""
    pinned: set[tuple[PoolKey, int]] = set()
    for group, entries in enumerate(hit.blocks):
        for entry in entries:
            if books.pools[group, entry.state].refcount(entry.block) == 0:
                pinned.add(((group, entry.state), entry.block))
    return Demand(pinned=frozenset(pinned), entries=sum(map(len, hit.blocks)))


def adopt(books: Books, seq: SeqId, tokens: Sequence[int], count: int, salt: bytes) -> None:
    """Attaches the findable blocks of the first ``count`` tokens to an empty sequence."""
    state, size = books.settled(seq), books.block_size
    if state.length or state.tokens:
        raise RequestError(f"sequence {seq} is not empty", why="only a new sequence can take blocks from the index")
    if not 0 <= count < max(1, len(tokens)) or count % size:
        raise RequestError(
            f"{count} of {len(tokens)} tokens", why="a prefix hit has whole blocks and leaves a token to do"
        )
    hit = find(books, tokens, salt, exactly=count)
    if len(hit.hashes) * size != count:
        raise RequestError(f"the first {count} tokens are not in the prefix index", why="they were evicted since")
    if not books.entries_fit(entries := sum(map(len, hit.blocks))):
        raise CacheFullError("the KV cache is full")  # its block tables are; `CacheManager` says what fits
    for group, (table, blocks) in enumerate(zip(state.tables, hit.blocks, strict=True)):
        for entry in blocks:
            books.pools[group, entry.state].ref(entry.block)
        table.first = hit.first[group]
        table.ids = array("q", [entry.block for entry in blocks])
        table.packed_end = count // size if books.specs[group].seals else 0
        table.view = None
    books.entries += entries
    state.length = count
    state.salt = salt
    state.tokens = array("q", tokens[:count])
    state.hashes = list(hit.hashes)
    books.query_tokens += len(tokens)
    books.hit_tokens += count
    books.touch(state)


def fork(books: Books, seq: SeqId) -> SeqId:
    """A sequence with the same tokens in the same blocks."""
    state = books.settled(seq)
    entries = sum(table.entries for table in state.tables)
    if not books.entries_fit(entries):
        raise CacheFullError("the KV cache is full")  # its block tables are; `CacheManager` says what fits
    child = SequenceState([table.copy() for table in state.tables], hashable=state.hashable)
    child.length, child.expected, child.salt = state.length, state.expected, state.salt
    child.tokens, child.hashes = state.tokens[:], state.hashes[:]
    for group, table in enumerate(state.tables):
        for index, block in table.blocks():
            books.pools[group, table.state_of(index)].ref(block)
        for block in table.kept:
            books.pools[group, books.specs[group].kept_state].ref(block)
    books.entries += entries
    state.quiet_until = 0  # the last blocks are shared now
    return _enter(books, child)


def free(books: Books, seq: SeqId) -> None:
    """Ends a sequence (its open reservation must have been rolled back)."""
    state = books.settled(seq)
    del books.sequences[seq]
    for group, table in enumerate(state.tables):
        books.drop_tail(group, table, 0)


def truncate(books: Books, seq: SeqId, length: int) -> tuple[Unseal, ...]:
    """Keeps the first ``length`` tokens of a sequence: everything or, with an error, nothing happens."""
    state, size = books.settled(seq), books.block_size
    if not 0 <= length <= state.length:
        raise RequestError(f"cannot truncate {state.length} tokens to {length}")
    keep = -(-length // size)
    gone = []
    for spec, table in zip(books.specs, state.tables, strict=True):
        needed, there = first_live(length, size, spec.kind, spec.window), min(table.first, keep)
        if needed < there:
            gone.append(f"group {spec.name} has released positions {needed * size} to {there * size - 1}")
        if table.gap and table.sink_end * size < length < table.kept_end * size:
            gone.append(f"retention has dropped tokens of group {spec.name} before position {table.kept_end * size}")
    if gone:
        raise UnsupportedError(f"sequence {seq} cannot go back from {state.length} to {length} tokens", gone)
    if length == state.length:
        return ()
    cut = [group for group, table in enumerate(state.tables) if length % size and table.state_of(keep - 1) == "packed"]
    need = Demand({(group, "raw"): 1 for group in cut})
    if cut:
        books.make_room(need, _only_here(books, state, keep))
    for group, table in enumerate(state.tables):
        books.drop_tail(group, table, keep)
        table.packed_end = min(table.packed_end, length // size)
        if not table.ids and not table.gap:
            table.first = keep
        table.view = None
    allowance = books.allowance(need)
    unseals = [_unseal(books, state, group, allowance) for group in cut]
    state.length, state.expected = length, min(state.expected, length)
    del state.tokens[length:]
    del state.hashes[length // size :]
    if books.prefix_caching and len(state.tokens) == length and not any(table.gap for table in state.tables):
        state.hashable = True  # what was not known is gone
        state.salt = state.salt if length else None
    state.quiet_until = 0
    books.touch(state)
    return tuple(unseals)


def _only_here(books: Books, state: SequenceState, keep: int) -> dict[PoolKey, list[int]]:
    """The blocks of a sequence from block index ``keep`` on that nobody else references."""
    blocks: dict[PoolKey, list[int]] = {}
    for group, table in enumerate(state.tables):
        for index, block in table.blocks():
            key: PoolKey = (group, table.state_of(index))
            if index >= keep and books.pools[key].refcount(block) == 1:
                blocks.setdefault(key, []).append(block)
    return blocks


def _unseal(books: Books, state: SequenceState, group: int, allowance: Allowance | None) -> Unseal:
    """A raw block in the place of the last, packed one. Both keep a reference until the caller has decoded."""
    table = state.tables[group]
    raw = books.take((group, "raw"), allowance)
    books.pools[group, "raw"].ref(raw)
    unseal = Unseal(group, table.ids[-1], raw)
    table.ids[-1] = raw
    books.unsealing[unseal] += 1
    return unseal
