"""A greedy request that is run again gives the same tokens and log-probabilities, to the bit, although it takes from
the prefix index what it had to compute the first time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvfold.engine import Engine, RequestOutput, SamplingParams
from tests.engine.tiny_engine import assert_idle, engine_of, prompts_of, tiny_model, windowed_model

RECIPES = [
    "raw,block=8",
    "int8,block=8,recent=16,sinks=4",
    "int4,block=8,recent=24,sinks=8",
    "int2,block=16,recent=0,sinks=0",
    "int4,scales=channel,block=8,recent=16",
    "int4,block=8,recent=16+keydiff(keep=0.5)",
    "int4,block=8,recent=16+snapkv(keep=0.5,window=8)",
    "int8,block=8,recent=16+keydiff(keep=0.5,chunk=64)",
    "int4,block=8,recent=16+quest(pages=4,dense=0)",
]


MODELS = {"full": lambda: tiny_model(seed=4), "windowed": lambda: windowed_model(40)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def _said(output: RequestOutput) -> tuple[list[int], list[float]]:
    assert output.error is None
    reports = output.outputs[0].logprobs or []
    return output.token_ids, [report[token].logprob for token, report in zip(output.token_ids, reports, strict=True)]


def _run(engine: Engine, prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
    return _said(engine.generate(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=0))[0])


def test_the_bundled_model_says_the_same_again() -> None:
    with Engine("bundled", recipe="int4", kv_memory="32MiB") as engine:
        text = " ".join(f"The {i}th ship was called {name}." for i in range(60) for name in ("Aurora", "Beagle"))
        prompt = engine.tokenizer.encode(text)[:1111]
        first = _run(engine, prompt, 40)
        again = engine.generate(prompt, SamplingParams(max_tokens=40, ignore_eos=True, logprobs=0))[0]
        assert again.num_cached_tokens > 900
        assert _said(again) == first
        assert _run(engine, prompt, 40) == first


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_request_gives_the_same_when_it_is_run_again(name: str, recipe: str) -> None:
    prompt = prompts_of(203, seed=6)[0]
    repeatable = True if recipe.startswith("raw") else None
    with engine_of(
        MODELS[name](), recipe=recipe, max_batched_tokens=64, max_sequences=4, repeatable=repeatable
    ) as engine:
        first = _run(engine, prompt, 50)
        assert _run(engine, prompt, 50) == first
        assert _run(engine, prompt, 20) == (first[0][:20], first[1][:20])
        assert _run(engine, prompt, 50) == first
        assert engine.stats()["prefix_hit_tokens"] > 0
        assert_idle(engine)


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data())
def test_whatever_was_run_before_a_request_that_is_run_twice_says_the_same_twice(data: Any) -> None:
    """Others may have left parts of the prefix; what the first of two runs then finds or computes, the second finds."""
    recipe = data.draw(st.sampled_from(RECIPES))
    batched = data.draw(st.sampled_from([16, 64, 512]))
    start = prompts_of(160, seed=data.draw(st.integers(0, 5)))[0]
    model = MODELS[data.draw(st.sampled_from(list(MODELS)))]()
    with engine_of(model, recipe=recipe, max_batched_tokens=batched, max_sequences=8, repeatable=True) as engine:
        for seed in range(data.draw(st.integers(0, 2))):
            cut = data.draw(st.integers(1, 160))
            _run(engine, [*start[:cut], *prompts_of(data.draw(st.integers(1, 40)), seed=9 + seed)[0]], 12)
        prompt = start[: data.draw(st.integers(1, 160))]
        tokens = data.draw(st.integers(1, 60))
        first = _run(engine, prompt, tokens)
        for _ in range(2):
            assert _run(engine, prompt, tokens) == first
        assert_idle(engine)


def test_raw_repeats_to_rounding_and_takes_no_step_more_for_it() -> None:
    prompt = prompts_of(60, seed=2)[0]
    with engine_of(tiny_model()) as engine:
        first = _run(engine, prompt, 1)
        assert engine.stats()["steps"] == 1
        again = _run(engine, prompt, 1)
    assert again[0] == first[0]
    assert again[1] == pytest.approx(first[1], abs=1e-5)


def test_several_requests_at_once_give_the_same_when_they_are_run_again() -> None:
    prompts = prompts_of(130, 40, 77, 9)
    params = SamplingParams(max_tokens=20, ignore_eos=True, logprobs=0)
    with engine_of(tiny_model(), recipe="int4,block=8,recent=16", max_batched_tokens=512) as engine:
        runs = [[_said(output) for output in engine.generate(prompts, params)] for _ in range(3)]
    assert runs[1] == runs[2]
    assert [said[0] for said in runs[0]] == [said[0] for said in runs[1]]


def test_a_context_that_is_shared_gives_what_a_request_of_its_own_gives() -> None:
    context, tail = prompts_of(150, 20, seed=8)
    recipe = "int4,block=8,recent=16+keydiff(keep=0.5)"
    params = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=0)
    with engine_of(tiny_model(), recipe=recipe, max_batched_tokens=64, max_sequences=4) as engine:
        held = engine.add_context(context)
        shared = _said(engine.generate(tail, params, context=held)[0])
        own = SamplingParams(max_tokens=30, ignore_eos=True, logprobs=0, context_tokens=150)
        assert _said(engine.generate([*context, *tail], own)[0])[0] == shared[0]
        engine.remove_context(held)
