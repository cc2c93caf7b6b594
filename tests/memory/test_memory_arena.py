"""Arena and pools: extents, reference counts, what is evicted and in which order."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.errors import BudgetError
from kvfold.memory.arena import Arena, plan_extents
from kvfold.memory.pool import BlockPool


@given(
    budget=st.integers(1, 2**33),
    sizes=st.lists(st.integers(1, 3000).map(lambda n: 64 * n), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_extents_fill_the_budget(budget: int, sizes: list[int]) -> None:
    try:
        n, extent = plan_extents(budget, sizes)
    except BudgetError:
        assert budget < max(sizes) + 64
        return
    assert extent % 64 == 0
    assert extent >= max(sizes)
    assert budget - n * 64 < n * extent <= budget


@pytest.mark.parametrize("budget", [2**26, 2**28, 10**9, 3 * 2**30, 80 * 2**30])
@pytest.mark.parametrize(
    "sizes", [[2**16, 18 * 1024], [2**20, 300 * 1024, 2**19, 150 * 1024], [4096], [5 * 2**20 + 64]]
)
def test_little_of_the_budget_is_wasted(budget: int, sizes: list[int]) -> None:
    n, extent = plan_extents(budget, sizes)
    assert budget / 500 <= extent * n
    assert extent <= max(2 * 4 * 2**20, 8 * max(sizes))
    lost = sum(extent % size for size in sizes) / (len(sizes) * extent)
    assert lost + len(sizes) / (2 * n) < (0.25 if budget < 100 * max(sizes) else 0.08)


def test_a_tiny_budget_still_gives_each_pool_an_extent() -> None:
    n, _ = plan_extents(12 * 4096, [4096, 1152])
    assert n >= 4


def test_borrow_and_give_back() -> None:
    arena = Arena(1000, 64)
    first = arena.borrow()
    assert (first, arena.borrow()) == (0, 1)
    arena.give_back(0)
    assert arena.borrow() == 0
    with pytest.raises(ValueError, match="not lent"):
        arena.give_back(arena.n_extents - 1)
    while arena.borrow() is not None:
        pass
    assert arena.free_extents == 0
    before = arena.total_bytes
    arena.grow(2)
    assert arena.generation == 1
    assert arena.total_bytes == before + 2 * arena.extent_bytes
    assert arena.borrow() == arena.n_extents - 2


def test_budget_too_small() -> None:
    with pytest.raises(BudgetError, match="holds no block"):
        Arena(1000, 1024)
    with pytest.raises(ValueError, match="multiple of 64"):
        BlockPool(Arena(4096, 64), "odd", 100)


def two_pools(extents: int = 4) -> tuple[Arena, BlockPool, BlockPool]:
    """Extents of 256 bytes: four blocks of ``small``, two of ``large``."""
    arena = Arena(256 * extents, 256)
    arena.extent_bytes, arena.n_extents, arena._free = 256, extents, list(range(extents))
    return arena, BlockPool(arena, "small", 64), BlockPool(arena, "large", 128)


def check(arena: Arena, *pools: BlockPool) -> None:
    for pool in pools:
        pool.check()
    arena.check(set().union(*(pool.held() for pool in pools)))


def test_ids_and_offsets() -> None:
    arena, small, large = two_pools()
    assert [small.allocate() for _ in range(5)] == [0, 1, 2, 3, 4]
    assert [large.allocate() for _ in range(3)] == [4, 5, 6]
    assert small.offset(np.array([[0, 3], [4, 5]])).tolist() == [[0, 192], [256, 320]]
    assert large.offset(np.array([4, 5, 6])).tolist() == [512, 640, 768]
    assert small.offset(np.array([], dtype=np.int64)).dtype == np.int64
    assert small.allocate() == 5
    small.unref(1)
    assert small.allocate() == 1  # the lowest free id first
    check(arena, small, large)


def test_free_extents_go_back() -> None:
    arena, small, large = two_pools(2)
    blocks = [small.allocate() for _ in range(8)]
    assert small.allocate() is None
    assert large.allocate() is None
    for block in blocks[:4]:
        small.unref(block)
    assert arena.free_extents == 1
    assert large.allocate() == 0
    check(arena, small, large)


def test_references() -> None:
    arena, small, _ = two_pools()
    block = small.allocate()
    small.ref(block)
    assert small.refcount(block) == 2
    assert small.unref(block) == 1
    assert small.unref(block) == 0
    for wrong in (small.unref, small.ref, small.mark):
        with pytest.raises(ValueError, match="block 0 of pool small"):
            wrong(block)
    assert arena.lent_extents == 0


def cached(pool: BlockPool, count: int) -> list[int]:
    blocks = [pool.allocate() for _ in range(count)]
    for block in blocks:
        pool.mark(block)
    for block in blocks:
        pool.unref(block)
    return blocks


def test_cached_blocks_stay_until_the_room_is_needed() -> None:
    evicted: list[int] = []
    arena, small, _ = two_pools(2)
    small._on_evict = evicted.append
    keeper = small.allocate()
    old = cached(small, 3)
    small.ref(old[0])  # used again, and let go: now the youngest
    small.unref(old[0])
    assert [small.allocate() for _ in range(4)] == [4, 5, 6, 7]
    assert not evicted
    assert [small.allocate() for _ in range(3)] == [old[1], old[2], old[0]] == evicted
    assert small.allocate() is None
    assert small.refcount(keeper) == 1
    assert small.evictions == 3
    check(arena, small)


def test_cached_blocks_before_extents_if_not_early() -> None:
    arena, small, _ = two_pools(4)
    small.allocate()
    old = cached(small, 3)
    assert [small.allocate(early=False) for _ in range(4)] == [*old, 4]
    check(arena, small)


def test_the_least_recently_used_goes_first_wherever_it_lies() -> None:
    arena, small, large = two_pools(3)
    idle = cached(large, 2)  # a whole extent, let go first
    small.allocate()
    beside = cached(small, 3)
    assert [small.allocate() for _ in range(4)] == [8, 9, 10, 11]
    assert small.allocate() == 0 * 4  # the extent of `large` was idle the longest
    assert not large.findable(idle[0])
    assert [small.allocate() for _ in range(3)] == [1, 2, 3]
    assert [small.allocate() for _ in range(3)] == beside
    check(arena, small, large)


def test_a_starving_pool_takes_idle_extents_of_others() -> None:
    arena, small, large = two_pools(2)
    cached(small, 8)
    assert arena.idle_extents == 2
    assert large.allocate() == 0
    assert small.cached_blocks == 4
    assert small.in_place() == 0
    check(arena, small, large)
    small.ref(4)  # no longer idle
    assert [large.allocate(), large.allocate()] == [1, None]
    check(arena, small, large)


def test_the_longest_idle_extent_of_all_pools_goes_first() -> None:
    arena, small, large = two_pools(3)
    other = BlockPool(arena, "other", 64)
    first, second = cached(small, 4), cached(large, 2)
    assert [other.allocate() for _ in range(5)] == [8, 9, 10, 11, 0]
    assert not small.findable(first[0])
    assert large.findable(second[0])
    assert [other.allocate() for _ in range(4)] == [1, 2, 3, 4]
    assert not large.findable(second[0])
    check(arena, small, large, other)


def test_unmark_frees() -> None:
    arena, small, _ = two_pools(2)
    blocks = cached(small, 4)
    for block in blocks[:3]:
        small.unmark(block)
        check(arena, small)
    assert small.free_blocks == 3
    small.unmark(blocks[3])
    assert arena.lent_extents == 0
    check(arena, small)


@pytest.mark.parametrize("seed", range(15))
def test_pools_against_sets(seed: int) -> None:
    """Random use of two pools: nothing is lost, nothing used is handed out, and forecasts come true."""
    draw = random.Random(seed)
    arena, *pools = two_pools(draw.randint(1, 5))
    evicted: set[tuple[int, int]] = set()
    for which, pool in enumerate(pools):
        pool._on_evict = lambda block, which=which: evicted.add((which, block))
    used: dict[tuple[int, int], int] = {}
    kept: set[tuple[int, int]] = set()  # findable
    for _ in range(300):
        which = draw.randrange(2)
        pool, action = pools[which], draw.random()
        mine = [block for w, block in used if w == which]
        idle = [block for w, block in kept if w == which and (w, block) not in used]
        if action < 0.4:
            evicted.clear()
            before = [pool.free_blocks + pool.cached_blocks for pool in pools]
            block = pool.allocate(early=draw.random() < 0.5)
            assert evicted <= kept - used.keys()
            kept -= evicted
            if block is None:
                assert before[which] == 0
                assert arena.free_extents + arena.idle_extents == 0
            else:
                assert (which, block) not in used
                assert (which, block) not in kept
                used[which, block] = 1
        elif action < 0.5 and mine:
            block = draw.choice(mine)
            pool.ref(block)
            used[which, block] += 1
        elif action < 0.6 and idle:
            block = draw.choice(idle)
            slots, change = pool.forecast([block], [])
            extents = arena.free_extents + arena.idle_extents
            pool.ref(block)
            used[which, block] = 1
            assert (pool.in_place(), arena.free_extents + arena.idle_extents) == (slots, extents + change)
        elif action < 0.7 and mine:
            block = draw.choice(mine)
            pool.mark(block)
            kept.add((which, block))
        elif action < 0.73 and kept:
            w, block = draw.choice(sorted(kept))
            pools[w].unmark(block)
            kept.discard((w, block))
        elif action < 0.78 and mine:
            once = [block for block in mine if used[which, block] == 1]
            gone = draw.sample(once, draw.randint(0, len(once)))
            slots, change = pool.forecast([], gone)
            extents = arena.free_extents + arena.idle_extents
            for block in gone:
                pool.unref(block)
                del used[which, block]
            assert (pool.in_place(), arena.free_extents + arena.idle_extents) == (slots, extents + change)
        elif mine:
            block = draw.choice(mine)
            used[which, block] -= 1
            assert pool.unref(block) == used[which, block]
            if not used[which, block]:
                del used[which, block]
        check(arena, *pools)
        for w, pool in enumerate(pools):
            assert pool.references() == {block: n for (v, block), n in used.items() if v == w}
            assert pool.marked() == {block for v, block in kept if v == w}
        if draw.random() < 0.1:
            want = draw.randint(0, 12)
            _, *copies = copy.deepcopy((arena, *pools))
            room = pools[0].in_place() + 4 * (arena.free_extents + arena.idle_extents)
            got = sum(copies[0].allocate(early=False) is not None for _ in range(want))
            assert got == min(want, room)
