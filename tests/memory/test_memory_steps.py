"""Reserve, commit, roll back, fork, truncate: one behaviour at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvfold.errors import BudgetError, CacheFullError, RequestError, UnsupportedError
from kvfold.formats import block_counts
from kvfold.memory.manager import CacheManager, Copy, GroupSpec, Reservation, Run, Seal, Unseal

RAW = GroupSpec("raw", 128)
PACKED = GroupSpec("packed", 256, 64, sinks=2, recent=4)


def step(manager: CacheManager, seq: int, count: int) -> Reservation:
    """Reserve, commit and finish; tokens are the positions."""
    reservation = manager.reserve(seq, count)
    tokens = list(range(reservation.start, reservation.start + count))
    manager.finish_seals(manager.commit(reservation, tokens))
    manager.check()
    return reservation


def blocks(manager: CacheManager, seq: int, group: int = 0) -> tuple[list[int], list[int]]:
    view = manager.table(seq, group)
    return view.raw_block_index.tolist(), view.packed_block_index.tolist()


def test_runs_cover_the_new_tokens() -> None:
    manager = CacheManager([RAW], 2**13, 4)
    seq = manager.create()
    first = manager.reserve(seq, 6)
    assert first.runs == ((Run("raw", 0, 0, 0, 4, 0), Run("raw", 1, 1, 0, 2, 4)),)
    assert (first.seq, first.start, first.new_tokens, first.copies) == (seq, 0, 6, ())
    assert manager.table(seq, 0).raw_ids.tolist() == [0, 1]  # what the step took is in the table at once
    assert manager.length(seq) == 0
    assert manager.commit(first, None) == ()
    second = manager.reserve(seq, 1)
    assert second.runs == ((Run("raw", 1, 1, 2, 3, 0),),)
    manager.commit(second, None)
    third = manager.reserve(seq, 3)
    assert third.runs == ((Run("raw", 1, 1, 3, 4, 0), Run("raw", 2, 2, 0, 2, 1)),)
    assert manager.length(seq) == 7


def test_what_seals_at_the_end_of_the_step_is_packed_at_once() -> None:
    manager = CacheManager([PACKED], 2**14, 4)
    seq = manager.create()
    reservation = manager.reserve(seq, 18)
    assert [(run.state, run.block_index) for run in reservation.runs[0]] == [
        ("raw", 0),  # sinks
        ("packed", 1),
        ("packed", 2),
        ("raw", 3),  # 16 > 18 - 4
        ("raw", 4),
    ]
    assert blocks(manager, seq) == ([0, 3, 4], [1, 2])
    assert manager.commit(reservation, None) == ()
    assert blocks(manager, seq) == ([0, 3, 4], [1, 2])
    reservation = manager.reserve(seq, 2)
    old = manager.table(seq, 0)
    (seal,) = manager.commit(reservation, None)
    new = manager.table(seq, 0)
    assert seal == Seal(0, old.raw_ids[1], new.packed_ids[2], True)
    assert old.raw_block_index.tolist() == [0, 3, 4]  # a view stays as it was
    assert blocks(manager, seq) == ([0, 4], [1, 2, 3])
    assert manager.pool(0, "raw").refcount(seal.raw_id) == 1
    manager.finish_seals([seal])
    assert manager.pool(0, "raw").refcount(seal.raw_id) == 0
    assert manager.stats().sealed_blocks == 1


@pytest.mark.parametrize("recent", [0, 1, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", ["full", "sliding", "chunked"])
def test_decoding_follows_the_rules_token_by_token(kind: str, recent: int) -> None:
    spec = GroupSpec("g", 256, 64, sinks=3, recent=recent, kind=kind, window=None if kind == "full" else 11)
    manager = CacheManager([RAW, spec], 2**16, 4)
    seq = manager.create()
    for length in range(1, 60):
        step(manager, seq, 1)
        raw, packed = blocks(manager, seq, 1)
        assert (len(raw), len(packed)) == block_counts(
            length,
            block_size=4,
            kind=kind,
            window=spec.window,
            sinks=3,
            recent=recent,
            packs=True,
        )
        rows = len(raw) + len(packed) + len(blocks(manager, seq)[0])
        assert manager.bytes_in_use() == -(-length // 4) * 128 + len(raw) * 256 + len(packed) * 64 + 8 * rows


def test_a_window_releases_and_skips() -> None:
    manager = CacheManager([GroupSpec("w", 128, kind="sliding", window=5)], 2**12, 4)
    seq = manager.create()
    reservation = manager.reserve(seq, 22)
    # the next query, at 22, reads 18 ...: what lies in blocks before is never stored
    assert reservation.runs == ((Run("raw", 0, 4, 0, 4, 16), Run("raw", 1, 5, 0, 2, 20)),)
    manager.commit(reservation, None)
    assert blocks(manager, seq) == ([4, 5], [])
    step(manager, seq, 2)
    assert blocks(manager, seq) == ([5], [])
    reservation = manager.reserve(seq, 1)
    assert blocks(manager, seq) == ([5, 6], [])
    manager.commit(reservation, None)


def test_copy_on_write() -> None:
    manager = CacheManager([RAW], 2**13, 4)
    seq = manager.create()
    step(manager, seq, 6)
    child = manager.fork(seq)
    assert manager.bytes_in_use() == 2 * 128 + 4 * 8
    assert dict(manager.demand(seq, 1)) == {(0, "raw"): 1}
    reservation = manager.reserve(seq, 1)
    assert reservation.copies == (Copy(0, "raw", 1, 2),)
    assert reservation.runs == ((Run("raw", 2, 1, 2, 3, 0),),)
    assert manager.table(seq, 0).raw_ids.tolist() == [0, 2]
    manager.rollback(reservation)
    manager.check()
    assert manager.table(seq, 0).raw_ids.tolist() == [0, 1]
    step(manager, seq, 1)
    assert manager.reserve(child, 1).copies == ()  # now it is its own
    assert manager.stats().copied_blocks == 2


def test_a_findable_block_is_not_written_to() -> None:
    manager = CacheManager([RAW], 2**13, 4)
    seq = manager.create()
    step(manager, seq, 8)
    assert manager.truncate(seq, 6) == ()
    assert manager.match([*range(8), 0]) == 8
    reservation = manager.reserve(seq, 1)
    assert reservation.copies == (Copy(0, "raw", 1, 2),)
    manager.commit(reservation, [99])
    assert manager.match([*range(8), 0]) == 8
    manager.check()


def test_a_shared_block_is_sealed_once() -> None:
    manager = CacheManager([PACKED], 2**14, 4)
    seq = manager.create()
    step(manager, seq, 11)
    child = manager.fork(seq)
    both = manager.demand(seq, 1), manager.demand(child, 1)
    assert dict(both[0]) == {(0, "raw"): 1, (0, "packed"): 1}  # a copy of the tail, and the seal of block 1
    assert dict(both[0] + both[1]) == {(0, "raw"): 2, (0, "packed"): 1}
    first, second = manager.reserve_many([(seq, 1), (child, 1)])
    manager.rollback(first)  # the other one encodes instead
    (seal,) = manager.commit(second, [11])
    assert seal.encode
    manager.check()
    (late,) = manager.commit(manager.reserve(seq, 1), [11])
    assert late == Seal(0, seal.raw_id, seal.packed_id, False)
    manager.finish_seals([late])
    assert manager.match([*range(12), 0]) == 4  # the sinks: nobody has encoded block 1 yet
    manager.finish_seals([seal])
    assert manager.match([*range(12), 0]) == 8
    manager.check()
    assert manager.table(seq, 0).packed_ids.tolist() == manager.table(child, 0).packed_ids.tolist() == [seal.packed_id]
    assert manager.pool(0, "raw").refcount(seal.raw_id) == 0
    assert manager.stats().sealed_blocks == 1


def test_a_twin_does_not_survive_a_change_of_its_block() -> None:
    manager = CacheManager([PACKED], 2**14, 4, prefix_caching=False)
    seq = manager.create()
    step(manager, seq, 11)
    child = manager.fork(seq)
    step(manager, seq, 1)  # seals block 1, which the child holds raw
    assert blocks(manager, child) == ([0, 1, 2], [])
    manager.truncate(child, 6)
    reservation = manager.reserve(child, 6)
    assert reservation.copies == ()  # the child alone holds block 1: it writes in place, and seals something else
    (seal,) = manager.commit(reservation, None)
    assert seal.encode
    assert seal.packed_id not in manager.table(seq, 0).packed_ids
    manager.finish_seals([seal])
    manager.free(child)
    manager.check()
    other = manager.fork(seq)
    manager.truncate(other, 6)
    (unseal,) = manager._books.unsealing
    manager.finish_unseals([unseal])
    step(manager, other, 5)
    step(manager, other, 1)
    assert manager.table(other, 0).packed_ids.tolist() != manager.table(seq, 0).packed_ids.tolist()


def test_truncate_into_a_packed_block() -> None:
    manager = CacheManager([PACKED, RAW], 2**14, 4)
    seq = manager.create()
    step(manager, seq, 30)
    assert blocks(manager, seq) == ([0, 6, 7], [1, 2, 3, 4, 5])
    packed = manager.table(seq, 0).packed_ids.tolist()
    (unseal,) = manager.truncate(seq, 15)
    manager.check()
    assert unseal == Unseal(0, packed[2], manager.table(seq, 0).raw_ids[1])
    assert blocks(manager, seq) == ([0, 3], [1, 2])
    assert manager.length(seq) == 15
    manager.finish_unseals([unseal])
    assert manager.pool(0, "packed").refcount(unseal.packed_id) == 0
    with pytest.raises(RequestError, match="not under way"):
        manager.finish_unseals([unseal])
    step(manager, seq, 1)
    assert manager.truncate(seq, 12) == ()  # at the end of a block nothing is cut
    assert blocks(manager, seq) == ([0], [1, 2])
    assert manager.truncate(seq, 0) == ()
    manager.check()
    step(manager, seq, 9)
    for wrong in (-1, 10):
        with pytest.raises(RequestError, match="cannot truncate"):
            manager.truncate(seq, wrong)


def test_truncate_behind_a_window_is_refused() -> None:
    manager = CacheManager([RAW, GroupSpec("w", 128, kind="sliding", window=5)], 2**13, 4)
    seq = manager.create()
    step(manager, seq, 22)
    manager.truncate(seq, 20)
    with pytest.raises(UnsupportedError, match="released") as error:
        manager.truncate(seq, 18)
    assert len(error.value.reasons) == 1
    assert manager.length(seq) == 20
    manager.truncate(seq, 0)
    manager.check()
    step(manager, seq, 3)


@pytest.mark.parametrize("packed", [0, 64])
@pytest.mark.parametrize("kind", ["sliding", "chunked"])
@pytest.mark.parametrize("window", [1, 12, 40])
def test_a_margin_lets_a_window_go_back(kind: str, window: int, packed: int) -> None:
    draw = random.Random(window)
    manager = CacheManager([GroupSpec("w", 128, packed, kind=kind, window=window, margin=64)], 2**16, 32)
    seq = manager.create()
    step(manager, seq, 200)
    for _ in range(60):
        length, back = manager.length(seq), draw.randint(0, 64)
        manager.finish_unseals(manager.truncate(seq, length - back))
        manager.check()
        for count in (draw.randint(1, 9), back):
            step(manager, seq, count + 1)
        assert manager.length(seq) > length
    with pytest.raises(UnsupportedError, match="released"):
        manager.truncate(seq, manager.length(seq) - 64 - window - 32)


def test_a_margin_counts_where_a_block_ends() -> None:
    manager = CacheManager([GroupSpec("w", 128, kind="sliding", window=12, margin=64)], 2**14, 32)
    seq = manager.create()
    step(manager, seq, 105)
    step(manager, seq, 5)
    manager.truncate(seq, 106)
    manager.check()
    step(manager, seq, 40)


def test_truncate_makes_its_own_room() -> None:
    """The raw block for a cut packed one may stand where the truncated blocks stood."""
    spec = GroupSpec("p", 256, 256)
    manager = CacheManager([spec], 256 * 9, 4, prefix_caching=False)
    seq = manager.create()
    while manager.fits(manager.demand(seq, 4)):
        step(manager, seq, 4)
    held = manager.length(seq)
    assert manager.arena.free_extents == 0
    (unseal,) = manager.truncate(seq, held - 5)
    manager.finish_unseals([unseal])
    manager.check()
    assert manager.length(seq) == held - 5
    (unseal,) = manager.truncate(seq, 1)
    manager.check()
    while manager.fits(manager.demand_for(0, 4)):
        step(manager, manager.create(), 4)
    manager.check()


def test_truncate_without_room_changes_nothing() -> None:
    manager = CacheManager([GroupSpec("p", 256, 256)], 256 * 9, 4, prefix_caching=False)
    seq = manager.create()
    while manager.fits(manager.demand(seq, 4)):
        step(manager, seq, 4)
    before = manager.table(seq, 0)
    with pytest.raises(CacheFullError):
        manager.truncate(seq, manager.length(seq) - 1)  # cuts the last block, and frees nothing
    assert manager.table(seq, 0) is before
    manager.check()


def test_a_block_that_the_step_releases_is_not_copied() -> None:
    manager = CacheManager([GroupSpec("w", 128, kind="sliding", window=5)], 2**12, 4)
    seq = manager.create()
    step(manager, seq, 6)
    manager.fork(seq)
    assert dict(manager.demand(seq, 1)) == {(0, "raw"): 1}
    assert dict(manager.demand(seq, 12)) == {(0, "raw"): 2}
    assert step(manager, seq, 12).copies == ()


def test_all_or_nothing() -> None:
    manager = CacheManager([PACKED, RAW], 256 * 12, 4)
    first, second = manager.create(), manager.create()
    step(manager, first, 9)
    with pytest.raises(CacheFullError, match="the KV cache is full") as error:
        manager.reserve(second, 200)
    assert "tokens of one sequence" in error.value.why
    assert error.value.hint
    manager.check()
    with pytest.raises(CacheFullError):
        manager.reserve_many([(first, 1), (second, 200)])
    manager.check()
    assert manager.table(second, 0).raw_ids.size == 0
    step(manager, first, 1)


def test_wrong_use_is_refused() -> None:
    manager = CacheManager([RAW], 2**13, 4)
    seq = manager.create()
    for count in (0, -1):
        with pytest.raises(RequestError, match="at least one token"):
            manager.reserve(seq, count)
    with pytest.raises(RequestError, match="twice"):
        manager.reserve_many([(seq, 1), (seq, 2)])
    reservation = manager.reserve(seq, 5)
    with pytest.raises(RequestError, match="open reservation"):
        manager.fork(seq)
    with pytest.raises(RequestError, match="2 token ids for a step of 5"):
        manager.commit(reservation, [1, 2])
    manager.check()
    manager.commit(reservation, [1, 2, 3, 4, 5])
    for done in (manager.rollback, manager.commit):
        with pytest.raises(RequestError, match="not open"):
            done(reservation)
    manager.reserve(seq, 30)
    manager.free(seq)  # takes its reservation along
    manager.check()
    assert manager.bytes_in_use() == 0
    for call in (manager.length, manager.fork, manager.free, lambda s: manager.table(s, 0)):
        with pytest.raises(RequestError, match="no sequence 0"):
            call(seq)
    with pytest.raises(BudgetError):
        CacheManager([RAW], 100, 4)
    with pytest.raises(ValueError, match="multiples of 64"):
        CacheManager([GroupSpec("odd", 100)], 2**13, 4)
    with pytest.raises(ValueError, match="block_size"):
        CacheManager([], 2**13, 4)


def test_tokens_that_are_no_numbers_change_nothing() -> None:
    manager = CacheManager([RAW], 2**13, 4)
    seq = manager.create()
    reservation = manager.reserve(seq, 2)
    with pytest.raises(TypeError):
        manager.commit(reservation, [1, "x"])  # type: ignore[list-item]
    manager.rollback(reservation)
    manager.check()
    step(manager, seq, 5)
    assert manager.match(list(range(5))) == 4


def test_numpy_tokens() -> None:
    manager = CacheManager([RAW], 2**13, 4)
    seq = manager.create()
    manager.commit(manager.reserve(seq, 9), np.arange(9))
    assert manager.match(np.arange(9)) == manager.match(range(9)) == 8


def test_versions_change_with_the_lists_only() -> None:
    manager = CacheManager([PACKED], 2**14, 4)
    seq = manager.create()
    other = manager.create()
    assert manager.table_version(seq) != manager.table_version(other)
    step(manager, seq, 9)
    changes = 0
    for _ in range(64):
        before, view = manager.table_version(seq), manager.table(seq, 0)
        step(manager, seq, 1)
        if manager.table_version(seq) == before:
            assert manager.table(seq, 0) is view
        else:
            changes += 1
    assert changes == 32  # one new block and one seal for every four tokens


def test_growable() -> None:
    manager = CacheManager([PACKED, RAW], 100, 4, growable=True)
    first, offsets = manager.arena.total_bytes, []
    seqs = [manager.create() for _ in range(5)]
    for _ in range(40):
        for seq in seqs:
            step(manager, seq, 3)
        offsets.append(manager.pool(0, "raw").offset(manager.table(seqs[0], 0).raw_ids[:1]).tolist())
    assert manager.arena.generation > 3
    assert manager.arena.total_bytes >= 8 * first
    assert manager.arena.total_bytes < 4 * manager.bytes_in_use()
    assert len({tuple(offset) for offset in offsets}) == 1
    assert manager.can_ever_fit(10**9, 512)


def test_tables_are_within_the_budget() -> None:
    """Sharing needs entries but no blocks: in the end a fork is refused, and the budget holds."""
    manager = CacheManager([GroupSpec("tiny", 64)], 64 * 40, 1, prefix_caching=True)
    seq = manager.create()
    step(manager, seq, 30)
    while manager._books.entries_fit(30):
        manager.fork(seq)
    with pytest.raises(CacheFullError, match="the KV cache is full"):
        manager.fork(seq)
    manager.check()
    assert manager.bytes_in_use() <= 64 * 40
    other = manager.create()
    with pytest.raises(CacheFullError, match="the KV cache is full"):
        manager.adopt(other, list(range(30)), 29)
    manager.check()
    with pytest.raises(CacheFullError):
        step(manager, other, 20)


def test_usage() -> None:
    manager = CacheManager([PACKED, RAW], 2**16, 4)
    seq = manager.create()
    step(manager, seq, 40)
    usage = manager.usage()
    assert usage.in_use == manager.bytes_in_use()
    assert usage.in_use <= usage.lent <= usage.arena <= usage.budget == 2**16
    assert usage.extents_lent * manager.arena.extent_bytes == usage.lent
    assert manager.groups == (PACKED, RAW)
    assert manager.block_size == 4


@pytest.mark.parametrize("seed", range(6))
def test_steps_that_change_nothing_are_recognised(seed: int) -> None:
    """The short cut of `reserve` gives what the long way gives."""
    draw = random.Random(seed)
    specs = [
        GroupSpec("f", 256, 64, sinks=draw.randint(0, 9), recent=draw.randint(0, 20)),
        GroupSpec("s", 256, 64, recent=draw.randint(0, 9), kind="sliding", window=draw.randint(1, 20), margin=seed),
        GroupSpec("c", 256, kind="chunked", window=draw.randint(1, 20), margin=seed // 2 * 5),
    ]
    quick, slow = (CacheManager(specs, 2**18, 8) for _ in range(2))
    one, two = quick.create(), slow.create()
    shortcuts = 0
    for _ in range(150):
        count = draw.choice([1, 1, 1, 2, 3, 30])
        slow._books.state(two).quiet_until = 0
        shortcuts += quick._books.state(one).quiet_until >= quick.length(one) + count
        assert dict(quick.demand(one, count)) == dict(slow.demand(two, count))
        a, b = quick.reserve(one, count), slow.reserve(two, count)
        assert a == b
        done, also = quick.commit(a, None), slow.commit(b, None)
        assert done == also
        quick.finish_seals(done)
        slow.finish_seals(also)
        for group in range(3):
            pairs = zip(quick.table(one, group), slow.table(two, group), strict=True)
            assert all(np.array_equal(x, y) for x, y in pairs)
    assert shortcuts > 20
