"""The memory manager: which blocks exist, who holds them, what fits. Integers only; it never touches the memory itself.

The order of a step: ``adopt`` for new sequences, ``demand``/``fits`` to choose, ``reserve``, then the forward (after
the copies it asks for), ``commit``, encode what it returns, ``finish_seals``. A reservation that is not committed is
rolled back.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from kvfold.errors import RequestError
from kvfold.formats import TABLE_ENTRY_BYTES
from kvfold.memory import keeping, sharing, steps
from kvfold.memory.arena import Arena
from kvfold.memory.audit import audit
from kvfold.memory.books import Books
from kvfold.memory.capacity import UNBOUNDED, Capacity
from kvfold.memory.fullness import saying_what_fits
from kvfold.memory.pool import BlockPool
from kvfold.memory.rehearsal import rehearse
from kvfold.memory.reservation import NOTHING, Copy, Demand, Keeping, Reservation, Run, Seal, Unseal
from kvfold.memory.table import GroupSpec, PoolKey, SeqId, State, TableView
from kvfold.memory.usage import MemoryStats, Usage

__all__ = [
    "CacheManager",
    "Copy",
    "Demand",
    "GroupSpec",
    "Keeping",
    "MemoryStats",
    "PoolKey",
    "Reservation",
    "Run",
    "Seal",
    "SeqId",
    "State",
    "TableView",
    "Unseal",
    "Usage",
]

_REHEARSALS = 256  # answers of can_ever_fit that are remembered


class CacheManager:
    """The books of a KV cache: blocks of ``block_size`` tokens of the layer ``groups``, in ``budget_bytes`` bytes.

    ``growable``: the arena doubles instead of being full (``arena.generation`` tells when). ``fingerprint``: model and
    recipe; blocks are only found again under the same. Raises BudgetError if the budget holds no block. Not
    thread-safe.
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        budget_bytes: int,
        block_size: int,
        *,
        growable: bool = False,
        fingerprint: bytes = b"",
        prefix_caching: bool = True,
    ) -> None:
        if block_size < 1 or not groups:
            raise ValueError(f"block_size must be positive and groups not empty, got {block_size}, {groups}")
        self._asked = budget_bytes
        self._books = Books(
            groups,
            budget_bytes,
            block_size,
            growable=growable,
            fingerprint=fingerprint,
            prefix_caching=prefix_caching,
        )
        self._capacity: tuple[int, Capacity] | None = None
        self._rehearsed: dict[tuple[int, int, int], bool] = {}

    @property
    def arena(self) -> Arena:
        """The arena; allocate ``arena.total_bytes`` bytes, and again when ``arena.generation`` changes."""
        return self._books.arena

    @property
    def groups(self) -> tuple[GroupSpec, ...]:
        """The layer groups."""
        return self._books.specs

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._books.block_size

    def pool(self, group: int, state: str) -> BlockPool:
        """The pool of a group in a state, ``raw`` or ``packed``; RequestError if the group never packs."""
        for key, pool in self._books.pools.items():
            if key == (group, state):
                return pool
        raise RequestError(f"group {group} has no {state} blocks")

    # --------------------------------------------------------------------------------------------------- sequences

    def create(self) -> SeqId:
        """A new, empty sequence."""
        return sharing.create(self._books)

    def expect(self, seq: SeqId, length: int) -> None:
        """A sequence is on its way to ``length`` tokens, those of its prompt: blocks that will be packed there are
        packed as soon as they are whole, so that whatever was stored in earlier steps is read as it will be found
        again.
        """
        state = self._books.settled(seq)
        state.expected, state.quiet_until = length, 0

    def length(self, seq: SeqId) -> int:
        """Tokens of a sequence."""
        return self._books.state(seq).length

    def sequences(self) -> tuple[SeqId, ...]:
        """All sequences, oldest first."""
        return tuple(self._books.sequences)

    def fork(self, seq: SeqId) -> SeqId:
        """A sequence with the same tokens in the same blocks; whoever writes to a shared block first copies it.

        Raises CacheFullError if the block tables are full.
        """
        with self._saying("a fork of a sequence", self.length(seq)):
            return sharing.fork(self._books, seq)

    def free(self, seq: SeqId) -> None:
        """Ends a sequence; an open reservation is rolled back. Findable blocks stay cached, the first ones longest."""
        pending = self._books.state(seq).pending
        if pending is not None:
            steps.rollback(self._books, pending)
        sharing.free(self._books, seq)

    def truncate(self, seq: SeqId, length: int) -> tuple[Unseal, ...]:
        """Keeps the first ``length`` tokens. A packed block that is cut through gets a raw one in its place: decode
        what is returned, then call `finish_unseals`. UnsupportedError if a window has released what would be needed;
        CacheFullError if there is no room for the raw block. With an error, nothing has changed.
        """
        with self._saying(f"going back to {length} tokens", length):
            return sharing.truncate(self._books, seq, length)

    def finish_unseals(self, unseals: Iterable[Unseal]) -> None:
        """The packed blocks have been decoded and are let go."""
        self._books.finish_unseals(unseals)

    # ------------------------------------------------------------------------------------------------- prefix cache

    def match(self, tokens: Sequence[int], salt: bytes = b"") -> int:
        """Tokens that a new sequence beginning with ``tokens`` could take from the index: whole blocks, never all.
        Pure.
        """
        return len(sharing.find(self._books, tokens, salt).hashes) * self._books.block_size

    def adopt(self, seq: SeqId, tokens: Sequence[int], n: int, salt: bytes = b"") -> None:
        """Attaches the cached blocks of the first ``n`` tokens (from `match`) to the empty sequence ``seq``.

        Adopt before anything else of the step is reserved: reserving may evict. RequestError if the blocks are gone.
        """
        with self._saying(f"{n} shared tokens", n):
            sharing.adopt(self._books, seq, tokens, n, salt)

    def reset_prefix_cache(self) -> None:
        """Forgets all findable blocks; those that nobody references are free. Sequences there are keep theirs, and
        nothing of them is found from now on.
        """
        books = self._books
        for group, state, block in books.index.blocks():
            books.index.forget(group, state, block)
            books.pools[group, state].unmark(block)
        books.publish_later.clear()
        for sequence in books.sequences.values():
            sequence.hashable = False
            sequence.tokens, sequence.hashes = array("q"), []

    # -------------------------------------------------------------------------------------------------------- steps

    def demand(self, seq: SeqId, new_tokens: int) -> Demand:
        """Blocks, by pool, that a step of ``new_tokens`` tokens may need. Pure."""
        return steps.demand(self._books, self._books.state(seq), new_tokens)

    def demand_for(
        self,
        length_before: int,
        new_tokens: int,
        *,
        expected: int = 0,
        tokens: Sequence[int] | None = None,
        salt: bytes = b"",
    ) -> Demand:
        """The demand of a sequence that does not exist yet, will have adopted ``length_before`` tokens, and is on its
        way to ``expected`` (see `expect`). Pure.

        With ``tokens`` (the prompt), the cached blocks it will adopt count as taken; without, they do not.
        """
        books = self._books
        need = steps.demand_of_new(books, length_before, new_tokens, expected)
        if tokens is not None and length_before:
            need = need + sharing.pins(books, sharing.find(books, tokens, salt, exactly=length_before))
        return need

    def demand_fork(self, seq: SeqId, new_tokens: int) -> Demand:
        """The demand of a fork of ``seq`` and of a step of ``new_tokens`` tokens on it: of its last blocks it will make
        copies. Pure.
        """
        state = self._books.state(seq)
        copies: dict[PoolKey, int] = {(group, "raw"): 1 for group in range(len(self.groups))}
        return self.demand(seq, new_tokens) + Demand(copies, entries=sum(table.entries for table in state.tables))

    def fits(self, *demands: Demand) -> bool:
        """Whether all ``demands`` can be met at once. Exact for one `reserve`, and for `reserve_many`. Pure."""
        return self._books.fits(sum(demands, NOTHING))

    def reserve(self, seq: SeqId, new_tokens: int) -> Reservation:
        """Room for ``new_tokens`` more tokens: all of it, or CacheFullError and nothing has changed."""
        return self.reserve_many(((seq, new_tokens),))[0]

    def reserve_many(self, wants: Sequence[tuple[SeqId, int]]) -> list[Reservation]:
        """`reserve` for several sequences: all of them, or CacheFullError and nothing has changed.

        Succeeds exactly if their demands fit together. (One after the other, an early one may take a new extent to
        spare a cached block, which a later one then lacks.)
        """
        new = max((count for _, count in wants), default=0)
        longest = max((self.length(seq) + count for seq, count in wants), default=0)
        with self._saying(f"{new:,} new tokens", longest, new, len(wants)):
            return steps.reserve(self._books, wants)

    def commit(
        self, reservation: Reservation, tokens: Sequence[int] | None = None, salt: bytes | None = None
    ) -> tuple[Seal, ...]:
        """Makes the step's tokens part of the sequence, seals and releases blocks.

        Encode the seals that say so, then call `finish_seals`. ``tokens``: the new token ids, so that full blocks can
        be found; a sequence that once got none is not found beyond that point. ``salt``: who may find them; fixed by
        the first use.
        """
        return steps.commit(self._books, reservation, tokens, salt)

    def coming_seals(self, reservation: Reservation) -> list[Seal]:
        """The seals that `commit` of this open reservation will want encoded: encode them before, and a failure can
        still be rolled back. Two reservations may name the same one. Pure.
        """
        return steps.coming_seals(self._books, reservation)

    def finish_seals(self, seals: Iterable[Seal]) -> None:
        """The packed blocks hold their content: they become findable, and the raw ones are let go."""
        self._books.finish(seals)

    def rollback(self, reservation: Reservation) -> None:
        """Undoes a reservation."""
        steps.rollback(self._books, reservation)

    def table(self, seq: SeqId, group: int) -> TableView:
        """Live blocks of a sequence in a group, those of an open reservation included. The arrays stay as they are."""
        return self._books.state(seq).tables[group].make_view()

    def table_version(self, seq: SeqId) -> int:
        """A number that changes whenever any table of the sequence does; no two sequences ever have the same."""
        return self._books.state(seq).version

    # ---------------------------------------------------------------------------------------------------- retention

    def demand_keep(self, length: int) -> Demand:
        """Blocks that retention of a sequence of ``length`` tokens may need beside those it has. Pure."""
        return keeping.demand_keep(self._books, length)

    def has_to_drop(self, seq: SeqId) -> bool:
        """Whether a sequence holds more than retention would leave of it. Pure."""
        return keeping.has_to_drop(self._books, seq)

    def reserve_keep(self, seq: SeqId) -> Keeping | None:
        """Room for what retention leaves of a sequence, None if nothing is to be dropped; CacheFullError and nothing
        has changed. Move the tokens there and `keep`, or `rollback_keep`.
        """
        with self._saying("what retention keeps", self.length(seq)):
            return keeping.reserve_keep(self._books, seq)

    def candidates(self, open_: Keeping, group: int) -> list[int]:
        """Blocks, in order, that retention goes over beside the `kept` ones: sealed ones where the group seals."""
        return keeping.candidates(self._books, open_, group)

    def kept(self, seq: SeqId, group: int) -> tuple[int, ...]:
        """Blocks that hold what retention left of a sequence."""
        return self._books.state(seq).tables[group].kept

    def kept_end(self, seq: SeqId, group: int) -> int:
        """The block from which on a sequence's blocks are as they were; the end of the sinks where retention has not
        run.
        """
        return self._books.state(seq).tables[group].kept_end

    def keep(self, open_: Keeping, used: Sequence[int], entries: Sequence[int]) -> None:
        """What stays lies in the first ``used[group]`` of the reserved blocks, with ``entries[group]`` table entries:
        what it was chosen from is let go. From then on the sequence's new blocks are not findable.
        """
        keeping.keep(self._books, open_, used, entries)

    def rollback_keep(self, open_: Keeping) -> None:
        """Undoes `reserve_keep`."""
        keeping.rollback_keep(self._books, open_)

    # ----------------------------------------------------------------------------------------------------- capacity

    def _saying(self, what: str, longest: int, chunk: int = 1, sequences: int = 1) -> AbstractContextManager[None]:
        """CacheFullError then says what was asked for, and what fits; see `saying_what_fits`."""
        return saying_what_fits(self._books, self._room, self._asked, what, (longest, chunk, sequences))

    def bytes_in_use(self) -> int:
        """Bytes of referenced blocks and of block tables."""
        books = self._books
        blocks = sum(pool.used_blocks * pool.block_bytes for pool in books.pools.values())
        return blocks + books.entries * TABLE_ENTRY_BYTES

    def bytes_cached(self) -> int:
        """Bytes of blocks that nobody references and that can still be found."""
        return sum(pool.cached_blocks * pool.block_bytes for pool in self._books.pools.values())

    def bytes_lent(self) -> int:
        """Bytes of the extents that pools hold."""
        return self.arena.lent_extents * self.arena.extent_bytes

    def tokens_capacity(self) -> int:
        """Tokens that one sequence alone can surely have, growing by one at a time. At most `capacity.UNBOUNDED`."""
        return self._room().tokens()

    def concurrency(self, length: int) -> float:
        """Sequences of ``length`` tokens that surely fit at once, at rest, with a fraction for what is left over."""
        return self._room().concurrency(length)

    def can_ever_fit(self, total_tokens: int, chunk: int, prompt: int | None = None) -> bool:
        """Whether a lone sequence can get to ``total_tokens`` tokens in steps of ``chunk`` (the last one may be
        shorter). ``prompt``: so many of them are a prompt (None: all), by which retention runs.

        Exact for just those steps. If it fits with an extent to spare, any steps of at most ``chunk`` tokens will do.
        """
        if total_tokens < 1 or chunk < 1:
            raise RequestError(f"{total_tokens} tokens in steps of {chunk}", why="both must be positive")
        if self._books.growable:
            return True
        room, key = self._room(), (total_tokens, min(chunk, total_tokens), min(prompt or total_tokens, total_tokens))
        if room.surely_fits(*key[:2]):
            return True
        if room.cannot_fit(total_tokens):
            return False
        if key not in self._rehearsed:
            if len(self._rehearsed) >= _REHEARSALS:
                self._rehearsed.clear()
            self._rehearsed[key] = self._rehearse(*key)
        return self._rehearsed[key]

    def _rehearse(self, total_tokens: int, chunk: int, prompt: int) -> bool:
        """Takes the steps with books of its own."""
        books = Books(self.groups, self._asked, self.block_size, growable=False, fingerprint=b"", prefix_caching=False)
        return rehearse(books, total_tokens, chunk, prompt)

    def _room(self) -> Capacity:
        books = self._books
        if self._capacity is None or self._capacity[0] != self.arena.generation:
            n_extents = UNBOUNDED if books.growable else self.arena.n_extents
            per_extent = {key: pool.blocks_per_extent for key, pool in books.pools.items()}
            self._capacity = (self.arena.generation, Capacity(books.specs, books.block_size, n_extents, per_extent))
        return self._capacity[1]

    def usage(self) -> Usage:
        """Where the memory is now."""
        arena = self.arena
        return Usage(
            budget=max(self._books.budget_bytes, arena.budget_bytes),
            arena=arena.total_bytes,
            in_use=self.bytes_in_use(),
            cached=self.bytes_cached(),
            lent=self.bytes_lent(),
            extents=arena.n_extents,
            extents_lent=arena.lent_extents,
        )

    def stats(self) -> MemoryStats:
        """What has happened since the start."""
        books = self._books
        return MemoryStats(
            query_tokens=books.query_tokens,
            hit_tokens=books.hit_tokens,
            sealed_blocks=books.sealed_blocks,
            copied_blocks=books.copied_blocks,
            evictions=sum(pool.evictions for pool in books.pools.values()),
        )

    def check(self) -> None:
        """Raises AssertionError if any invariant of the books is broken. Slow: for tests."""
        audit(self._books)
