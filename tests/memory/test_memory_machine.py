"""The memory manager against a naive model: every operation, in any order, over several groups and small budgets.

The model knows, token by token, which blocks a sequence must have and in which state, and plays the device: it copies,
writes, encodes and decodes what the manager asks for, and remembers what every physical block holds. A slot holds the
position and the digest of all tokens up to it, so any mistake in sharing, copying or sealing reads back wrong.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvfold.errors import BudgetError, CacheFullError, RequestError, UnsupportedError
from kvfold.memory.manager import CacheManager, GroupSpec, Reservation, Seal, Unseal
from kvfold.rule import KeepRule


class ModelSequence:
    """Tokens, and for each group which blocks have been packed and not been cut since, and how many are gone.

    ``kept``: for each group, the blocks that retention has replaced, and what stands for them: (first, end, block ids,
    entries). ``marks``: where retention has run. What is computed behind such a place is not what others compute.
    """

    def __init__(self, groups: int) -> None:
        self.tokens: list[int] = []
        self.expected = 0
        self.gone = [0] * groups
        self.packed: list[set[int]] = [set() for _ in range(groups)]
        self.kept: list[tuple[int, int, tuple[int, ...], int]] = [(0, 0, (), 0)] * groups
        self.marks: list[tuple[int, int]] = []

    def copy(self) -> ModelSequence:
        other = ModelSequence(len(self.packed))
        other.tokens, other.expected = list(self.tokens), self.expected
        other.gone = list(self.gone)
        other.packed = [set(blocks) for blocks in self.packed]
        other.kept = list(self.kept)
        other.marks = list(self.marks)
        return other

    def replaced(self, group: int) -> range:
        first, end, _, _ = self.kept[group]
        return range(first, end)


def digests(tokens: list[int], marks: list[tuple[int, int]] = ()) -> list[int]:
    value, found = 0, []
    for position, token in enumerate(tokens):
        value = hash((value, token, *(mark for where, mark in marks if where == position)))
        found.append(value)
    return found


def visible(spec: GroupSpec, position: int, length: int) -> bool:
    """Whether the query at ``length`` can read ``position``."""
    if spec.kind == "sliding":
        return position > length - spec.window
    if spec.kind == "chunked":
        return position // spec.window >= length // spec.window
    return True


def kept(spec: GroupSpec, block: int, size: int, length: int) -> bool:
    """Whether ``block`` outlives the end of a step at ``length``."""
    back = max(0, length - spec.margin)
    return any(visible(spec, position, back) for position in range(block * size, block * size + size))


class World:
    """A manager, the model of it, and the device's memory. Each method does one thing to both and compares."""

    def __init__(self, groups: list[GroupSpec], size: int, blocks: int, *, growable: bool, caching: bool) -> None:
        self.size = size
        self.groups = groups
        self.growable = growable
        self.budget = blocks * max(max(g.raw_block_bytes, g.packed_block_bytes) for g in groups) + 40
        try:
            self.manager = CacheManager(groups, self.budget, size, growable=growable, prefix_caching=caching)
        except BudgetError:
            assert blocks < 8
            self.budget *= 8
            self.manager = CacheManager(groups, self.budget, size, growable=growable, prefix_caching=caching)
        self.model: dict[int, ModelSequence] = {}
        self.memory: dict[tuple[int, str, int], list[tuple[int, int] | None]] = {}
        self.open: dict[int, tuple[Reservation, list[int]]] = {}
        self.unfinished: list[Seal] = []
        self.unfinished_unseals: list[Unseal] = []
        self.versions: dict[int, tuple[int, object]] = {}

    def settled(self) -> list[int]:
        return [seq for seq in self.model if seq not in self.open]

    def content(self, group: int, state: str, block: int) -> list[tuple[int, int] | None]:
        return self.memory.setdefault((group, state, block), [None] * self.size)

    def snapshot(self) -> object:
        manager = self.manager
        tables = {
            seq: [[part.tolist() for part in manager.table(seq, g)] for g in range(len(self.groups))]
            for seq in manager.sequences()
        }
        pools = {key: pool.references() for key, pool in manager._books.pools.items()}
        lengths = {seq: (manager.length(seq), manager.table_version(seq)) for seq in manager.sequences()}
        return tables, pools, lengths, manager.arena.generation, manager.stats(), manager.usage()

    def play(self, reservation: Reservation, tokens: list[int]) -> None:
        """What the device does between reserve and commit."""
        model, size = self.model[reservation.seq], self.size
        assert (reservation.start, reservation.new_tokens) == (len(model.tokens), len(tokens))
        for copy in reservation.copies:
            assert copy.src != copy.dst
            self.memory[copy.group, copy.state, copy.dst] = list(self.content(copy.group, copy.state, copy.src))
        known = digests(model.tokens + tokens, model.marks)
        end = len(known)
        for group, (spec, runs) in enumerate(zip(self.groups, reservation.runs, strict=True)):
            written: list[int] = []
            for run in runs:
                block = self.content(group, run.state, run.block_id)
                for k, slot in enumerate(range(run.slot_start, run.slot_stop)):
                    position = run.block_index * size + slot
                    assert position == reservation.start + run.token_start + k
                    block[slot] = (position, known[position])
                    written.append(position)
                assert run.state == "raw" or (run.slot_start, run.slot_stop) == (0, size)
            wanted = [p for p in range(reservation.start, end) if kept(spec, p // size, size, end)]
            assert written == wanted
        self.open[reservation.seq] = (reservation, tokens)

    def expected_blocks(self, model: ModelSequence, group: int) -> tuple[list[int], list[int]]:
        """Raw and packed block indices by the rules."""
        length, size, spec = len(model.tokens), self.size, self.groups[group]
        live = [b for b in range(model.gone[group], -(-length // size)) if kept(spec, b, size, length)]
        live = [b for b in live if b not in model.replaced(group)]
        raw = [b for b in live if b not in model.packed[group]]
        return raw, [b for b in live if b in model.packed[group]]

    def release_in_model(self, model: ModelSequence) -> None:
        """What a step's end lets go of does not come back when the sequence is cut."""
        for group in range(len(self.groups)):
            there = -(-len(model.tokens) // self.size)
            live = [b for b in range(there) if kept(self.groups[group], b, self.size, len(model.tokens))]
            model.gone[group] = max(model.gone[group], min(live, default=there))

    def seal_in_model(self, model: ModelSequence) -> None:
        """The sealing rule, block by block."""
        length = len(model.tokens)
        later = max(length, model.expected)
        for spec, packed in zip(self.groups, model.packed, strict=True):
            for block in range(length // self.size if spec.seals else 0):
                if block * self.size >= spec.sinks and (block + 1) * self.size <= later - spec.recent:
                    packed.add(block)

    # ------------------------------------------------------------------------------------------------- actions

    def create(self) -> int:
        seq = self.manager.create()
        assert seq not in self.model
        assert self.manager.length(seq) == 0
        self.model[seq] = ModelSequence(len(self.groups))
        return seq

    def expect(self, seq: int, length: int) -> None:
        self.manager.expect(seq, length)
        self.model[seq].expected = length

    def reserve(self, seq: int, tokens: list[int]) -> bool:
        need = self.manager.demand(seq, len(tokens))
        fits, before = self.manager.fits(need), self.snapshot()
        used = {key: pool.used_blocks for key, pool in self.manager._books.pools.items()}
        try:
            reservation = self.manager.reserve(seq, len(tokens))
        except CacheFullError:
            assert not fits
            assert self.snapshot() == before
            return False
        assert fits
        taken = {key: pool.used_blocks - used[key] for key, pool in self.manager._books.pools.items()}
        assert {key: n for key, n in taken.items() if n} == dict(need)
        self.play(reservation, tokens)
        return True

    def reserve_many(self, wants: list[tuple[int, list[int]]]) -> bool:
        fits = self.manager.fits(*(self.manager.demand(seq, len(tokens)) for seq, tokens in wants))
        before = self.snapshot()
        try:
            done = self.manager.reserve_many([(seq, len(tokens)) for seq, tokens in wants])
        except CacheFullError:
            assert not fits
            assert self.snapshot() == before
            return False
        assert fits
        for reservation, (_, tokens) in zip(done, wants, strict=True):
            self.play(reservation, tokens)
        return True

    def commit(self, seq: int, *, known: bool = True, finish: bool = True) -> None:
        reservation, tokens = self.open.pop(seq)
        self.unfinished += self.manager.commit(reservation, tokens if known else None, b"")
        model = self.model[seq]
        model.tokens += tokens
        self.seal_in_model(model)
        self.release_in_model(model)
        if finish:
            self.finish()

    def finish(self) -> None:
        for seal in self.unfinished:
            if seal.encode:
                self.memory[seal.group, "packed", seal.packed_id] = list(self.content(seal.group, "raw", seal.raw_id))
        self.manager.finish_seals(self.unfinished)
        self.manager.finish_unseals(self.unfinished_unseals)
        self.unfinished, self.unfinished_unseals = [], []

    def rollback(self, seq: int) -> None:
        self.manager.rollback(self.open.pop(seq)[0])

    def fork(self, seq: int) -> None:
        before = self.snapshot()
        try:
            child = self.manager.fork(seq)
        except CacheFullError:
            assert not self.growable
            assert self.snapshot() == before
            return
        self.model[child] = self.model[seq].copy()

    def truncate(self, seq: int, length: int) -> None:
        self.finish()  # the caller encodes before anything else happens
        model, size = self.model[seq], self.size
        before = self.snapshot()
        possible = True
        for group in range(len(self.groups)):
            bare = replace(self.groups[group], margin=0)
            needed = {b for b in range(-(-length // size)) if kept(bare, b, size, length)}
            first, end, _, _ = model.kept[group]
            possible &= needed - set(range(first, end)) <= set().union(*self.expected_blocks(model, group))
            possible &= not first * size < length < end * size
        try:
            unseals = self.manager.truncate(seq, length)
        except UnsupportedError:
            assert not possible
            assert self.snapshot() == before
            return
        except CacheFullError:
            assert not self.growable
            assert self.snapshot() == before
            return
        assert possible
        del model.tokens[length:]
        model.expected = min(model.expected, length)
        for group, (first, _, _, _) in enumerate(model.kept):
            if length <= first * size:
                model.kept[group] = (0, 0, (), 0)
        if not any(end for _, end, _, _ in model.kept):
            model.marks.clear()
        model.gone = [min(gone, -(-length // size)) for gone in model.gone]
        for group, packed in enumerate(model.packed):
            live = set().union(*self.expected_blocks(model, group))
            cut = [b for b in packed & live if b * size < length < (b + 1) * size]
            assert len(cut) == sum(unseal.group == group for unseal in unseals)
            model.packed[group] = {b for b in packed if (b + 1) * size <= length}
        for unseal in unseals:
            source = self.content(unseal.group, "packed", unseal.packed_id)
            self.memory[unseal.group, "raw", unseal.raw_id] = list(source)
        self.unfinished_unseals += unseals

    def free(self, seq: int) -> None:
        self.manager.free(seq)
        del self.model[seq]
        self.open.pop(seq, None)

    def adopt(self, tokens: list[int], new: int) -> int:
        """A sequence that begins with what is found of ``tokens``, and a step of ``new`` tokens if that fits."""
        manager = self.manager
        hit = manager.match(tokens, b"")
        assert hit % self.size == 0
        assert 0 <= hit < len(tokens)
        new = min(new, len(tokens) - hit)
        expected = len(tokens) if new % 2 else 0
        promised = manager.fits(manager.demand_for(hit, new, expected=expected, tokens=tokens))
        seq = self.create()
        model = self.model[seq]
        self.expect(seq, expected)
        try:
            manager.adopt(seq, tokens, hit)
        except CacheFullError:
            assert not promised
            return 0
        model.tokens = tokens[:hit]
        for spec, packed in zip(self.groups, model.packed, strict=True):
            if spec.seals:
                packed.update(b for b in range(hit // self.size) if b * self.size >= spec.sinks)
        self.release_in_model(model)
        assert manager.fits(manager.demand(seq, new)) == promised
        if promised:
            self.play(manager.reserve(seq, new), tokens[hit : hit + new])
        return hit

    def retain(self, seq: int, *, undo: bool) -> None:
        """Retention, in which the caller needs only some of the blocks; or that is undone."""
        self.finish()
        manager, model, before = self.manager, self.model[seq], self.snapshot()
        length, fits = len(model.tokens), self.manager.fits(self.manager.demand_keep(len(model.tokens)))
        try:
            keeping = manager.reserve_keep(seq)
        except CacheFullError:
            assert not fits
            assert not self.growable
            assert self.snapshot() == before
            return
        if keeping is None:
            assert self.snapshot() == before
            return
        used, entries = [], []
        for group, (spec, blocks, end) in enumerate(zip(self.groups, keeping.blocks, keeping.end, strict=True)):
            used.append(max(0, len(blocks) - length % 2))
            entries.append(used[-1] * (1 + spec.pages))
            if end is not None:
                raw, packed = self.expected_blocks(model, group)
                first = -(-spec.sinks // self.size)
                old = [b for b in (packed if spec.seals else raw) if first <= b < end]
                view = manager.table(seq, group)
                where = view.packed_block_index if spec.seals else view.raw_block_index
                ids = view.packed_ids if spec.seals else view.raw_ids
                assert manager.candidates(keeping, group) == [ids[where.tolist().index(b)] for b in old]
        if undo:
            manager.rollback_keep(keeping)
            arena = (manager.arena.generation, manager.usage().in_use)
            assert arena[0] != before[3] or arena[1] == before[5].in_use
            return
        manager.keep(keeping, used, entries)
        for group, (spec, blocks, end) in enumerate(zip(self.groups, keeping.blocks, keeping.end, strict=True)):
            if end is not None:
                first = -(-spec.sinks // self.size)
                model.kept[group] = (first, end, blocks[: used[group]], entries[group])
        model.marks.append((length, seq * 1000 + length))

    def reset_prefix_cache(self) -> None:
        self.manager.reset_prefix_cache()
        assert self.manager.bytes_cached() == 0

    def refuse_while_open(self, seq: int) -> None:
        calls: list[Callable[[], object]] = [
            lambda: self.manager.reserve(seq, 1),
            lambda: self.manager.fork(seq),
            lambda: self.manager.truncate(seq, 0),
            lambda: self.manager.commit(self.open[seq][0]._replace(), None),
        ]
        for call in calls:
            with pytest.raises(RequestError):
                call()

    # ---------------------------------------------------------------------------------------------- invariants

    def check(self) -> None:
        self.manager.check()
        self.check_bytes()
        self.check_tables()

    def check_bytes(self) -> None:
        manager = self.manager
        assert set(manager.sequences()) == set(self.model)
        assert self.growable or manager.bytes_in_use() <= self.budget
        assert self.growable or manager.arena.total_bytes <= self.budget
        if self.open or self.unfinished or self.unfinished_unseals:
            return
        blocks, entries = set(), 0
        for seq, model in self.model.items():
            for group in range(len(self.groups)):
                view = manager.table(seq, group)
                blocks |= {(group, "raw", b) for b in view.raw_ids.tolist()}
                blocks |= {(group, "packed", b) for b in view.packed_ids.tolist()}
                entries += view.raw_ids.size + view.packed_ids.size + model.kept[group][3]
                assert manager.kept(seq, group) == model.kept[group][2]
                blocks |= {(group, self.groups[group].kept_state, b) for b in model.kept[group][2]}
        held = sum(manager.pool(g, state).block_bytes for g, state, _ in blocks)
        assert manager.bytes_in_use() == held + 8 * entries

    def check_tables(self) -> None:
        """Tables follow the rules, and hold the tokens."""
        waiting = {(seal.group, seal.packed_id) for seal in self.unfinished}
        for seq, model in self.model.items():
            assert self.manager.length(seq) == len(model.tokens)
            known = digests(model.tokens, model.marks)
            everything = []
            for group in range(len(self.groups)):
                view = self.manager.table(seq, group)
                everything.append([part.tolist() for part in view])
                if seq not in self.open:
                    raw, packed = self.expected_blocks(model, group)
                    assert view.raw_block_index.tolist() == raw
                    assert view.packed_block_index.tolist() == packed
                self.read_back(group, "raw", view.raw_ids, view.raw_block_index, known, waiting)
                self.read_back(group, "packed", view.packed_ids, view.packed_block_index, known, waiting)
            version = self.manager.table_version(seq)
            if seq in self.versions and self.versions[seq][0] == version:
                assert self.versions[seq][1] == everything
            self.versions[seq] = (version, everything)
        owners = Counter(self.manager.table_version(seq) for seq in self.model)
        assert not owners or max(owners.values()) == 1

    def read_back(self, group, state, ids, index, known, waiting) -> None:
        assert (index[1:] > index[:-1]).all()
        for block, where in zip(ids.tolist(), index.tolist(), strict=True):
            if state == "packed" and (group, block) in waiting:
                continue
            held = self.content(group, state, block)
            for slot, position in enumerate(range(where * self.size, (where + 1) * self.size)):
                if position < len(known):
                    assert held[slot] == (position, known[position]), (group, state, block, slot)

    def end(self) -> None:
        """When everything has ended, nothing is left."""
        manager = self.manager
        for seq in list(self.model):
            manager.free(seq)
        manager.finish_seals(self.unfinished)
        manager.finish_unseals(self.unfinished_unseals)
        manager.check()
        assert manager.bytes_in_use() == 0
        assert all(pool.used_blocks == 0 for pool in manager._books.pools.values())
        manager.reset_prefix_cache()
        manager.check()
        assert manager.bytes_lent() == 0
        assert manager.arena.free_extents == manager.arena.n_extents


MOST = 6  # sequences at a time
GROUPS = st.builds(
    lambda kind, window, raw, packed, sinks, recent, margin, pages, keep: GroupSpec(
        name=kind,
        raw_block_bytes=64 * raw,
        packed_block_bytes=64 * packed,
        sinks=sinks,
        recent=recent,
        kind=kind,
        window=None if kind == "full" else window,
        margin=margin,
        pages=pages,
        rule=keep if kind == "full" else None,
    ),
    kind=st.sampled_from(["full", "full", "sliding", "chunked"]),
    window=st.integers(1, 14),
    raw=st.integers(1, 6),
    packed=st.integers(0, 4),
    sinks=st.integers(0, 5),
    recent=st.integers(0, 9),
    margin=st.sampled_from([0, 0, 1, 5, 16]),
    pages=st.integers(1, 4),
    keep=st.sampled_from([KeepRule(keep=0.3), KeepRule(keep=0.7), KeepRule(budget=6), KeepRule(budget=16), None]),
)
COUNTS = st.integers(1, 14)
TOKEN = st.integers(0, 1)
WHICH = st.integers(0, MOST - 1)


class MemoryMachine(RuleBasedStateMachine):
    """Few kinds of tokens, so that sequences often begin alike. ``which``: one of the sequences there are."""

    @initialize(
        groups=st.lists(GROUPS, min_size=1, max_size=3),
        size=st.integers(1, 4),
        blocks=st.integers(6, 60),
        growable=st.sampled_from([False, False, False, True]),
        caching=st.sampled_from([True, True, True, False]),
    )
    def start(self, groups: list[GroupSpec], size: int, blocks: int, growable: bool, caching: bool) -> None:
        self.world = World(groups, size, blocks, growable=growable, caching=caching)

    def one_of(self, sequences: list[int], which: int) -> int:
        return sequences[which % len(sequences)]

    def some(self, which: int) -> int | None:
        """A sequence without a reservation; a new one if there is none."""
        settled = self.world.settled()
        if not settled and len(self.world.model) < MOST:
            return self.world.create()
        return self.one_of(settled, which) if settled else None

    @rule()
    @precondition(lambda self: len(self.world.model) < MOST)
    def create(self) -> None:
        self.world.create()

    @rule(which=WHICH, more=st.integers(-10, 60))
    def expect(self, which: int, more: int) -> None:
        seq = self.some(which)
        if seq is not None:
            self.world.expect(seq, max(0, len(self.world.model[seq].tokens) + more))

    @rule(which=WHICH, count=COUNTS, token=TOKEN)
    def step(self, which: int, count: int, token: int) -> None:
        seq = self.some(which)
        if seq is not None and self.world.reserve(seq, [token] * count):
            self.world.commit(seq)

    @rule(which=WHICH, count=st.integers(1, 30), token=TOKEN)
    def decode(self, which: int, count: int, token: int) -> None:
        seq = self.some(which)
        for _ in range(count if seq is not None else 0):
            if not self.world.reserve(seq, [token]):
                return
            self.world.commit(seq)

    @rule(which=WHICH, count=COUNTS, token=TOKEN)
    def reserve(self, which: int, count: int, token: int) -> None:
        seq = self.some(which)
        if seq is not None:
            self.world.reserve(seq, [token] * count)

    @rule(counts=st.lists(COUNTS, min_size=2, max_size=MOST), token=TOKEN, commit=st.booleans())
    def reserve_many(self, counts: list[int], token: int, commit: bool) -> None:
        wants = [(seq, [token] * count) for seq, count in zip(self.world.settled(), counts, strict=False)]
        if wants and self.world.reserve_many(wants) and commit:
            for seq, _ in wants:
                self.world.commit(seq, finish=False)
            self.world.finish()

    @rule(which=WHICH, known=st.sampled_from([True, True, True, False]), finish=st.booleans())
    @precondition(lambda self: self.world.open)
    def commit(self, which: int, known: bool, finish: bool) -> None:
        self.world.commit(self.one_of(list(self.world.open), which), known=known, finish=finish)

    @rule()
    def finish(self) -> None:
        self.world.finish()

    @rule(which=WHICH)
    @precondition(lambda self: self.world.open)
    def rollback(self, which: int) -> None:
        self.world.rollback(self.one_of(list(self.world.open), which))

    @rule(which=WHICH)
    @precondition(lambda self: len(self.world.model) < MOST)
    def fork(self, which: int) -> None:
        seq = self.some(which)
        if seq is not None and len(self.world.model) < MOST:
            self.world.fork(seq)

    @rule(which=WHICH, back=st.integers(0, 20))
    def truncate(self, which: int, back: int) -> None:
        seq = self.some(which)
        if seq is not None:
            self.world.truncate(seq, max(0, len(self.world.model[seq].tokens) - back))

    @rule(which=WHICH)
    @precondition(lambda self: self.world.model)
    def free(self, which: int) -> None:
        self.world.free(self.one_of(list(self.world.model), which))

    @rule(which=WHICH, count=COUNTS, token=TOKEN, new=COUNTS)
    @precondition(lambda self: 0 < len(self.world.model) < MOST)
    def adopt(self, which: int, count: int, token: int, new: int) -> None:
        like = self.world.model[self.one_of(list(self.world.model), which)]
        self.world.adopt(like.tokens + [token] * count, new)

    @rule(which=WHICH, undo=st.sampled_from([False, False, True]))
    def retain(self, which: int, undo: bool) -> None:
        seq = self.some(which)
        if seq is not None:
            self.world.retain(seq, undo=undo)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.world.reset_prefix_cache()

    @rule(which=WHICH)
    @precondition(lambda self: self.world.open)
    def refuse_while_open(self, which: int) -> None:
        self.world.refuse_while_open(self.one_of(list(self.world.open), which))

    @invariant()
    def check(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.end()


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def random_group(draw: random.Random) -> GroupSpec:
    kind = draw.choice(["full", "full", "sliding", "chunked"])
    return GroupSpec(
        name=kind,
        raw_block_bytes=64 * draw.randint(1, 6),
        packed_block_bytes=64 * draw.randint(0, 4),
        sinks=draw.randint(0, 5),
        recent=draw.randint(0, 9),
        kind=kind,
        window=None if kind == "full" else draw.randint(1, 20),
        margin=draw.choice([0, 0, 1, 5, 16]),
        pages=draw.randint(1, 4),
        rule=draw.choice([KeepRule(keep=0.4), KeepRule(budget=12), None]) if kind == "full" else None,
    )


def walk(seed: int, steps: int, **changes: object) -> World:
    """A long life under pressure: prompts that begin alike, forks, rollbacks, requests that end. ``changes``: to groups
    without a window.
    """
    draw = random.Random(seed)
    groups = [random_group(draw) for _ in range(draw.randint(1, 3))]
    groups = [replace(group, **changes) if group.kind == "full" else group for group in groups]
    growable = draw.random() < 0.2
    world = World(groups, draw.randint(1, 4), draw.randint(20, 400), growable=growable, caching=draw.random() < 0.9)
    prompts = [[draw.randint(0, 2) for _ in range(draw.randint(5, 60))] for _ in range(4)]
    for _ in range(steps):
        settled, action = world.settled(), draw.random()
        new = [draw.randint(0, 2) for _ in range(draw.choice([1, 1, 1, 1, 2, 5, 20]))]
        if (action < 0.15 or not world.model) and len(world.model) < 10:
            base = draw.choice(prompts + [model.tokens for model in world.model.values()])
            world.adopt(base[: draw.randint(0, len(base))] + new, draw.randint(1, 30))
        elif action < 0.18 and settled and len(world.model) < 10:
            world.fork(draw.choice(settled))
        elif action < 0.24 and settled:
            seq = draw.choice(settled)
            length = len(world.model[seq].tokens)
            world.truncate(seq, max(0, length - draw.choice([0, 1, 2, 3, 8, length])))
        elif action < 0.36 and world.open:
            world.commit(draw.choice(list(world.open)), known=draw.random() < 0.97, finish=draw.random() < 0.7)
        elif action < 0.40 and world.open:
            world.rollback(draw.choice(list(world.open)))
        elif action < 0.42:
            world.finish()
        elif action < 0.421:
            world.reset_prefix_cache()
        elif action < 0.45 and settled:
            world.retain(draw.choice(settled), undo=draw.random() < 0.3)
        elif action < 0.5 and settled:
            world.reserve(draw.choice(settled), new)
        elif action < 0.56 and world.model:
            world.free(draw.choice(list(world.model)))
        elif settled:
            chosen = draw.sample(settled, draw.randint(1, len(settled)))
            if not world.reserve_many([(seq, list(new)) for seq in chosen]):
                world.free(draw.choice(list(world.model)))
                continue
            for seq in chosen:
                world.commit(seq, finish=False)
            world.finish()
        world.check()
    return world


@pytest.mark.parametrize("seed", range(24))
def test_a_long_life(seed: int) -> None:
    walk(seed, 150).end()


@pytest.mark.parametrize("seed", range(12))
def test_a_long_life_in_which_retention_replaces_every_block(seed: int) -> None:
    walk(seed, 120, sinks=0, recent=0, rule=KeepRule(keep=0.4)).end()
