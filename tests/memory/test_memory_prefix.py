"""The prefix index: hashes, hits over several groups, what is found after which end, and the order of eviction."""

from __future__ import annotations

import hashlib
from array import array
from itertools import pairwise

import pytest

from kvfold.errors import CacheFullError, RequestError
from kvfold.memory.manager import CacheManager, GroupSpec
from kvfold.memory.prefix import PrefixEntry, PrefixIndex, block_hash, chain, root_hash, token_bytes

FULL = GroupSpec("full", 128)
PACKED = GroupSpec("packed", 256, 64, sinks=2, recent=4)
SLIDING = GroupSpec("sliding", 128, kind="sliding", window=6)


def test_hashes_chain() -> None:
    data = token_bytes([1, 2**40])
    assert data == (1).to_bytes(8, "little") + (2**40).to_bytes(8, "little")
    assert token_bytes(array("q", [1, 2**40])) == data
    root = root_hash(b"model", b"salt")
    assert block_hash(root, data) == hashlib.sha256(root + data).digest()
    assert len({root, root_hash(b"model", b""), root_hash(b"models", b"alt"), root_hash(b"", b"salt")}) == 4
    keys = [key for key, _ in chain(root, [1, 2, 3, 4, 5], 2)]
    assert keys == [block_hash(root, token_bytes([1, 2])), block_hash(keys[0], token_bytes([3, 4]))]


def test_a_hit_is_confirmed_on_the_tokens() -> None:
    index = PrefixIndex()
    index.put(0, b"key", PrefixEntry("raw", 7, token_bytes([1, 2])))
    assert index.find(0, b"key", token_bytes([1, 2])) is not None
    assert index.find(0, b"key", token_bytes([1, 3])) is None
    assert index.find(1, b"key", token_bytes([1, 2])) is None
    with pytest.raises(ValueError, match="in the prefix index"):
        index.put(0, b"other", PrefixEntry("raw", 7, b""))
    index.forget(0, "raw", 7)
    assert len(index) == 0


def run(manager: CacheManager, seq: int, tokens: list[int], chunk: int = 5, salt: bytes | None = None) -> None:
    for begin in range(0, len(tokens), chunk):
        new = tokens[begin : begin + chunk]
        manager.finish_seals(manager.commit(manager.reserve(seq, len(new)), new, salt))
    manager.check()


def test_whole_blocks_and_never_all_tokens() -> None:
    manager = CacheManager([FULL], 8192, 4)
    seq = manager.create()
    tokens = list(range(18))
    run(manager, seq, tokens)
    assert manager.match(tokens) == 16
    assert manager.match(tokens[:16]) == 12
    assert manager.match(tokens[:17]) == 16
    assert manager.match(tokens[:4]) == manager.match([]) == 0
    assert manager.match([99, *tokens]) == 0
    assert manager.match([*tokens[:9], 99, *tokens[10:]]) == 8
    assert manager.match(tokens, b"salt") == 0


def test_found_after_the_sequence_has_ended() -> None:
    manager = CacheManager([FULL, PACKED, SLIDING], 2**16, 4, fingerprint=b"m")
    seq = manager.create()
    tokens = list(range(40))
    run(manager, seq, tokens)
    manager.free(seq)
    manager.check()
    assert manager.bytes_in_use() == 0
    # `packed`: blocks up to 36 have sealed, the recent ones are not final; `sliding`: the window at 36 is there
    assert manager.match(tokens) == 36
    # a shorter prefix needs window blocks that were let go earlier, and are cached still
    assert manager.match([*tokens[:22], 99]) == 20
    other = manager.create()
    manager.adopt(other, tokens, 36)
    manager.check()
    view = manager.table(other, 1)
    assert view.raw_block_index.tolist() == [0]
    assert view.packed_block_index.tolist() == list(range(1, 9))
    assert manager.table(other, 2).raw_block_index.tolist() == [7, 8]
    assert manager.length(other) == 36
    stats = manager.stats()
    assert (stats.hit_tokens, stats.query_tokens) == (36, 40)
    run(manager, other, tokens[36:])


def test_sliding_needs_only_its_window() -> None:
    manager = CacheManager([FULL, SLIDING], 2**16, 4)
    seq = manager.create()
    tokens = list(range(32))
    run(manager, seq, tokens, chunk=32)  # in one step: the sliding group never has the first blocks
    assert manager.table(seq, 1).raw_block_index.tolist() == [6, 7]
    assert manager.match([*tokens, 0]) == 32
    assert manager.match(tokens) == 0  # at 28 the window would begin in block 5


def test_short_windows_are_found_although_their_group_could_pack() -> None:
    never = GroupSpec("short", 128, 64, recent=8, kind="sliding", window=8)
    assert not never.seals
    manager = CacheManager([never], 2**14, 4)
    seq = manager.create()
    run(manager, seq, list(range(17)), chunk=1)
    assert manager.match([*range(17), 0]) == 16
    with pytest.raises(RequestError, match="no packed blocks"):
        manager.pool(0, "packed")


