"""What is said to fit does fit, and what is said not to fit does not."""

from __future__ import annotations

import random

import pytest

from kvfold.errors import CacheFullError, RequestError
from kvfold.memory.capacity import UNBOUNDED, Capacity, Counts
from kvfold.memory.manager import CacheManager, GroupSpec


def random_specs(draw: random.Random) -> list[GroupSpec]:
    specs = []
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice(["full", "full", "sliding", "chunked"])
        specs.append(
            GroupSpec(
                kind,
                64 * draw.randint(2, 8),
                64 * draw.randint(0, 3),
                sinks=draw.randint(0, 9),
                recent=draw.randint(0, 20),
                kind=kind,
                window=None if kind == "full" else draw.randint(1, 40),
            )
        )
    return specs


def fill(manager: CacheManager, length: int, chunks: list[int], expected: int = 0) -> int | None:
    """A new sequence of ``length`` tokens; None, and nothing, if there is no room."""
    seq = manager.create()
    manager.expect(seq, expected)
    for chunk in chunks:
        try:
            reservation = manager.reserve(seq, min(chunk, length - manager.length(seq)))
        except CacheFullError:
            manager.free(seq)
            return None
        manager.finish_seals(manager.commit(reservation, None))
        if manager.length(seq) == length:
            return seq
    raise AssertionError("not enough chunks")


def steps_of(draw: random.Random, length: int, most: int) -> list[int]:
    chunks = []
    while sum(chunks) < length:
        chunks.append(draw.choice([1, draw.randint(1, most), most]))
    return chunks


