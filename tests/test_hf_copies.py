"""Copies of a drop-in cache: forks that share blocks until one of them writes, whatever becomes of the others."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from kvfold import KVCache
from kvfold.errors import UnsupportedError
from tests.engine.tiny_engine import VOCAB, tiny_model, windowed_model

LLAMA, GEMMA = tiny_model(seed=2), windowed_model(12)
RECIPES = ["raw,block=4", "int4,block=4,recent=8,sinks=0", "int8,block=8,recent=0", "raw,block=4+keydiff(keep=0.5)"]


def _ids(batch: int, count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    return model(ids, past_key_values=cache).logits


@pytest.mark.parametrize("take", [copy.deepcopy, copy.copy])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_system_prompt_is_read_once(take: Callable[[Any], Any], recipe: str) -> None:
    """transformers' own way: https://huggingface.co/docs/transformers/kv_cache#prefill-a-cache"""
    system = _ids(1, 41, 0)
    kept = KVCache(LLAMA, recipe)
    _logits(LLAMA, system, kept)
    held = kept.kv_bytes
    answers = []
    for turn in range(2):
        for seed in (1, 2, 3):
            question = torch.cat((system, _ids(1, 5, seed)), dim=1)
            cache = take(kept)
            mask = torch.ones_like(question)
            out = LLAMA.generate(
                question, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False
            )
            answers.append(out[0, 46:].tolist())
            assert cache.get_seq_length() == out.shape[1] - 1
            assert kept.get_seq_length() == 41
            del cache
        assert kept.kv_bytes == held, turn
    assert answers[:3] == answers[3:]
    if recipe == "raw,block=4":
        for seed, answer in zip((1, 2, 3), answers, strict=False):
            question = torch.cat((system, _ids(1, 5, seed)), dim=1)
            out = LLAMA.generate(question, attention_mask=torch.ones_like(question), max_new_tokens=12, do_sample=False)
            assert out[0, 46:].tolist() == answer


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_copy_goes_on_as_the_original_would(recipe: str) -> None:
    one = KVCache(LLAMA, recipe)
    _logits(LLAMA, _ids(2, 30, 0), one)
    two = copy.deepcopy(one)
    more = [_ids(2, n, n) for n in (1, 9, 1, 17, 1)]
    first = [_logits(LLAMA, ids, one) for ids in more]
    second = [_logits(LLAMA, ids, two) for ids in more]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert one.kv_bytes == two.kv_bytes  # of the memory that both are in


@pytest.mark.parametrize("budget", [None, "1MiB"])
def test_a_copy_outlives_the_original_and_the_other_way_round(budget: str | None) -> None:
    one = KVCache(LLAMA, "int4,block=4,recent=8", kv_memory=budget)
    _logits(LLAMA, _ids(1, 30, 0), one)
    two, three = copy.deepcopy(one), copy.deepcopy(one)
    wanted = _logits(LLAMA, _ids(1, 3, 1), two)
    del one
    gc.collect()
    assert torch.equal(_logits(LLAMA, _ids(1, 3, 1), three), wanted)
    two.reset()
    four = copy.deepcopy(three)
    assert torch.equal(_logits(LLAMA, _ids(1, 2, 2), three), _logits(LLAMA, _ids(1, 2, 2), four))
    del four
    three.reset()
    assert two.kv_bytes == three.kv_bytes == 0


def test_a_copy_of_an_empty_cache_and_of_copies_in_a_container() -> None:
    empty = copy.deepcopy(KVCache(LLAMA, "raw,block=4"))
    _logits(LLAMA, _ids(1, 9, 0), empty)
    pair = copy.deepcopy({"a": empty, "b": [empty]})
    assert pair["a"] is pair["b"][0] is not empty
    assert pair["a"].get_seq_length() == 9


def test_a_cache_in_a_forward_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(LLAMA, "raw,block=4")
    seen = []

    def look(*_: Any) -> None:
        with pytest.raises(UnsupportedError, match="forward") as error:
            copy.deepcopy(cache)
        seen.append(error.value.hint)

    handle = LLAMA.model.norm.register_forward_hook(look)
    try:
        _logits(LLAMA, _ids(1, 9, 0), cache)
    finally:
        handle.remove()
    assert seen
    assert all(seen)


