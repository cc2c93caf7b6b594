"""What is said of memory: how much is reserved, how much is real, what fits, and what a machine does not have."""

from __future__ import annotations

import copy
import re
import sys
from functools import partial
from typing import Any

import pytest
import torch

from kvfold import KVCache, SamplingParams
from kvfold.errors import BudgetError, CacheFullError
from kvfold.formats import parse_bytes
from tests.engine.tiny_engine import VOCAB, engine_of, tiny_model

MODEL = tiny_model()
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which pages are real")


def _ids(batch: int, count: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, count), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _forward(cache: KVCache, batch: int, count: int) -> None:
    MODEL(_ids(batch, count), past_key_values=cache)


@linux
def test_reserved_is_address_space_and_resident_is_what_was_written() -> None:
    cache = KVCache(MODEL, "raw,block=32", kv_memory="64MiB")
    assert cache.reserved_bytes == cache.allocated_bytes > 60 << 20
    assert cache.resident_bytes is not None
    assert cache.resident_bytes < 8 << 20
    _forward(cache, 4, 500)
    tables = 8 * 4 * -(-500 // 32)  # entries of block tables lie outside of the arena
    assert cache.kv_bytes - tables <= cache.resident_bytes <= cache.reserved_bytes
    assert cache.resident_bytes < 32 << 20


@linux
def test_what_eviction_and_reset_free_is_no_longer_resident() -> None:
    model = tiny_model(layers=6, hidden=256, context=4096)
    cache = KVCache(model, "raw,block=32,recent=32+streaming(keep=0.125)", kv_memory="128MiB", check=False)
    ids = torch.randint(3, VOCAB, (1, 3000))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.resident_bytes is not None
    assert cache.kv_bytes < cache.resident_bytes < 2 * 6 * 2 * 128 * 4 * 3000  # less than half of all tokens' rows
    cache.reset()
    assert cache.resident_bytes < 4 << 20


def test_where_the_system_does_not_tell_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")
    cache = KVCache(MODEL, "raw,block=32", kv_memory="8MiB")
    assert cache.resident_bytes is None
    with engine_of(MODEL) as engine:
        assert engine.stats()["kv_resident_bytes"] is None


@linux
def test_the_engine_tells_both() -> None:
    with engine_of(MODEL, kv_memory="32MiB") as engine:
        engine.generate([5, 6, 7], SamplingParams(max_tokens=4))
        stats = engine.stats()
        assert 0 < stats["kv_resident_bytes"] < stats["kv_reserved_bytes"] <= stats["kv_budget_bytes"]


@pytest.mark.parametrize("size", ["10TiB", "900TB", 10**30, "1000000TB"])
@pytest.mark.parametrize("face", ["drop-in", "engine"])
def test_more_than_the_machine_has_is_refused_before_anything_runs(
    face: str, size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    model = tiny_model()
    monkeypatch.setattr(model.model, "forward", never)
    make = partial(engine_of, model, check=True) if face == "engine" else partial(KVCache, model, "int4")
    with pytest.raises(BudgetError, match="available") as error:
        make(kv_memory=size)
    assert re.search(r"\d.* (MiB|GiB)", error.value.why or "")
    assert error.value.hint


@pytest.mark.parametrize("size", ["1e30", "lots", "", "-1", "2 GiB of it", None])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    if size is None:
        KVCache(MODEL, "int4", kv_memory=None)
        return
    with pytest.raises(BudgetError):
        KVCache(MODEL, "int4", kv_memory=size)


@pytest.mark.parametrize("recipe", ["raw", "int4,recent=32"])
def test_a_full_drop_in_cache_says_what_fits(recipe: str) -> None:
    cache = KVCache(MODEL, recipe, kv_memory="96KiB")
    _forward(cache, 2, 40)
    with pytest.raises(CacheFullError, match="400 new tokens of 2 sequences") as error:
        _forward(cache, 2, 400)
    text = str(error.value)
    assert "extent" not in text
    assert re.search(r"[\d,]+ tokens of one sequence", text)
    assert "80 tokens of 2 sequences" in text
    needed = re.search(r"at least ([\d.]+ [KM]iB)", error.value.hint or "")
    assert needed, text
    _forward(roomy := KVCache(MODEL, recipe, kv_memory=needed[1].replace(" ", "")), 2, 40)
    _forward(roomy, 2, 400)


@pytest.mark.parametrize("recipe", ["raw", "int4,recent=32", "raw,recent=32+keydiff(keep=0.5)"])
def test_the_budget_that_a_full_cache_asks_for_holds_the_other_copies_too(recipe: str) -> None:
    def fill(cache: KVCache) -> list[KVCache]:
        _forward(cache, 1, 70)
        copies = [cache]
        for _ in range(40):
            copies.append(copy.deepcopy(cache))
            _forward(copies[-1], 1, 90)
        return copies

    with pytest.raises(CacheFullError) as error:
        fill(KVCache(MODEL, recipe, kv_memory="160KiB"))
    needed = re.search(r"at least ([\d.]+ [KM]iB) for (\d+) x ([\d,]+) tokens", error.value.hint or "")
    assert needed, str(error.value)
    assert parse_bytes(needed[1].replace(" ", "")) > parse_bytes("160KiB")
    roomy = KVCache(MODEL, recipe, kv_memory=needed[1].replace(" ", ""))
    _forward(roomy, 1, 70)
    copies = [copy.deepcopy(roomy) for _ in range(int(needed[2]) - 1)]
    for each in copies:
        _forward(each, 1, 90)


def test_a_budget_that_holds_no_block_says_what_one_takes() -> None:
    with pytest.raises(BudgetError, match="holds no block") as error:
        KVCache(MODEL, "raw", kv_memory="1KiB")
    assert "KiB" in (error.value.why or "")
    assert "32 tokens" in (error.value.why or "")
    assert error.value.hint


def test_an_engine_that_is_full_says_what_fits() -> None:
    with engine_of(MODEL, kv_memory="96KiB") as engine:
        engine.add_request([5] * 300, SamplingParams(max_tokens=9))
        engine.step()
        with pytest.raises(CacheFullError) as error:
            engine.add_context([6] * 400)
        assert "extent" not in str(error.value)
        assert "tokens of one sequence" in str(error.value)