@pytest.mark.parametrize("seed", range(25))
def test_peaks_are_bounds(seed: int) -> None:
    draw = random.Random(seed)
    specs, size = random_specs(draw), draw.randint(1, 6)
    manager = CacheManager(specs, 2**20, size)
    pools = manager._books.pools
    capacity = Capacity(specs, size, 1000, dict.fromkeys(pools, 10))
    for most in (1, 3, 17, 90):
        length = draw.randint(1, 150)
        seq, peak = manager.create(), dict.fromkeys(pools, 0)
        manager.expect(seq, draw.choice([0, length // 2, length]))
        for chunk in steps_of(draw, length, most):
            reservation = manager.reserve(seq, min(chunk, length - manager.length(seq)))
            peak = {key: max(peak[key], pool.used_blocks) for key, pool in pools.items()}
            manager.finish_seals(manager.commit(reservation, None))
            if manager.length(seq) == length:
                break
        for group in range(len(specs)):
            bound, rest = capacity.peak(group, length, most), capacity.resting(group, length)
            assert peak[group, "raw"] <= bound.raw
            assert pools[group, "raw"].used_blocks == rest.raw <= bound.raw
            if specs[group].seals:
                assert peak[group, "packed"] <= bound.packed
                assert pools[group, "packed"].used_blocks == rest.packed <= bound.packed
        manager.free(seq)


@pytest.mark.parametrize("recent", [0, 3, 4, 16, 17])
def test_the_bound_is_tight_for_full_layers(recent: int) -> None:
    spec, size = GroupSpec("f", 256, 64, sinks=4, recent=recent), 4
    manager = CacheManager([spec], 2**20, size)
    pool = manager.pool(0, "raw")
    for chunk in (1, 5, 64):
        seq, peak = manager.create(), 0
        for _ in range(64):
            for count in (chunk, 1):
                reservation = manager.reserve(seq, count)
                peak = max(peak, pool.used_blocks)
                manager.finish_seals(manager.commit(reservation, None))
        capacity = Capacity([spec], size, 1, {(0, "raw"): 1, (0, "packed"): 1})
        assert peak == capacity.peak(0, 10**4, chunk).raw
        manager.free(seq)


@pytest.mark.parametrize("seed", range(12))
def test_can_ever_fit_is_exact(seed: int) -> None:
    draw = random.Random(seed)
    specs, size = random_specs(draw), draw.randint(1, 6)
    largest = max(max(s.raw_block_bytes, s.packed_block_bytes) for s in specs)
    manager = CacheManager(specs, largest * draw.randint(12, 60), size)
    for _ in range(25):
        total, chunk = draw.randint(1, 300), draw.choice([1, 2, 7, 32, 300])
        said = manager.can_ever_fit(total, chunk)
        seq = fill(manager, total, [chunk] * total, total)
        assert said == (seq is not None), (total, chunk)
        if seq is not None:
            manager.free(seq)
    assert manager.bytes_lent() == 0
    with pytest.raises(RequestError, match="positive"):
        manager.can_ever_fit(0, 1)


@pytest.mark.parametrize("seed", range(12))
def test_tokens_capacity_can_be_reached(seed: int) -> None:
    draw = random.Random(seed)
    specs, size = random_specs(draw), draw.randint(2, 6)
    largest = max(max(s.raw_block_bytes, s.packed_block_bytes) for s in specs)
    manager = CacheManager(specs, largest * draw.randint(20, 60), size)
    tokens = manager.tokens_capacity()
    if tokens == UNBOUNDED:
        assert all(spec.kind != "full" for spec in specs)
        tokens = 500
    elif tokens:
        pools = manager._books.pools
        # no more than an extent of each pool is missing: that much more surely does not fit at rest
        more = (
            sum(manager.arena.extent_bytes for _ in pools)
            * 4
            // min((s.packed_block_bytes if s.seals else s.raw_block_bytes) for s in specs if s.kind == "full")
        )
        assert manager._room().cannot_fit(tokens + (more + 10) * size)
    if tokens:
        assert fill(manager, tokens, [1] * tokens) is not None


@pytest.mark.parametrize("seed", range(20))
def test_concurrency_can_be_reached(seed: int) -> None:
    draw = random.Random(seed)
    specs, size = random_specs(draw), draw.randint(1, 6)
    largest = max(max(s.raw_block_bytes, s.packed_block_bytes) for s in specs)
    manager = CacheManager(specs, largest * draw.randint(20, 150), size)
    for length in (draw.randint(1, 20), draw.randint(20, 150)):
        said = manager.concurrency(length)
        assert said >= 0
        seqs = [fill(manager, length, steps_of(draw, length, length)) for _ in range(int(said))]
        assert None not in seqs
        manager.check()
        more = 0
        while (seq := fill(manager, length, [length])) is not None:
            seqs.append(seq)
            more += 1
        resting = manager._room().extents([manager._room().resting(g, length) for g in range(len(specs))])
        assert (more - 1) * max(1, resting // 4) <= manager.arena.n_extents
        for seq in seqs:
            manager.free(seq)
        assert manager.bytes_lent() == 0


def test_concurrency_of_a_plain_cache() -> None:
    manager = CacheManager([GroupSpec("f", 1024)], 2**20, 4)
    tokens = manager.tokens_capacity()
    assert tokens == 4 * manager.arena.n_extents * manager.pool(0, "raw").blocks_per_extent
    assert tokens * 256 > 0.95 * 2**20
    assert manager.concurrency(tokens) == pytest.approx(1, abs=1e-3)
    assert 9.5 < manager.concurrency(tokens // 10) <= 10
    assert manager.concurrency(2 * tokens) == pytest.approx(0.5, abs=1e-3)
    assert manager.concurrency(100 * tokens) == pytest.approx(0.01, abs=1e-3)


def test_only_windows_never_fill_up() -> None:
    manager = CacheManager([GroupSpec("w", 1024, kind="sliding", window=64)], 2**20, 16)
    assert manager.tokens_capacity() == UNBOUNDED
    assert manager.can_ever_fit(10**9, 8192)
    assert manager.concurrency(10**6) > 100
    grows = CacheManager([GroupSpec("w", 1024)], 2**20, 16, growable=True)
    assert grows.concurrency(100) == float(UNBOUNDED)


def test_large_budgets_take_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in looks, not in seconds: a search that walked the tokens would take millions."""
    extents, looks = Capacity.extents, 0

    def counted(self: Capacity, counts: list[Counts]) -> int:
        nonlocal looks
        looks += 1
        return extents(self, counts)

    monkeypatch.setattr(Capacity, "extents", counted)
    specs = [
        GroupSpec("full", 2**20, 300 * 1024, sinks=4, recent=64),
        GroupSpec("window", 2**20, 300 * 1024, sinks=4, recent=64, kind="sliding", window=4096),
    ]
    manager = CacheManager(specs, 80 * 2**30, 32)
    tokens = manager.tokens_capacity()
    assert 8_000_000 < tokens < 9_000_000
    assert manager.concurrency(32768) > 100
    assert manager.can_ever_fit(131072, 8192)
    assert not manager.can_ever_fit(10**8, 8192)
    assert looks < 500
