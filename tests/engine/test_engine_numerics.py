"""A request whose numbers are not finite ends with an error, and no other request ever reads what it has computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvfold.attention.pieces import LayerCall
from kvfold.cache import PagedCache, SequenceWork
from kvfold.engine import Engine, RequestOutput, SamplingParams
from kvfold.errors import NumericsError
from kvfold.geometry import Geometry
from kvfold.recipe import Recipe
from tests.engine.tiny_engine import assert_idle, engine_of, expected, prompts_of, tiny_model

BAD = 77
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
RECIPES = [
    "raw,block=8",
    "int8,block=8,recent=8,sinks=4",
    "int4,block=8,recent=8,sinks=0",
    "int2,scales=channel,block=8,recent=8,sinks=4",
    "raw,block=8+keydiff(keep=0.5,chunk=32)",
    "int4,block=8,recent=8,sinks=0+quest(pages=2,dense=0)",
]


def _planted(kind: str) -> Any:
    """A model of which token ``BAD`` has NaN, infinity, or numbers that overflow float16 in the first layer."""
    model = tiny_model(layers=3, seed=3)
    with torch.no_grad():
        row = model.model.embed_tokens.weight[BAD]
        if kind == "float16 overflow":
            model.half()
            row = model.model.embed_tokens.weight[BAD]
            row.fill_(65504)  # the greatest number there is: what the first layer adds is too much
            model.model.layers[0].mlp.down_proj.weight.mul_(300)
        else:
            row.fill_(float(kind))
    return model


@pytest.fixture(scope="module", params=["nan", "inf"])
def planted(request: Any) -> Any:
    torch.set_num_threads(1)
    return _planted(request.param)


def _healthy(output: RequestOutput) -> None:
    assert output.error is None
    assert output.finish_reason == "length"


def _findable_blocks_are_finite(engine: Engine) -> None:
    """Every raw block that the prefix index offers holds finite numbers only."""
    cache = engine._runner.cache
    index, arena = cache.manager._books.index, cache._arena
    for group, state, block in index.blocks():
        if state != "raw":
            continue
        pool = cache.manager.pool(group, "raw")
        page_bytes = cache._pages[group].raw.fmt.page_bytes
        start = int(pool.offset(torch.tensor([block]).numpy())[0])
        fmt = cache._pages[group].raw.fmt
        for page in arena[start : start + pool.block_bytes].view(-1, page_bytes):
            for offset, side in ((fmt.k_codes_offset, fmt.k), (fmt.v_codes_offset, fmt.v)):
                rows = page[offset : offset + fmt.block_size * side.code_bytes].view(cache.dtype)
                assert bool(torch.isfinite(rows).all())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_request_with_bad_numbers_does_not_poison_its_prefix(planted: Any, recipe: str) -> None:
    shared = list(range(5, 37))
    with engine_of(planted, recipe=recipe) as engine:
        first = engine.generate([*shared, BAD], PARAMS, raise_errors=False)[0]
        assert isinstance(first.error, NumericsError)
        for tail in (9, 10, 11):
            _healthy(engine.generate([*shared, tail], PARAMS, raise_errors=False)[0])
        assert_idle(engine)
    if recipe.startswith("raw,block=8") and "+" not in recipe:
        with engine_of(planted, recipe=recipe) as engine:
            prompts = [[*shared, BAD], [*shared, 9], [*shared, 10]]
            outputs = engine.generate(prompts, SamplingParams(max_tokens=8), raise_errors=False)
        for tail, output in zip((9, 10), outputs[1:], strict=True):
            assert output.token_ids == expected(planted, [*shared, tail], 8)


@pytest.mark.parametrize("recipe", ["raw,block=8", "int8,block=8,recent=8", "int4,block=8,recent=8,sinks=0"])
def test_a_real_overflow_of_float16_does_not_either(recipe: str) -> None:
    model, shared = _planted("float16 overflow"), list(range(5, 37))
    with engine_of(model, recipe=recipe) as engine:
        first = engine.generate([*shared, BAD], PARAMS, raise_errors=False)[0]
        assert isinstance(first.error, NumericsError)
        for tail in (9, 10):
            alone = engine.generate([*shared, tail], PARAMS, raise_errors=False, salt=bytes([tail]))[0]
            _healthy(alone)
            _healthy(engine.generate([*shared, tail], PARAMS, raise_errors=False)[0])
        _findable_blocks_are_finite(engine)


def test_a_prompt_that_goes_bad_in_an_early_chunk_ends_there(planted: Any) -> None:
    prompt = [*prompts_of(8)[0], BAD, *prompts_of(200, seed=2)[0]]
    with engine_of(planted, max_batched_tokens=32, max_sequences=4) as engine:
        output = engine.generate(prompt, PARAMS, raise_errors=False)[0]
        assert isinstance(output.error, NumericsError)
        assert output.token_ids == []
        assert engine.stats()["prefill_tokens"] < 100
        assert_idle(engine)


def test_a_context_with_bad_numbers_is_refused(planted: Any) -> None:
    shared = list(range(5, 37))
    with engine_of(planted) as engine:
        for text in ([*shared, BAD], [*shared, BAD, 6], [BAD, *shared]):
            with pytest.raises(NumericsError, match="context"):
                engine.add_context(text)
        context = engine.add_context(shared)
        _healthy(engine.generate([9], PARAMS, context=context)[0])
        engine.remove_context(context)
        assert_idle(engine)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("recipe", ["raw,block=8", "int8,block=8,recent=8,sinks=0"])
def test_rows_that_are_not_finite_are_never_findable_whatever_attention_makes_of_them(
    recipe: str, side: int, bad: float
) -> None:
    """A key of infinity that every query meets with a negative number has weight 0: the logits look healthy."""
    geometry = Geometry.from_config(tiny_model().config)
    cache = PagedCache(geometry, Recipe.parse(recipe), dtype=torch.float32, kv_memory=1 << 20)
    tokens = list(range(40))
    for planted in (False, True):
        seq = cache.create()
        step = cache.begin([SequenceWork(seq, 40)], check_finite=True)
        for layer in range(len(geometry.layers)):
            rows = torch.randn(2, 40, 2, 8)
            if planted and layer:
                rows[side, 3, 1, 5] = bad
            step.write(layer, *rows)
            step.attend(layer, torch.randn(40, 4, 8), *rows, LayerCall(scale=0.3, kind="full"))
        salt = b"bad" if planted else b"good"
        cache.commit(step, [tokens], [salt])
        assert cache.manager.match([*tokens, 1], salt) == (0 if planted else 40 if recipe.startswith("raw") else 32)
        cache.free(seq)


def _play(engine: Engine, prompts: Sequence[list[int]], together: bool) -> list[RequestOutput]:
    if together:
        return engine.generate(prompts, PARAMS, raise_errors=False)
    return [engine.generate(prompt, PARAMS, raise_errors=False)[0] for prompt in prompts]


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_only_requests_that_hold_the_bad_token_fail(data: Any) -> None:
    """Whatever the recipe, the chunks, the order, and what is shared: a request fails exactly if it holds the token."""
    kind = data.draw(st.sampled_from(["nan", "inf", "-inf", "float16 overflow"]))
    recipe = data.draw(st.sampled_from(RECIPES))
    starts = prompts_of(40, 40, seed=data.draw(st.integers(0, 3)))
    starts = [[token if token != BAD else 5 for token in start] for start in starts]
    prompts = []
    for _ in range(data.draw(st.integers(2, 6))):
        prompt = list(data.draw(st.sampled_from(starts)))[: data.draw(st.integers(8, 40))]
        prompt += data.draw(st.lists(st.sampled_from([9, 10, 11, 12]), max_size=20))
        if data.draw(st.booleans()):
            prompt.insert(data.draw(st.integers(0, len(prompt))), BAD)
        prompts.append(prompt)
    model = _planted(kind)
    batched = data.draw(st.sampled_from([8, 24, 512]))
    with engine_of(model, recipe=recipe, max_batched_tokens=batched, max_sequences=8) as engine:
        for _ in range(2):
            outputs = _play(engine, prompts, data.draw(st.booleans()))
            for prompt, output in zip(prompts, outputs, strict=True):
                said = output.token_ids[:7]  # the last one is never read; a healthy request may come to say BAD itself
                assert (output.error is not None) == (BAD in [*prompt, *said])
        _findable_blocks_are_finite(engine)
        assert_idle(engine)
