"""The scheduler over the real books, without a model: purity, budgets, age, room, and an end to everything."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.engine.request import SamplingParams
from kvfold.engine.sampling import RowSampler
from kvfold.engine.scheduler import Scheduler, StepPlan, Work
from kvfold.engine.state import Branch, Request, Status
from kvfold.errors import RequestError
from kvfold.memory.manager import CacheManager, GroupSpec
from kvfold.rule import KeepRule

SIZE = 4
KIB64 = 2**16  # nothing is allocated; small beside a block are the tables
FULL = GroupSpec(name="full", raw_block_bytes=KIB64, packed_block_bytes=0, sinks=0, recent=0, kind="full", window=None)
PACKED = GroupSpec(
    name="full", raw_block_bytes=KIB64, packed_block_bytes=KIB64 // 4, sinks=2, recent=6, kind="full", window=None
)
SLIDING = GroupSpec(
    name="sliding",
    raw_block_bytes=KIB64 // 2,
    packed_block_bytes=KIB64 // 4,
    sinks=0,
    recent=4,
    kind="sliding",
    window=9,
)
HALVED = replace(PACKED, pages=4, rule=KeepRule(keep=0.5))
BUDGETED = replace(FULL, sinks=2, recent=6, pages=4, rule=KeepRule(budget=16, every=8, chunk=16))


class Driver:
    """Carries plans out on the books alone: every token is 7, and a request ends after its ``max_tokens``."""

    def __init__(self, groups: list[GroupSpec], blocks: int, **options: Any) -> None:
        wanted = blocks * max(group.raw_block_bytes for group in groups)
        budget = wanted
        while (books := CacheManager(groups, budget, SIZE)).arena.total_bytes < wanted:
            budget += 4096  # the block tables take their share
        self.books = books
        rule = next((group.rule for group in groups if group.rule is not None), None)
        self.scheduler = Scheduler(self.books, rule=rule, **options)
        self.arrivals = self.preempted = 0
        self.finished: list[int] = []

    def add(self, prompt: list[int], max_tokens: int = 4, n: int = 1, salt: bytes = b"") -> Branch:
        params = SamplingParams(max_tokens=max_tokens, n=n)
        limit = len(prompt) + max_tokens
        request = Request(
            id=str(self.arrivals),
            prompt=prompt,
            params=params,
            salt=salt,
            arrival=self.arrivals,
            limit=limit,
            end_ids=frozenset(),
        )
        self.arrivals += 1
        branch = Branch(request=request, index=0, tokens=list(prompt), sampler=RowSampler(params), text=None)
        request.branches.append(branch)
        self.scheduler.add(branch)
        return branch

    def plan(self) -> StepPlan:
        """The plan, after whoever must give way did."""
        while True:
            plan = self.scheduler.plan()
            assert plan == self.scheduler.plan()
            assert plan.stuck is None
            if plan.preempt is None:
                self.scheduler.note(plan)
                assert plan == self.scheduler.plan()
                return plan
            assert plan.empty
            assert plan.preempt is self.scheduler.running[-1]
            assert plan.preempt.seq is not None
            self.books.free(plan.preempt.seq)
            self.scheduler.preempt(plan.preempt)
            self.preempted += 1

    def run(self, plan: StepPlan) -> None:
        """Carries a plan out; that it fits is part of what is tested."""
        work = list(plan.work)
        for branch, cached, first in plan.admit:
            seq = self.books.create()
            self.books.adopt(seq, self.scheduler.shareable(branch), cached, branch.request.salt)
            branch.computed = cached
            self.books.expect(seq, self.scheduler.expected(branch, cached))
            self.scheduler.admit(branch, seq)
            work.append(first)
        reservations = self.books.reserve_many([(item.branch.seq or 0, item.chunk) for item in work])
        for item, reservation in zip(work, reservations, strict=True):
            branch, start, chunk = item[:3]
            assert (start, reservation.start) == (branch.computed, start)
            tokens = branch.tokens[start : start + chunk]
            self.books.finish_seals(self.books.commit(reservation, tokens, branch.request.salt))
            branch.computed += chunk
        for item in work:
            if item.retain:
                self._keep(item.branch)
        for item in work:
            if item.sample:
                self._sampled(item.branch)

    def _keep(self, branch: Branch) -> None:
        """Retention that needs all the blocks it may."""
        keeping = self.books.reserve_keep(branch.seq or 0)
        if keeping is not None:
            used = [len(blocks) for blocks in keeping.blocks]
            pages = [group.pages for group in self.books.groups]
            self.books.keep(keeping, used, [n * (1 + each) for n, each in zip(used, pages, strict=True)])

    def _sampled(self, branch: Branch) -> None:
        request, branches = branch.request, [branch]
        for index in range(len(request.branches), request.params.n):
            fork = branch.fork(index, seq=self.books.fork(branch.seq or 0), seed=0)
            request.branches.append(fork)
            branches.append(fork)
            self.scheduler.join(fork)
        for each in branches:
            each.tokens.append(7 + each.index)
            if len(each.tokens) == request.limit:
                self.end(each)

    def end(self, branch: Branch) -> None:
        if branch.seq is not None:
            self.books.free(branch.seq)
        self.scheduler.finish(branch)
        self.finished.append(branch.request.arrival)

    def check(self, plan: StepPlan) -> None:
        work = [*plan.work, *(admission.work for admission in plan.admit)]
        assert sum(item.chunk for item in work) <= self.scheduler.max_batched_tokens
        assert len({item.branch for item in work}) == len(work)
        slots = sum(branch.slots for branch in self.scheduler.running) + sum(a.branch.slots for a in plan.admit)
        assert slots <= self.scheduler.max_sequences
        assert all(item.sample == (item.start + item.chunk == len(item.branch.tokens)) for item in work)
        assert [a.branch for a in plan.admit] == list(self.scheduler.waiting)[: len(plan.admit)]

    def drain(self, limit: int = 5000) -> int:
        """Steps until nothing is left; how many."""
        steps = 0
        while self.scheduler.running or self.scheduler.waiting:
            plan = self.plan()
            assert not plan.empty
            self.check(plan)
            self.run(plan)
            steps += 1
            assert steps < limit
        assert self.books.bytes_in_use() == 0
        self.books.check()
        return steps


def numbers(n: int, start: int = 1) -> list[int]:
    return list(range(start, start + n))


def test_decodes_come_first_and_prompts_are_cut_at_blocks() -> None:
    driver = Driver([FULL], 100, max_batched_tokens=10, max_sequences=4)
    first, second = driver.add(numbers(3), max_tokens=9), driver.add(numbers(30))
    driver.run(driver.plan())
    assert (first.computed, second.computed) == (3, 4)  # 7 tokens were left: one whole block of 4
    plan = driver.plan()
    assert plan.work == (Work(first, 3, 1, True), Work(second, 4, 8, False))


def test_a_dropped_plan_leaves_nothing_behind() -> None:
    driver = Driver([PACKED, SLIDING], 30, max_batched_tokens=16, max_sequences=4)
    for _ in range(3):
        driver.add(numbers(20))
    driver.run(driver.plan())
    usage, versions = driver.books.usage(), [driver.books.table_version(seq) for seq in driver.books.sequences()]
    for _ in range(5):
        driver.scheduler.plan()
    assert driver.books.usage() == usage
    assert [driver.books.table_version(seq) for seq in driver.books.sequences()] == versions
    driver.books.check()


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    driver = Driver([FULL], 16, max_batched_tokens=64, max_sequences=8)
    holder, large, small = driver.add(numbers(40), 8), driver.add(numbers(40, 100), 8), driver.add([5], 2)
    plan = driver.plan()
    assert [admission.branch for admission in plan.admit] == [holder]
    assert plan.blocked is None or plan.blocked is large
    driver.run(plan)
    while holder.status is Status.RUNNING:
        assert (large.status, small.status) == (Status.WAITING, Status.WAITING)
        driver.run(driver.plan())
    assert large in [admission.branch for admission in driver.plan().admit]
    driver.drain()


def test_the_youngest_gives_way_and_returns_in_order() -> None:
    driver = Driver([FULL], 14, max_batched_tokens=64, max_sequences=8)
    branches = [driver.add(numbers(8, 100 * i), 24) for i in range(3)]
    driver.drain()
    assert driver.preempted > 0
    assert driver.finished == sorted(driver.finished)
    assert [len(branch.tokens) for branch in branches] == [32] * 3


def test_a_known_prefix_is_not_computed_again_nor_asked_room_for_twice() -> None:
    driver = Driver([FULL], 30, max_batched_tokens=128, max_sequences=8)
    start = numbers(64)
    driver.add([*start, 900], 20)
    driver.run(driver.plan())
    for i in range(4):
        driver.add([*start, 901 + i], 2)
    plan = driver.plan()  # 16 of 30 blocks are taken; four prompts of 17 blocks fit because they share them
    assert [admission.cached for admission in plan.admit] == [64] * 4
    driver.run(plan)
    driver.drain()
    assert driver.preempted == 0


@pytest.mark.parametrize(("group", "shared"), [(FULL, 64), (PACKED, 56)])
def test_prompts_that_begin_alike_wait_for_the_first_to_compute_it(group: GroupSpec, shared: int) -> None:
    driver = Driver([group], 60, max_batched_tokens=32, max_sequences=8)
    first, second, third = (driver.add([*numbers(64), 900 + i], 3) for i in range(3))
    stranger = driver.add(numbers(9, 500), 3)
    while second.status is Status.WAITING:
        driver.run(plan := driver.plan())
        assert plan.admit == () or plan.admit[0].branch in (first, second)
    assert [(a.branch, a.cached) for a in plan.admit] == [(second, shared), (third, shared), (stranger, 0)]
    driver.drain()


@pytest.mark.parametrize(
    ("length", "salts", "caching", "at_once"),
    [(30, b"aaa", True, 1), (30, b"abc", True, 3), (30, b"aaa", False, 3), (3, b"aaa", True, 3)],
)
def test_nobody_waits_for_what_cannot_be_shared(length: int, salts: bytes, caching: bool, at_once: int) -> None:
    driver = Driver([PACKED], 90, max_batched_tokens=128, max_sequences=8, prefix_caching=caching)
    for i in range(3):
        driver.add([*numbers(length), 900 + i], 3, salt=salts[i : i + 1])
    assert len(driver.plan().admit) == at_once


def test_blocks_that_are_only_cached_are_not_free_for_whoever_adopts_them() -> None:
    driver = Driver([FULL], 20, max_batched_tokens=128, max_sequences=8)
    driver.add(numbers(60), 1)
    driver.drain()
    driver.add([*numbers(60), 5], 3)
    driver.add(numbers(30, 500), 3)
    driver.drain()


def test_salts_do_not_share() -> None:
    driver = Driver([FULL], 60, max_batched_tokens=128, max_sequences=8)
    driver.add(numbers(40), 3, salt=b"a")
    driver.run(driver.plan())
    driver.add(numbers(40), 3, salt=b"b")
    driver.add(numbers(40), 3, salt=b"a")
    assert [admission.cached for admission in driver.plan().admit] == [0, 36]
    driver.drain()


def test_forks_count_before_they_exist() -> None:
    driver = Driver([FULL], 100, max_batched_tokens=64, max_sequences=4)
    driver.add(numbers(8), 4, n=3)
    driver.add(numbers(8), 4, n=2)
    plan = driver.plan()
    assert len(plan.admit) == 1
    driver.drain()
    assert sorted(driver.finished) == [0, 0, 0, 1, 1]


def test_a_step_must_have_room_for_every_sequence() -> None:
    with pytest.raises(RequestError, match="max_batched_tokens"):
        Driver([FULL], 10, max_batched_tokens=4, max_sequences=8)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([[FULL], [PACKED], [FULL, SLIDING], [PACKED, SLIDING], [HALVED], [BUDGETED, SLIDING]]),
    blocks=st.integers(20, 60),
    batched=st.sampled_from([8, 16, 64]),
    seed=st.integers(0, 10**6),
)
def test_everything_ends(groups: list[GroupSpec], blocks: int, batched: int, seed: int) -> None:
    """Random arrivals and cancellations in a small pool: the oldest always moves, so all of it ends, and nothing
    leaks.
    """
    draw = random.Random(seed)
    driver = Driver(groups, blocks, max_batched_tokens=batched, max_sequences=8)
    live: list[Branch] = []
    for _ in range(60):
        if draw.random() < 0.4:
            length, tokens = draw.randint(1, 40), draw.randint(1, 12)
            total = length + tokens
            if all(driver.books.can_ever_fit(total, chunk, length) for chunk in (1, batched)):
                start = draw.choice([1, 1, 500])
                n = draw.choice([1, 1, 1, 3])
                live.append(driver.add(numbers(length, start), tokens, n=n))
        if live and draw.random() < 0.1:
            request = live.pop(draw.randrange(len(live))).request
            for branch in request.branches:
                if branch.status is not Status.FINISHED:
                    driver.end(branch)
        plan = driver.plan()
        driver.check(plan)
        if not plan.empty:
            oldest = min((b for b in [*driver.scheduler.running, *driver.scheduler.waiting]), key=lambda b: b.key)
            assert oldest in [*(w.branch for w in plan.work), *(a.branch for a in plan.admit)]
            driver.run(plan)
    driver.drain()