@pytest.mark.parametrize(
    "ask",
    [
        pickle.dumps,
        lambda cache: cache.layers[0],
        lambda cache: cache.layers[0].keys,
        lambda cache: list(cache.layers),
        list,
        lambda cache: cache[0],
        lambda cache: cache.to_legacy_cache(),
        lambda cache: cache.key_cache,
        lambda cache: cache.value_cache[0],
        lambda cache: DynamicCache(cache),
        lambda cache: cache.offload(0),
        lambda cache: cache.prefetch(0),
    ],
)
def test_what_is_only_in_tensors_is_refused_clearly(ask: Callable[[KVCache], object]) -> None:
    cache = KVCache(LLAMA, "raw,block=4")
    _logits(LLAMA, _ids(1, 9, 0), cache)
    with pytest.raises(UnsupportedError, match="KVCache") as error:
        ask(cache)
    assert error.value.why
    assert error.value.hint
    assert _logits(LLAMA, _ids(1, 1, 0), cache).isfinite().all()


def test_probes_for_such_things_find_nothing() -> None:
    cache = KVCache(LLAMA, "raw,block=4")
    assert not any(
        hasattr(cache, name) for name in ("key_cache", "value_cache", "to_legacy_cache", "self_attention_cache")
    )
    assert bool(cache)
    assert len(cache) == 2


class _World:
    """Caches of ours, each beside a `DynamicCache` that has gone the same way by real copies."""

    def __init__(self, model: Any, recipe: str, batch: int) -> None:
        self.model, self.batch = model, batch
        first = KVCache(model, recipe)
        self.pages = first._pages
        self.pairs: list[tuple[KVCache, DynamicCache]] = [(first, DynamicCache(config=model.config))]

    def forward(self, which: int, count: int, seed: int, *, exact: bool) -> None:
        ours, stock = self.pairs[which]
        if ours.is_initialized and ours.batch_size != self.batch:
            return
        ids = _ids(self.batch, count, seed)
        found, wanted = _logits(self.model, ids, ours), _logits(self.model, ids, stock)
        if exact:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        else:
            assert found.isfinite().all()


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_whatever_is_done_to_some_the_others_hold_what_they_held(data: Any) -> None:
    model = data.draw(st.sampled_from([LLAMA, GEMMA]))
    recipe = data.draw(st.sampled_from(RECIPES[:3]))
    world = _World(model, recipe, data.draw(st.integers(1, 2)))
    actions = ["forward", "forward", "decode", "copy", "copy", "reorder", "reset", "delete"] + ["crop"] * (
        model is LLAMA
    )
    for step in range(data.draw(st.integers(4, 16))):
        which = data.draw(st.integers(0, len(world.pairs) - 1))
        ours, stock = world.pairs[which]
        match data.draw(st.sampled_from(actions)):
            case "forward":
                world.forward(which, data.draw(st.integers(2, 14)), step, exact=recipe.startswith("raw"))
            case "decode":
                world.forward(which, 1, step, exact=recipe.startswith("raw"))
            case "copy" if len(world.pairs) < 5:
                take = data.draw(st.sampled_from([copy.deepcopy, copy.copy]))
                world.pairs.append((take(ours), copy.deepcopy(stock)))
            case "reorder" if ours.is_initialized:
                order = torch.tensor([data.draw(st.integers(0, world.batch - 1)) for _ in range(world.batch)])
                ours.reorder_cache(order)
                stock.reorder_cache(order)
            case "crop" if ours.get_seq_length() > 1:
                back = data.draw(st.integers(1, ours.get_seq_length() - 1))
                ours.crop(-back)
                stock.crop(-back)
            case "reset":
                ours.reset()
                world.pairs[which] = ours, DynamicCache(config=model.config)
            case "delete" if len(world.pairs) > 1:
                del world.pairs[which], ours, stock
        for ours, stock in world.pairs:
            assert ours.get_seq_length() == stock.get_seq_length()
    for which in range(len(world.pairs)):
        world.forward(which, 3, 99, exact=recipe.startswith("raw"))
    world.pairs.clear()
    ours = stock = None
    gc.collect()
    assert world.pages.bytes_in_use() == 0
    world.pages.manager.check()
