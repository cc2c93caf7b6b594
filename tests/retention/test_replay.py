"""Repeating a context: nothing but notes is left of it, whatever the recipe, and whatever goes wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvfold.cache import PagedCache
from kvfold.engine.runner import ModelRunner
from kvfold.errors import CacheFullError, RequestError
from kvfold.packed import PackedModel
from kvfold.recipe import Recipe
from tests.calibrations import tiny, tokens
from tests.retention.replaying import INSTRUCTION, next_logits, read, repeat, runner_of, scores

TEXT = tokens(150, seed=1)
RECIPES = (
    "raw,block=16,recent=16",
    "int4,block=16,recent=16",
    "int8,block=16,recent=16,scales=token",
)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


def state(runner: ModelRunner, *sequences: int) -> list[Any]:
    """All that a sequence is in the books and in memory."""
    manager, cache = runner.manager, runner.cache
    found: list[Any] = [manager.sequences(), manager.bytes_in_use(), manager.bytes_cached()]
    for seq in sequences:
        found.append(manager.length(seq))
        for g in range(len(manager.groups)):
            table = manager.table(seq, g)
            for name, ids in (("raw", table.raw_ids), ("packed", table.packed_ids)):
                for block in ids.tolist():
                    pool = manager.pool(g, name)
                    at = int(pool.offset(block))
                    found += [name, block, pool.refcount(block), cache._arena[at : at + pool.block_bytes].clone()]
    return found


def assert_same(before: list[Any], after: list[Any]) -> None:
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("prefixes", [False, True])
def test_blocks_books_and_the_notes_of_others_are_as_before(
    model: PreTrainedModel, recipe: str, prefixes: bool
) -> None:
    runner = runner_of(model, f"{recipe}+kvzip(keep=0.5)", prefixes=prefixes)
    other = read(runner, tokens(100, seed=9))
    repeat(runner, other, tokens(100, seed=9))
    seq = read(runner, TEXT)
    child = runner.fork(seq)
    before, notes = state(runner, other, seq, child), {s: scores(runner, s) for s in (other, child)}
    repeat(runner, seq, TEXT, chunk=70)
    runner.manager.check()
    assert_same(before, state(runner, other, seq, child))
    for s, of_sequence in notes.items():
        for layer, wanted in of_sequence.items():
            torch.testing.assert_close(scores(runner, s)[layer], wanted, rtol=0, atol=0, equal_nan=True)
    assert all(bool(found.isfinite().all()) for found in scores(runner, seq).values())
    for s in (other, seq, child):
        runner.free(s)
    assert runner.cache.bytes_in_use() == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_follows_is_bit_for_bit_what_it_was(model: PreTrainedModel, recipe: str) -> None:
    found = []
    for repeated in (False, True):
        runner = runner_of(model, f"{recipe}+kvzip(keep=0.5)")
        seq = read(runner, TEXT)
        if repeated:
            repeat(runner, seq, TEXT)
        found.append(next_logits(runner, seq, tokens(20, seed=3), len(TEXT)))
    assert torch.equal(*found)


def test_a_sequence_that_took_a_prefix_from_another_is_scored_like_one_that_did_not() -> None:
    model, found = tiny("llama"), []
    for prefixes in (False, True):
        runner = runner_of(model, "raw,block=16,recent=16+kvzip(keep=0.5)", prefixes=prefixes)
        read(runner, TEXT)
        seq = runner.create()
        hit = runner.adopt(seq, TEXT, b"")
        assert (hit > 0) == prefixes
        read(runner, TEXT, seq=seq, start=hit)
        repeat(runner, seq, TEXT)
        found.append(scores(runner, seq))
    for layer, wanted in found[0].items():
        torch.testing.assert_close(found[1][layer], wanted, atol=1e-5, rtol=1e-4)


class _Watched(PackedModel):
    """Counts the tokens of forwards, and may fail at one of them."""

    def __init__(self, model: PreTrainedModel, fail_at: int | None = None) -> None:
        super().__init__(model)
        self.sizes: list[int] = []
        self.positions: list[int] = []
        self.fail_at = fail_at

    def forward(self, step: Any, tokens: Any, positions: Any, keep: Any, segments: Any, *more: Any) -> Any:
        self.sizes.append(tokens.numel())
        self.positions.append(int(positions[0]))
        logits = super().forward(step, tokens, positions, keep, segments, *more)
        if self.fail_at == len(self.sizes):
            raise RuntimeError("a failing forward")
        return logits


def watched(runner: ModelRunner, model: PreTrainedModel, fail_at: int | None = None) -> _Watched:
    runner.release()
    runner._packed = _Watched(model, fail_at)
    return runner._packed


def test_chunks_are_of_one_size_and_follow_the_context() -> None:
    model = tiny("llama")
    runner = runner_of(model, "raw,block=16,recent=16+kvzip(keep=0.5)")
    seq = read(runner, TEXT)
    packed = watched(runner, model)
    repeat(runner, seq, TEXT, chunk=140)
    lead, said = 8, len(INSTRUCTION)
    assert packed.sizes == [said + 75, said + lead + 75]
    assert packed.positions == [len(TEXT)] * 2
    packed.sizes.clear()
    repeat(runner, seq, TEXT, first=60, chunk=50)
    assert packed.sizes == [said + lead + 45] * 2


@pytest.mark.parametrize("fail_at", [1, 2])
def test_an_error_leaves_nothing_behind(model: PreTrainedModel, fail_at: int) -> None:
    runner = runner_of(model, "int4,block=16,recent=16+kvzip(keep=0.5)")
    seq = read(runner, TEXT)
    before = state(runner, seq)
    watched(runner, model, fail_at)
    with pytest.raises(RuntimeError, match="a failing forward"):
        repeat(runner, seq, TEXT, chunk=75)
    runner.manager.check()
    assert_same(before, state(runner, seq))


def test_chunks_shrink_where_there_is_no_room() -> None:
    model = tiny("llama")
    geometry_bytes = 2 * 2 * 16 * 4 * 3  # of a token: keys and values, two heads, three layers, float32
    sizes = []
    for spare in (700, 110):
        runner = runner_of(model, "raw,block=16,recent=16+kvzip(keep=0.5)", kv_memory=(160 + spare) * geometry_bytes)
        seq = read(runner, TEXT)
        packed = watched(runner, model)
        before = state(runner, seq)
        repeat(runner, seq, TEXT)
        assert_same(before, state(runner, seq))
        assert all(bool(found.isfinite().all()) for found in scores(runner, seq).values())
        sizes.append(packed.sizes)
    assert len(sizes[0]) == 1
    assert len(sizes[1]) > 1


def test_no_room_at_all_is_an_error() -> None:
    model = tiny("llama")
    runner = runner_of(model, "raw,block=16,recent=16+kvzip(keep=0.5)", kv_memory=190 * 768)
    seq = read(runner, TEXT)
    before = state(runner, seq)
    with pytest.raises(CacheFullError):
        repeat(runner, seq, TEXT)
    assert_same(before, state(runner, seq))


def test_chunks_keep_to_the_models_positions() -> None:
    model = tiny("llama")
    model.config.max_position_embeddings = 150 + 5 + 8 + 60
    runner = runner_of(model, "raw,block=16,recent=16+kvzip(keep=0.5)")
    seq = read(runner, TEXT)
    packed = watched(runner, model)
    repeat(runner, seq, TEXT)
    assert packed.sizes == [55, 63, 63]
    model.config.max_position_embeddings = 150 + 5 + 8 + 20
    runner = runner_of(model, "raw,block=16,recent=16+kvzip(keep=0.5)")
    with pytest.raises(RequestError, match="183 positions"):
        repeat(runner, read(runner, TEXT), TEXT)


def test_other_tokens_than_those_held_are_refused() -> None:
    runner = runner_of(tiny("llama"), "raw,block=16,recent=16+kvzip(keep=0.5)")
    with pytest.raises(RequestError, match="holds 150"):
        repeat(runner, read(runner, TEXT), TEXT[:-1])
    with pytest.raises(RequestError, match="holds 0"):
        repeat(runner, runner.create(), [])
    with pytest.raises(RequestError, match="from 150 on"):
        repeat(runner, read(runner, TEXT), TEXT, first=150)


def test_a_growing_cache_gives_the_room_back() -> None:
    """The drop-in cache grows for a repetition: what it grew by is free again afterwards."""
    model = tiny("llama")
    runner = runner_of(model, "raw,block=16,recent=16+kvzip(keep=0.5)")
    recipe = Recipe.parse("raw,block=16,recent=16+kvzip(keep=0.5)")
    runner.cache = PagedCache(runner.geometry, recipe, dtype=torch.float32, prefix_caching=False)
    seq = read(runner, TEXT)
    held = runner.manager.bytes_in_use()
    repeat(runner, seq, TEXT)
    assert runner.manager.bytes_in_use() == held
