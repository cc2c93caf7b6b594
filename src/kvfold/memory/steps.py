"""Reserve, commit, roll back: one step of some sequences.

A reservation takes every block that the step can need, the packed ones for its seals included, so that commit cannot
fail.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from kvfold.errors import RequestError
from kvfold.memory.books import Allowance, Books, GroupWork, SequenceState, Twin
from kvfold.memory.prefix import block_hash, root_hash, token_bytes
from kvfold.memory.reservation import (
    NOTHING,
    Copy,
    Demand,
    GroupPlan,
    Reservation,
    Run,
    Seal,
    plan_group,
)
from kvfold.memory.table import GroupTable, PoolKey, SeqId, State

__all__ = ["commit", "demand", "demand_of_new", "extend_hashes", "reserve", "rollback"]


def demand(books: Books, state: SequenceState, new_tokens: int) -> Demand:
    """The blocks a step of ``new_tokens`` tokens may need."""
    if state.length + new_tokens <= state.quiet_until:
        return NOTHING
    return _demand_of(books, state, _plan(books, state, new_tokens))


def demand_of_new(books: Books, length_before: int, new_tokens: int, expected: int = 0) -> Demand:
    """As `demand`, for a sequence that will have adopted ``length_before`` tokens (whole blocks), on its way to
    ``expected`` ones.
    """
    size, blocks, entries = books.block_size, dict[PoolKey, int](), 0
    for group, spec in enumerate(books.specs):
        packed_end = length_before // size if spec.seals else 0
        end = length_before + new_tokens
        plan = plan_group(spec, size, start=length_before, end=end, packed_end=packed_end, expected=expected)
        blocks[group, "raw"] = plan.raw_blocks
        blocks[group, "packed"] = plan.direct_stop - plan.direct
        entries += plan.stop - plan.new
    return Demand(blocks, entries=entries)


def _plan(books: Books, state: SequenceState, new_tokens: int) -> list[GroupPlan]:
    start, end, size = state.length, state.length + new_tokens, books.block_size
    return [
        plan_group(
            spec, size, start=start, end=end, packed_end=table.packed_end, first=table.first, expected=state.expected
        )
        for spec, table in zip(books.specs, state.tables, strict=True)
    ]


def _demand_of(books: Books, state: SequenceState, plans: Sequence[GroupPlan]) -> Demand:
    blocks: dict[PoolKey, int] = {}
    shared: list[tuple[int, int]] = []
    entries = 0
    for group, (table, plan) in enumerate(zip(state.tables, plans, strict=True)):
        raw = plan.raw_blocks
        packed = plan.direct_stop - plan.direct
        entries += plan.stop - plan.new
        if plan.tail and _must_copy(books, group, table.ids[-1]):
            raw += 1
        pool = books.pools[group, "raw"]
        for index in range(plan.seal, plan.seal_stop):
            block = table.ids[table.place(index)]
            if plan.tail and index == table.stop - 1:
                packed += 1  # about to be written: its own by then, and no twin's
            elif (group, block) in books.twins:
                continue
            elif pool.refcount(block) == 1:
                packed += 1
            else:
                shared.append((group, block))
        if raw:
            blocks[group, "raw"] = raw
        if packed:
            blocks[group, "packed"] = packed
    return Demand(blocks, shared=frozenset(shared), entries=entries)


def _must_copy(books: Books, group: int, tail: int) -> bool:
    pool = books.pools[group, "raw"]
    return pool.refcount(tail) > 1 or pool.findable(tail)


def reserve(books: Books, wants: Sequence[tuple[SeqId, int]]) -> list[Reservation]:
    """Room for ``new_tokens`` more tokens of each sequence in ``wants``: all, or CacheFullError and no change."""
    if len(wants) > 1 and len({seq for seq, _ in wants}) != len(wants):
        raise RequestError("a sequence is in the step twice")
    states = [books.settled(seq) for seq, _ in wants]
    plans: list[list[GroupPlan] | None] = []
    total = NOTHING
    for state, (seq, new_tokens) in zip(states, wants, strict=True):
        if new_tokens < 1:
            raise RequestError(f"sequence {seq}: a step of {new_tokens} tokens", why="a step has at least one token")
        if state.length + new_tokens <= state.quiet_until:
            plans.append(None)
        else:
            plan = _plan(books, state, new_tokens)
            plans.append(plan)
            total = total + _demand_of(books, state, plan)
    allowance = None
    if len(total):
        books.make_room(total)
        allowance = books.allowance(total)
    return [
        _quiet(books, state, seq, new_tokens)
        if plan is None
        else _carry_out(books, state, Reservation(seq, state.length, new_tokens, (), ()), plan, allowance)
        for state, (seq, new_tokens), plan in zip(states, wants, plans, strict=True)
    ]


def _quiet(books: Books, state: SequenceState, seq: SeqId, new_tokens: int) -> Reservation:
    """A step within the last raw block of every group, which is the sequence's own."""
    index, slot = divmod(state.length, books.block_size)
    runs = tuple([(Run("raw", table.ids[-1], index, slot, slot + new_tokens, 0),) for table in state.tables])
    reservation = Reservation(seq, state.length, new_tokens, (), runs)
    state.pending = reservation
    return reservation


