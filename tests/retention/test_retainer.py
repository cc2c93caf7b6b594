"""Retention on the paged cache: what each head keeps is there bit for bit, all else is free, attention is that of the
rest.
"""

from __future__ import annotations

import sys

import pytest
import torch

from kvfold.cache import PagedCache, SequenceWork
from kvfold.errors import CacheFullError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.kernels.cpu import rows
from kvfold.recipe import Recipe
from kvfold.retention.method import RetentionMethod
from tests.retention.retained_world import RetainedWorld
from tests.test_cache import GEMMA, LLAMA

EXACT = 2e-5
"""Float32 sums in another order."""


class Ragged(RetentionMethod):
    """Random tokens, and pages dealt out as unevenly as can be."""

    def score(self, view, notes):
        generator = torch.Generator().manual_seed(view.layer + view.columns)
        return torch.rand(view.kv_heads, view.candidates.stop - view.candidates.start, generator=generator)

    def deal(self, scores, pages, size, layers):
        have = torch.stack([(x > -torch.inf).sum(1) // size for x in scores])
        dealt, left = torch.zeros_like(have), pages
        for place in [(0, 1), (1, 0), (1, 1), (0, 0)]:
            if place[0] < have.shape[0]:
                dealt[place] = min(int(have[place]), left)
                left -= int(dealt[place])
        return dealt


def check(world: RetainedWorld) -> None:
    world.cache.manager.check()


@pytest.mark.parametrize("method", [None, Ragged()])
@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("size", [4, 16, 32])
def test_attention_is_that_of_what_is_kept(config, method, size):
    world = RetainedWorld(config, f"raw,block={size},recent=17+random(keep=0.4)", method=method)
    one, two = world.create(), world.create()
    assert world.step([(one, 150), (two, 77)]) < EXACT
    assert world.retain(one)
    check(world)
    assert world.step([(one, 1), (two, 1)]) < EXACT
    assert world.step([(one, 5), (two, 40)]) < EXACT  # a chunk of few tokens, and a prefill
    assert world.retain(two)
    assert world.step([(two, 33), (one, 1)]) < EXACT
    for _ in range(40):
        assert world.step([(one, 1), (two, 1)]) < EXACT
    check(world)
    # A second time, over what was kept and what has come since.
    assert world.retain(one)
    assert world.retain(two)
    assert world.step([(one, 40), (two, 1)]) < EXACT
    assert world.step([(one, 1), (two, 1)]) < EXACT
    for seq in (one, two):
        world.cache.free(seq)
    check(world)
    assert world.cache.bytes_in_use() == 0


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("recipe", ["int8", "int4", "int2", "k8v4", "int4,rotation=none", "k16v4"])
def test_codes_are_moved_not_encoded_again(recipe, native, monkeypatch):
    if not native:
        monkeypatch.setattr("kvfold.codecs.pages.NativePages.refuses", lambda *_: "not wanted here")
        monkeypatch.setattr(rows, "refuses", lambda *_: "not wanted here")
    world = RetainedWorld(LLAMA, f"{recipe},block=8,recent=16+random(keep=0.5)", method=Ragged())
    seq = world.create()
    world.step([(seq, 150)])
    store = world.cache._pages[0].kept_store
    before = world.cache._sequence_pages(0, seq).packed
    held = {}
    for layer in range(2):
        addr = world.cache._pages[0].addresses(store, before.offset) + layer * world.cache._pages[0].layer_bytes(store)
        held[layer] = store.read_k(addr).clone(), store.read_v(addr).clone()
    assert world.retain(seq)
    kept = world.cache.retainer.kept(0, seq)
    for layer in range(2):
        for head in range(2):
            lists = kept.lists()[layer, head]
            lists = lists[lists >= 0]
            if lists.numel():
                where = world.kept_positions(0, layer, head, seq) - int(before.start[0])
                for found, old in zip((store.read_k(lists), store.read_v(lists)), held[layer], strict=True):
                    assert torch.equal(found, old[head][where])
    check(world)


def test_freed_is_freed():
    """Uniform and uneven budgets take equally few blocks: what a head does not need, another uses."""
    for method in (None, Ragged()):
        world = RetainedWorld(LLAMA, "int4,block=16,recent=32+random(keep=0.25)", method=method)
        seq = world.create()
        world.step([(seq, 1024)])
        blocks, size = world.cache.manager.pool(0, "packed").used_blocks, world.cache.bytes_in_use()
        world.retain(seq)
        stats = world.cache.retainer.stats
        assert stats.blocks_after <= 0.30 * stats.blocks_before
        assert world.cache.manager.pool(0, "packed").used_blocks < 0.25 * blocks
        assert world.cache.bytes_in_use() < 0.40 * size  # sinks and recent tokens are raw
        check(world)


def test_keeping_all_changes_nothing():
    world = RetainedWorld(LLAMA, "int4,block=8+random(keep=1)")
    seq = world.create()
    world.step([(seq, 200)])
    before = world.cache._arena.clone(), world.cache.manager.table_version(seq)
    assert not world.retain(seq)
    assert torch.equal(before[0], world.cache._arena)
    assert before[1] == world.cache.manager.table_version(seq)


def test_forks_share_what_was_kept_and_part_ways():
    world = RetainedWorld(LLAMA, "raw,block=8,recent=16+random(keep=0.5)")
    one = world.create()
    world.step([(one, 120)])
    world.retain(one)
    used = world.cache.manager.pool(0, "raw").used_blocks
    two = world.fork(one)
    assert world.cache.manager.pool(0, "raw").used_blocks == used
    assert world.step([(one, 1), (two, 30)]) < EXACT
    assert world.retain(two)
    assert world.step([(one, 3), (two, 1)]) < EXACT
    world.cache.free(one)
    assert world.step([(two, 9)]) < EXACT
    world.cache.free(two)
    check(world)
    assert world.cache.bytes_in_use() == 0


def test_rollback_goes_back_to_what_was_kept_and_no_further():
    world = RetainedWorld(LLAMA, "raw,block=8,recent=16+random(keep=0.5)")
    seq = world.create()
    world.step([(seq, 120)])
    world.retain(seq)
    end = world.cache.manager.kept_end(seq, 0) * 8
    world.step([(seq, 20)])
    world.cache.truncate(seq, 125)
    for layer in range(2):
        world.history[seq][layer] = tuple(x[:125] for x in world.history[seq][layer])
        world.shown[seq][layer] = world.shown[seq][layer][:, :125]
    assert world.step([(seq, 1)]) < EXACT
    with pytest.raises(UnsupportedError, match="retention has dropped"):
        world.cache.truncate(seq, end - 1)
    world.cache.truncate(seq, 3)
    world.history[seq] = [tuple(x[:3] for x in pair) for pair in world.history[seq]]
    world.shown[seq] = [x[:, :3] for x in world.shown[seq]]
    assert world.step([(seq, 50)]) < EXACT
    check(world)


def test_without_room_nothing_changes():
    world = RetainedWorld(LLAMA, "raw,block=8,recent=16+random(keep=0.9)", budget=130_000)
    seq = world.create()
    length = 0
    while True:
        try:
            world.step([(seq, 8)])
        except CacheFullError:
            break
        length += 8
    before = world.cache.manager.usage()
    with pytest.raises(CacheFullError):
        world.cache.retain(seq)
    assert world.cache.manager.usage() == before
    assert world.cache.length(seq) == length
    check(world)


def test_where_the_prompt_was_cut_does_not_matter():
    kept = []
    for pieces in ([160], [64, 64, 32], [7, 100, 53]):
        world = RetainedWorld(LLAMA, "raw,block=8,recent=16+keydiff(keep=0.5)")
        seq = world.create()
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randn(160, 2, 2, 2, 16, generator=generator)
        start = 0
        for count in pieces:
            step = world.cache.begin([SequenceWork(seq, count)])
            for layer in range(2):
                step.write(layer, *tokens[start : start + count, layer].unbind(1))
            world.cache.commit(step)
            start += count
        world.history[seq] = [tuple(tokens[:, layer].unbind(1)) for layer in range(2)]
        world.cache.retain(seq)
        kept.append([world.kept_positions(0, layer, head, seq).tolist() for layer in range(2) for head in range(2)])
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize(
    ("recipe", "config", "reason"),
    [
        ("int4,scales=channel+random(keep=0.5)", LLAMA, "scales of channels"),
        ("int4+random(keep=0.5)", None, "window"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(recipe, config, reason):
    if config is None:
        config = type(GEMMA)(**(GEMMA.to_dict() | {"layer_types": ["sliding_attention"] * 2}))
    with pytest.raises(UnsupportedError, match=reason):
        PagedCache(Geometry.from_config(config), Recipe.parse(recipe), dtype=torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages of memory are real")
def test_the_process_gives_the_memory_back():
    """What is freed is not the process's any more: the arena's real memory falls with the blocks in use. Asked of the
    arena itself: what the process holds in all is the allocator's affair.
    """
    world = RetainedWorld(LLAMA, "raw,block=32,recent=32+streaming(keep=0.125)", budget=64 << 20)
    world.cache._memory.give_back([(0, world.cache.bytes_allocated())])  # the poison made it all real
    assert world.cache.bytes_resident() == 0
    seq = world.cache.create()
    step = world.cache.begin([SequenceWork(seq, 100_000)])
    for layer in range(2):
        step.write(layer, torch.zeros(100_000, 2, 16), torch.zeros(100_000, 2, 16))
    world.cache.commit(step)
    before, held = world.cache.bytes_resident(), world.cache.bytes_in_use()
    world.cache.retain(seq)
    freed = held - world.cache.bytes_in_use()
    assert freed > 0.85 * held
    assert before - world.cache.bytes_resident() > 0.8 * freed