def test_unknown_tokens_end_the_chain() -> None:
    manager = CacheManager([FULL], 8192, 4)
    seq = manager.create()
    run(manager, seq, list(range(8)))
    manager.commit(manager.reserve(seq, 1), None)
    run(manager, seq, [9, 10, 11])
    assert manager.match([*range(12), 12]) == 8
    manager.truncate(seq, 8)  # what was unknown is gone
    run(manager, seq, [8, 9, 10, 11])
    assert manager.match([*range(12), 12]) == 12


def test_prefix_caching_off() -> None:
    manager = CacheManager([FULL], 8192, 4, prefix_caching=False)
    seq = manager.create()
    run(manager, seq, list(range(20)))
    assert manager.match([*range(20), 0]) == 0
    manager.free(seq)
    assert manager.bytes_cached() == manager.bytes_lent() == 0


def test_salts_keep_apart() -> None:
    manager = CacheManager([FULL], 8192, 4)
    seq = manager.create()
    run(manager, seq, list(range(9)), salt=b"a")
    assert manager.match(list(range(9)), b"a") == 8
    assert manager.match(list(range(9))) == 0
    step = manager.reserve(seq, 1)
    with pytest.raises(RequestError, match="another salt"):
        manager.commit(step, [9], b"b")
    manager.commit(step, [9], b"a")
    other = manager.create()
    with pytest.raises(RequestError, match="evicted since"):
        manager.adopt(other, list(range(9)), 8, b"b")
    for wrong in (3, 9, 12, -4):
        with pytest.raises(RequestError, match="prefix hit"):
            manager.adopt(other, list(range(9)), wrong, b"a")
    with pytest.raises(RequestError, match="not empty"):
        manager.adopt(seq, list(range(9)), 8, b"a")


def test_the_same_content_is_kept_once() -> None:
    manager = CacheManager([FULL], 8192, 4)
    first, second = manager.create(), manager.create()
    run(manager, first, list(range(8)))
    run(manager, second, list(range(8)))  # did not look, so it has blocks of its own
    manager.free(second)
    assert manager.bytes_cached() == 0
    manager.free(first)
    assert manager.bytes_cached() == 2 * 128
    third = manager.create()
    run(manager, third, list(range(8)))  # takes over from the cached ones, which are freed
    assert manager.bytes_cached() == 0
    assert manager.match(list(range(9))) == 8
    manager.check()


def test_leaves_are_evicted_first_and_the_oldest_sequence_before_others() -> None:
    manager = CacheManager([FULL], 24 * 128 + 300, 4, prefix_caching=True)
    first, second = manager.create(), manager.create()
    run(manager, first, list(range(100, 132)))
    run(manager, second, list(range(200, 232)))
    manager.free(first)
    manager.free(second)
    hits = []
    third = manager.create()
    run(manager, third, list(range(4)))
    while True:
        hits.append((manager.match([*range(100, 132), 0]), manager.match([*range(200, 232), 0])))
        try:
            run(manager, third, [0, 1, 2, 3])
        except CacheFullError:
            break
    assert hits[0] == (32, 32)
    assert hits[-1] == (0, 0)
    assert all(a >= b for a, b in pairwise(hits))
    assert all(b == 32 for a, b in hits if a > 0)
    assert {a for a, _ in hits} == set(range(0, 33, 4))
    assert manager.stats().evictions == 16
    manager.check()


def test_reset() -> None:
    manager = CacheManager([FULL, PACKED], 2**16, 4)
    seq, done = manager.create(), manager.create()
    run(manager, seq, list(range(24)))
    run(manager, done, list(range(50, 74)))
    manager.free(done)
    manager.reset_prefix_cache()
    manager.check()
    assert manager.match([*range(24), 0]) == 0
    assert manager.bytes_cached() == 0
    manager.free(seq)
    assert manager.bytes_lent() == 0


def test_sealed_blocks_are_found_only_once_encoded() -> None:
    manager = CacheManager([GroupSpec("g", 256, 64)], 2**14, 4)
    seq = manager.create()
    for token in range(4):
        seals = manager.commit(manager.reserve(seq, 1), [token])
    assert len(seals) == 1
    assert manager.match(list(range(5))) == 0
    manager.free(seq)  # the block is held until the caller is done with it
    manager.check()
    manager.finish_seals(seals)
    manager.check()
    assert manager.match(list(range(5))) == 4
    with pytest.raises(RequestError, match="not under way"):
        manager.finish_seals(seals)


def test_pinned_blocks_are_not_counted_twice() -> None:
    """A hit takes cached blocks out of what can be evicted, and `demand_for` says so."""
    manager = CacheManager([FULL], 16 * 128 + 200, 4)
    blocks = manager.arena.n_extents * manager.pool(0, "raw").blocks_per_extent
    seq = manager.create()
    tokens = list(range(4 * blocks))
    run(manager, seq, tokens)
    manager.free(seq)
    half = 4 * (blocks // 2)
    more = blocks - blocks // 2
    assert manager.fits(manager.demand_for(half, 4 * more, tokens=tokens))
    assert not manager.fits(manager.demand_for(half, 4 * more + 1, tokens=tokens))
    assert manager.fits(manager.demand_for(half, 4 * blocks))  # without the hit's blocks
    other = manager.create()
    manager.adopt(other, tokens, half)
    manager.commit(manager.reserve(other, 4 * more), tokens[half : half + 4 * more])
    manager.check()