def _carry_out(
    books: Books, state: SequenceState, want: Reservation, plans: Sequence[GroupPlan], allowance: Allowance | None
) -> Reservation:
    copies: list[Copy] = []
    runs: list[tuple[Run, ...]] = []
    work: list[GroupWork] = []
    changed = False
    for group, (table, plan) in enumerate(zip(state.tables, plans, strict=True)):
        copied = -1
        if plan.tail:
            tail = table.ids[-1]
            if _must_copy(books, group, tail):
                copied, table.ids[-1] = tail, books.take((group, "raw"), allowance)
                books.copied_blocks += 1
                copies.append(Copy(group, "raw", copied, table.ids[-1]))
            else:
                books.forget_twin(group, tail)  # what it holds is about to change
        table.more_first, table.direct_start, table.direct_stop = plan.new, plan.direct, plan.direct_stop
        for index in range(plan.new, plan.stop):
            packed = plan.direct <= index < plan.direct_stop
            table.more.append(books.take((group, "packed" if packed else "raw"), allowance))
        books.entries += len(table.more)
        seals = [
            (index, _take_packed(books, group, table.ids[table.place(index)], allowance))
            for index in range(plan.seal, plan.seal_stop)
        ]
        if copied >= 0 or table.more:
            table.view = None
            changed = True
        runs.append(_runs(table, plan, want, books.block_size))
        work.append(GroupWork(copied, seals, plan.packed_end, plan.live))
    if changed:
        books.touch(state)
    state.pending = want._replace(copies=tuple(copies), runs=tuple(runs))
    state.work = work
    return state.pending


def _take_packed(books: Books, group: int, raw: int, allowance: Allowance | None) -> int:
    """The block that ``raw`` will seal into: its twin if it has one, else a new one."""
    twin = books.twins.get((group, raw))
    if twin is not None:
        books.pools[group, "packed"].ref(twin.packed)
        return twin.packed
    packed = books.take((group, "packed"), allowance)
    if books.pools[group, "raw"].refcount(raw) > 1:
        books.twins[group, raw] = Twin(packed)
        books.twin_of[group, packed] = raw
    return packed


