"""The memory manager against a naive model: every operation, in any order, over several groups and small budgets.

The model knows, token by token, which blocks a sequence must have and in which state, and plays the device: it copies, writes,
encodes and decodes what the manager asks for, and remembers what every physical block holds. A slot holds the position and
the digest of all tokens up to it, so any mistake in sharing, copying or sealing reads back wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvfold.errors import BudgetError, CacheFullError, RequestError, UnsupportedError
from kvfold.memory.manager import CacheManager, GroupSpec, Reservation, Seal, Unseal

GROUPS = st.builds(
    lambda kind, window, raw, packed, sinks, recent: GroupSpec(
        name=kind,
        raw_block_bytes=64 * raw,
        packed_block_bytes=64 * packed,
        sinks=sinks,
        recent=recent,
        kind=kind,
        window=None if kind == "full" else window,
    ),
    kind=st.sampled_from(["full", "full", "sliding", "chunked"]),
    window=st.integers(1, 14),
    raw=st.integers(1, 6),
    packed=st.integers(0, 4),
    sinks=st.integers(0, 5),
    recent=st.integers(0, 9),
)


class ModelSequence:
    """Tokens, and which blocks of each group have been packed and not been cut since."""

    def __init__(self, groups: int) -> None:
        self.tokens: list[int] = []
        self.packed: list[set[int]] = [set() for _ in range(groups)]
        self.gone: list[int] = [0] * groups  # positions before this one may have been released

    def copy(self) -> ModelSequence:
        other = ModelSequence(len(self.packed))
        other.tokens = list(self.tokens)
        other.packed = [set(blocks) for blocks in self.packed]
        other.gone = list(self.gone)
        return other


def digests(tokens: list[int]) -> list[int]:
    value, found = 0, []
    for token in tokens:
        value = hash((value, token))
        found.append(value)
    return found


def visible(spec: GroupSpec, position: int, length: int) -> bool:
    """Whether the query at ``length`` can read ``position``."""
    if spec.kind == "sliding":
        return position > length - spec.window
    if spec.kind == "chunked":
        return position // spec.window == length // spec.window
    return True


class MemoryMachine(RuleBasedStateMachine):
    @initialize(
        groups=st.lists(GROUPS, min_size=1, max_size=3),
        size=st.integers(1, 4),
        blocks=st.integers(4, 60),
        growable=st.sampled_from([False, False, False, True]),
        caching=st.sampled_from([True, True, True, False]),
    )
    def start(self, groups: list[GroupSpec], size: int, blocks: int, growable: bool, caching: bool) -> None:
        self.size = size
        self.groups = groups
        self.growable = growable
        budget = blocks * max(max(g.raw_block_bytes, g.packed_block_bytes) for g in groups) + 40
        self.manager = None
        try:
            self.manager = CacheManager(groups, budget, size, growable=growable, prefix_caching=caching)
        except BudgetError:
            assert blocks < 8
            self.manager = CacheManager(groups, budget * 8, size, growable=growable, prefix_caching=caching)
            budget *= 8
        self.budget = budget
        self.model: dict[int, ModelSequence] = {}
        self.memory: dict[tuple[int, str, int], list[tuple[int, int] | None]] = {}
        self.open: dict[int, tuple[Reservation, list[int]]] = {}
        self.unfinished: list[Seal] = []
        self.unfinished_unseals: list[Unseal] = []
        self.versions: dict[int, tuple[int, object]] = {}

    # ------------------------------------------------------------------------------------------------- helpers

    def settled(self) -> list[int]:
        return [seq for seq in self.model if seq not in self.open]

    def content(self, group: int, state: str, block: int) -> list[tuple[int, int] | None]:
        return self.memory.setdefault((group, state, block), [None] * self.size)

    def pick(self, data: st.DataObject, choices: list[int]) -> int:
        return data.draw(st.sampled_from(choices))

    def snapshot(self) -> object:
        manager = self.manager
        tables = {
            seq: [[part.tolist() for part in manager.table(seq, g)] for g in range(len(self.groups))]
            for seq in manager.sequences()
        }
        pools = {key: pool.references() for key, pool in manager._books.pools.items()}
        lengths = {seq: (manager.length(seq), manager.table_version(seq)) for seq in manager.sequences()}
        return tables, pools, lengths, manager.arena.generation, manager.stats(), manager.usage()

    def draw_tokens(self, data: st.DataObject, low: int = 1, high: int = 14) -> list[int]:
        return data.draw(st.lists(st.integers(0, 1), min_size=low, max_size=high))

    def play(self, reservation: Reservation, tokens: list[int]) -> None:
        """What the device does between reserve and commit."""
        model, size = self.model[reservation.seq], self.size
        assert (reservation.start, reservation.new_tokens) == (len(model.tokens), len(tokens))
        for copy in reservation.copies:
            assert copy.src != copy.dst
            self.memory[copy.group, copy.state, copy.dst] = list(self.content(copy.group, copy.state, copy.src))
        known = digests(model.tokens + tokens)
        for group, (spec, runs) in enumerate(zip(self.groups, reservation.runs, strict=True)):
            written: list[int] = []
            for run in runs:
                block = self.content(group, run.state, run.block_id)
                for k, slot in enumerate(range(run.slot_start, run.slot_stop)):
                    position = run.block_index * size + slot
                    assert position == reservation.start + run.token_start + k
                    block[slot] = (position, known[position])
                    written.append(position)
                if run.state == "packed":
                    assert (run.slot_start, run.slot_stop) == (0, size)
            end = len(known)
            expected = [
                p
                for p in range(reservation.start, end)
                if any(visible(spec, q, end) for q in range(p // size * size, p // size * size + size))
            ]
            assert written == expected
        self.open[reservation.seq] = (reservation, tokens)

    def expected_blocks(self, model: ModelSequence, group: int) -> tuple[list[int], list[int]]:
        """Raw and packed block indices by the rules."""
        length, size, spec = len(model.tokens), self.size, self.groups[group]
        live = [
            b for b in range(-(-length // size)) if any(visible(spec, p, length) for p in range(b * size, (b + 1) * size))
        ]
        raw = [b for b in live if b not in model.packed[group]]
        return raw, [b for b in live if b in model.packed[group]]

    def seal_in_model(self, model: ModelSequence) -> None:
        """The sealing rule, block by block."""
        length = len(model.tokens)
        for spec, packed in zip(self.groups, model.packed, strict=True):
            for block in range(length // self.size if spec.packed_block_bytes else 0):
                sinks = block * self.size < spec.sinks
                if not sinks and (block + 1) * self.size <= length - spec.recent:
                    packed.add(block)

    # --------------------------------------------------------------------------------------------------- rules

    @rule()
    @precondition(lambda self: len(self.model) < 6)
    def create(self) -> None:
        seq = self.manager.create()
        assert seq not in self.model
        assert self.manager.length(seq) == 0
        self.model[seq] = ModelSequence(len(self.groups))

    @rule(data=st.data())
    @precondition(lambda self: self.settled())
    def reserve(self, data: st.DataObject) -> None:
        seq = self.pick(data, self.settled())
        tokens = self.draw_tokens(data)
        need = self.manager.demand(seq, len(tokens))
        fits, before = self.manager.fits(need), self.snapshot()
        used = {key: pool.used_blocks for key, pool in self.manager._books.pools.items()}
        try:
            reservation = self.manager.reserve(seq, len(tokens))
        except CacheFullError:
            assert not fits
            assert self.snapshot() == before
            return
        assert fits
        taken = {key: pool.used_blocks - used[key] for key, pool in self.manager._books.pools.items()}
        assert {key: n for key, n in taken.items() if n} == dict(need)
        self.play(reservation, tokens)

    @rule(data=st.data())
    @precondition(lambda self: len(self.settled()) > 1)
    def reserve_many(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.settled()), unique=True, min_size=2, max_size=4))
        tokens = [self.draw_tokens(data, high=8) for _ in chosen]
        fits = self.manager.fits(*(self.manager.demand(s, len(t)) for s, t in zip(chosen, tokens, strict=True)))
        before = self.snapshot()
        try:
            done = self.manager.reserve_many([(s, len(t)) for s, t in zip(chosen, tokens, strict=True)])
        except CacheFullError:
            assert not fits
            assert self.snapshot() == before
            return
        assert fits
        for reservation, new in zip(done, tokens, strict=True):
            self.play(reservation, new)

    @rule(data=st.data(), known=st.sampled_from([True, True, True, False]), finish=st.booleans())
    @precondition(lambda self: self.open)
    def commit(self, data: st.DataObject, known: bool, finish: bool) -> None:
        seq = self.pick(data, list(self.open))
        reservation, tokens = self.open.pop(seq)
        self.unfinished += self.manager.commit(reservation, tokens if known else None, b"")
        model = self.model[seq]
        model.tokens += tokens
        self.seal_in_model(model)
        if finish:
            self.finish()

    @rule()
    def finish(self) -> None:
        for seal in self.unfinished:
            if seal.encode:
                self.memory[seal.group, "packed", seal.packed_id] = list(self.content(seal.group, "raw", seal.raw_id))
        self.manager.finish_seals(self.unfinished)
        self.manager.finish_unseals(self.unfinished_unseals)
        self.unfinished, self.unfinished_unseals = [], []

    @rule(data=st.data())
    @precondition(lambda self: self.open)
    def rollback(self, data: st.DataObject) -> None:
        seq = self.pick(data, list(self.open))
        self.manager.rollback(self.open.pop(seq)[0])

    @rule(data=st.data())
    @precondition(lambda self: self.settled() and len(self.model) < 6)
    def fork(self, data: st.DataObject) -> None:
        seq = self.pick(data, self.settled())
        before = self.snapshot()
        try:
            child = self.manager.fork(seq)
        except CacheFullError:
            assert not self.growable
            assert self.snapshot() == before
            return
        self.model[child] = self.model[seq].copy()

    @rule(data=st.data())
    @precondition(lambda self: self.settled())
    def truncate(self, data: st.DataObject) -> None:
        self.finish()  # the caller encodes before anything else happens
        seq = self.pick(data, self.settled())
        model, size = self.model[seq], self.size
        length = data.draw(st.integers(0, len(model.tokens)))
        before = self.snapshot()
        possible = True
        for group in range(len(self.groups)):
            have = set().union(*self.expected_blocks(model, group))
            shorter = ModelSequence(len(self.groups))
            shorter.tokens = model.tokens[:length]
            possible &= set().union(*self.expected_blocks(shorter, group)) <= have
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
        for group, packed in enumerate(model.packed):
            cut = {b for b in packed if b * size < length < (b + 1) * size}
            live = set().union(*self.expected_blocks(model, group))
            assert sorted(b for b in cut if b in live) == [length // size] * sum(u.group == group for u in unseals)
            model.packed[group] = {b for b in packed if (b + 1) * size <= length}
        for unseal in unseals:
            self.memory[unseal.group, "raw", unseal.raw_id] = list(
                self.content(unseal.group, "packed", unseal.packed_id)
            )
        self.unfinished_unseals += unseals

    @rule(data=st.data())
    @precondition(lambda self: self.model)
    def free(self, data: st.DataObject) -> None:
        seq = self.pick(data, list(self.model))
        self.manager.free(seq)
        del self.model[seq]
        self.open.pop(seq, None)

    @rule(data=st.data())
    @precondition(lambda self: len(self.model) < 6)
    def adopt(self, data: st.DataObject) -> None:
        manager = self.manager
        prefix = self.model[self.pick(data, list(self.model))].tokens if self.model else []
        tokens = prefix + self.draw_tokens(data, low=0 if prefix else 1, high=6)
        if not tokens:
            return
        hit = manager.match(tokens, b"")
        assert hit % self.size == 0 and 0 <= hit < len(tokens)
        new = data.draw(st.integers(1, len(tokens) - hit))
        promised = manager.fits(manager.demand_for(hit, new, tokens=tokens))
        seq = manager.create()
        model = self.model[seq] = ModelSequence(len(self.groups))
        try:
            manager.adopt(seq, tokens, hit)
        except CacheFullError:
            assert not promised
            return
        model.tokens = tokens[:hit]
        for spec, packed in zip(self.groups, model.packed, strict=True):
            if spec.seals:
                packed.update(b for b in range(hit // self.size) if b * self.size >= spec.sinks)
        assert manager.fits(manager.demand(seq, new)) == promised
        if promised:
            self.play(manager.reserve(seq, new), tokens[hit : hit + new])

    @rule()
    def reset_prefix_cache(self) -> None:
        self.manager.reset_prefix_cache()
        assert self.manager.bytes_cached() == 0

    @rule(data=st.data())
    @precondition(lambda self: self.open)
    def refuse_while_open(self, data: st.DataObject) -> None:
        seq = self.pick(data, list(self.open))
        calls: list[Callable[[], object]] = [
            lambda: self.manager.reserve(seq, 1),
            lambda: self.manager.fork(seq),
            lambda: self.manager.truncate(seq, 0),
            lambda: self.manager.commit(self.open[seq][0]._replace(), None),
        ]
        for call in calls:
            try:
                call()
            except RequestError:
                continue
            raise AssertionError("an open reservation was overlooked")

    # ---------------------------------------------------------------------------------------------- invariants

    @invariant()
    def books_balance(self) -> None:
        manager = self.manager
        manager.check()
        assert set(manager.sequences()) == set(self.model)
        assert self.growable or manager.bytes_in_use() <= self.budget
        assert self.growable or manager.arena.total_bytes <= self.budget
        if not self.open and not self.unfinished and not self.unfinished_unseals:
            blocks, entries = set(), 0
            for seq in self.model:
                for group in range(len(self.groups)):
                    view = manager.table(seq, group)
                    blocks |= {(group, "raw", b) for b in view.raw_ids.tolist()}
                    blocks |= {(group, "packed", b) for b in view.packed_ids.tolist()}
                    entries += view.raw_ids.size + view.packed_ids.size
            held = sum(manager.pool(g, state).block_bytes for g, state, _ in blocks)
            assert manager.bytes_in_use() == held + 8 * entries

    @invariant()
    def tables_follow_the_rules_and_hold_the_tokens(self) -> None:
        waiting = {(seal.group, seal.packed_id) for seal in self.unfinished}
        for seq, model in self.model.items():
            assert self.manager.length(seq) == len(model.tokens)
            known = digests(model.tokens)
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

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
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


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