def _runs(table: GroupTable, plan: GroupPlan, want: Reservation, size: int) -> tuple[Run, ...]:
    runs = []
    end = want.start + want.new_tokens
    for index in range(plan.write // size, -(-end // size) if plan.write < end else 0):
        first = index * size
        if index < plan.new:
            block, packed = table.ids[table.place(index)], False
        else:
            block, packed = table.more[index - plan.new], plan.direct <= index < plan.direct_stop
        begin = max(plan.write, first)
        state: State = "packed" if packed else "raw"
        runs.append(Run(state, block, index, begin - first, min(end - first, size), begin - want.start))
    return tuple(runs)


def rollback(books: Books, reservation: Reservation) -> None:
    """Gives back everything a reservation took."""
    state = _open(books, reservation)
    changed = False
    for group, (table, work) in enumerate(zip(state.tables, state.work or (), strict=False)):
        for _, packed in reversed(work.seals):
            books.drop(group, "packed", packed)
        while table.more:
            index = table.more_first + len(table.more) - 1
            packed_already = table.direct_start <= index < table.direct_stop
            books.drop(group, "packed" if packed_already else "raw", table.more.pop())
            books.entries -= 1
            table.view, changed = None, True
        if work.copied >= 0:
            books.drop(group, "raw", table.ids[-1])
            table.ids[-1] = work.copied
            table.view, changed = None, True
    state.pending = state.work = None
    if changed:
        books.touch(state)


def _open(books: Books, reservation: Reservation) -> SequenceState:
    state = books.state(reservation.seq)
    if state.pending is not reservation:
        raise RequestError(f"the reservation of sequence {reservation.seq} is not open", why="it is done or undone")
    return state


def commit(
    books: Books, reservation: Reservation, tokens: Sequence[int] | None, salt: bytes | None
) -> tuple[Seal, ...]:
    """Makes the step's tokens part of the sequence."""
    state = _open(books, reservation)
    _learn(books, state, reservation, tokens, salt)
    state.length += reservation.new_tokens
    work = state.work
    state.pending = state.work = None
    if work is None:
        return ()
    extend_hashes(books, state)
    seals: list[Seal] = []
    changed = False
    for group, (table, job) in enumerate(zip(state.tables, work, strict=True)):
        if job.copied >= 0:
            books.drop(group, "raw", job.copied)
        for index, packed in job.seals:
            seals.append(_seal(books, state, group, index, packed))
        released = min(job.live, table.stop) - table.first
        for index in range(
            table.first, table.first + released
        ):  # released blocks were not sealed: their old states hold
            books.drop(group, table.state_of(index), table.ids[table.place(index)])
        table.packed_end = job.packed_end
        if released > 0:
            del table.ids[:released]
            table.first += released
            books.entries -= released
        if not table.ids and not table.gap:  # what retention has replaced still stands in front
            table.first = table.more_first if table.more else job.live
        table.ids.extend(table.more)
        table.more = array("q")
        table.direct_start = table.direct_stop = 0
        if job.seals or released > 0:
            table.view, changed = None, True
        _publish_new(books, state, group, reservation.start)
    if changed:
        books.touch(state)
    state.quiet_until = _quiet_until(books, state)
    return tuple(seals)


def _learn(
    books: Books, state: SequenceState, step: Reservation, tokens: Sequence[int] | None, salt: bytes | None
) -> None:
    """Keeps the step's token ids, by which the blocks will be found."""
    if tokens is None:
        state.hashable = False
        return
    if len(tokens) != step.new_tokens:
        raise RequestError(f"{len(tokens)} token ids for a step of {step.new_tokens} tokens")
    if not state.hashable:
        return
    if salt is not None and salt != state.salt:
        if state.salt is not None:
            raise RequestError(f"sequence {step.seq} began under another salt")
        state.salt = salt
    state.tokens.extend(array("q", tokens))


def extend_hashes(books: Books, state: SequenceState) -> None:
    """Hashes the whole blocks that are known by now."""
    size, hashes = books.block_size, state.hashes
    for index in range(len(hashes), len(state.tokens) // size):
        parent = hashes[-1] if hashes else root_hash(books.fingerprint, state.salt or b"")
        hashes.append(block_hash(parent, token_bytes(state.tokens[index * size : (index + 1) * size])))


def _final(books: Books, state: SequenceState, index: int) -> tuple[bytes, bytes]:
    size = books.block_size
    return state.hashes[index], token_bytes(state.tokens[index * size : (index + 1) * size])


def coming_seals(books: Books, reservation: Reservation) -> list[Seal]:
    """What `commit` will ask to be encoded, while everything can still be undone. Pure."""
    state = _open(books, reservation)
    seals = []
    for group, (table, job) in enumerate(zip(state.tables, state.work or (), strict=False)):
        for index, packed in job.seals:
            raw = table.ids[table.place(index)]
            twin = books.twins.get((group, raw))
            if twin is None or not twin.encoded:
                seals.append(Seal(group, raw, packed))
    return seals


def _seal(books: Books, state: SequenceState, group: int, index: int, packed: int) -> Seal:
    """Puts the packed block in the raw one's place. Both keep a reference until the caller has encoded."""
    table = state.tables[group]
    where = table.place(index)
    raw = table.ids[where]
    table.ids[where] = packed
    twin = books.twins.get((group, raw))
    encode = twin is None or not twin.encoded
    if twin is not None:
        twin.encoded = True
    if encode:
        books.encoding.add((group, packed))
        books.sealed_blocks += 1
    books.pools[group, "packed"].ref(packed)
    if index < len(state.hashes):
        books.publish_later.setdefault((group, packed), _final(books, state, index))
    seal = Seal(group, raw, packed, encode)
    books.sealing[seal] += 1
    return seal


def _publish_new(books: Books, state: SequenceState, group: int, start: int) -> None:
    """Makes those blocks findable that this step filled and that will not change again."""
    spec, table, size = books.specs[group], state.tables[group], books.block_size
    for index in range(max(start // size, table.first), min(len(state.hashes), state.length // size)):
        kind = table.state_of(index)
        if kind == "raw" and spec.seals and index >= table.sink_end:
            return  # it will seal, and so will all that follow
        block = table.ids[table.place(index)]
        if kind == "raw" or (group, block) not in books.encoding:
            books.publish(group, kind, block, _final(books, state, index))


def _quiet_until(books: Books, state: SequenceState) -> int:
    """The length up to which steps stay within the last block of every group and neither seal nor release anything."""
    size, length = books.block_size, state.length
    if length % size == 0:
        return 0
    until = length // size * size + size - 1
    for spec, table in zip(books.specs, state.tables, strict=True):
        if spec.seals:
            # the sealing rule first packs block `packed_end` at this length
            until = min(until, (max(table.packed_end, table.sink_end) + 1) * size + spec.recent - 1)
        if spec.window is not None and spec.kind == "sliding":
            until = min(until, (table.first + 1) * size + spec.window + spec.margin - 2)
        elif spec.window is not None and spec.kind == "chunked":
            # a chunk that begins behind block `first` releases it
            begin = -(-(table.first + 1) * size // spec.window) * spec.window
            until = min(until, begin + spec.margin - 1)
    return until
