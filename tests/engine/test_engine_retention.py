"""Retention under the engine: what it frees others use, and where it runs hangs on the request alone."""

from __future__ import annotations

import pytest

from kvfold import SamplingParams
from kvfold.errors import RequestError, UnsupportedError
from tests.engine.tiny_engine import assert_idle, drain, engine_of, prompts_of, tiny_model

MODEL = tiny_model(context=2048)
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
QUARTER = "raw,block=8,recent=16"


def texts(engine, prompts, params=GREEDY):
    outputs = engine.generate(prompts, params, progress=False)
    assert_idle_but_cached(engine)
    return [output.token_ids for output in outputs]


def assert_idle_but_cached(engine):
    assert_idle(engine)
    retainer = engine._runner.cache.retainer
    assert retainer is None or (retainer.nbytes() == 0 and not retainer._kept)


def most_at_once(recipe: str, budget: str, prompts: int) -> int:
    with engine_of(MODEL, recipe=recipe, kv_memory=budget, max_batched_tokens=512, prefix_caching=False) as engine:
        for prompt in prompts_of(*[480] * prompts):
            engine.add_request(prompt, SamplingParams(max_tokens=40, ignore_eos=True))
        most = 0
        while engine.has_unfinished():
            engine.step()
            most = max(most, len(engine._core.scheduler.running))
        assert_idle_but_cached(engine)
        assert engine.stats()["preemptions"] == 0
        return most


def test_a_pool_that_holds_four_sequences_runs_twelve_at_a_quarter():
    full = most_at_once(QUARTER, "570KiB", 6)
    assert full == 4
    assert most_at_once(f"{QUARTER}+snapkv(keep=0.25)", "570KiB", 14) >= 12


@pytest.mark.parametrize("method", ["random(keep=0.4)", "snapkv(keep=0.4)", "keydiff(budget=90,every=8)"])
def test_neighbours_and_chunks_do_not_matter(method):
    recipe = f"{QUARTER}+{method}"
    prompts = prompts_of(300, 170, 220, 301)
    alone = []
    for prompt in prompts:
        with engine_of(MODEL, recipe=recipe, max_batched_tokens=512) as engine:
            alone += texts(engine, [prompt])
    with engine_of(MODEL, recipe=recipe, max_batched_tokens=64) as engine:
        assert texts(engine, prompts) == alone


def test_a_preempted_request_says_the_same():
    recipe = f"{QUARTER}+random(keep=0.4,every=8)"
    prompts = prompts_of(200, 210, 190)
    with engine_of(MODEL, recipe=recipe) as engine:
        wanted = texts(engine, prompts, SamplingParams(max_tokens=60, ignore_eos=True))
    with engine_of(MODEL, recipe=recipe) as engine:
        ids = [engine.add_request(p, SamplingParams(max_tokens=60, ignore_eos=True)) for p in prompts]
        done = {}
        for step in range(10_000):
            if not engine.has_unfinished():
                break
            if step in (5, 9, 23):
                engine._core._preempt(engine._core.scheduler.running[-1])
            done |= {output.request_id: output for output in engine.step()}
        assert engine.stats()["preemptions"] == 3
        assert [done[i].token_ids for i in ids] == wanted


@pytest.mark.parametrize("method", ["snapkv(keep=0.4)", "keydiff(keep=0.4,chunk=64)"])
def test_a_shared_prefix_gives_what_a_private_one_gives(method):
    recipe = f"{QUARTER}+{method}"
    (start,) = prompts_of(160)
    prompts = [start + tail for tail in prompts_of(40, 55, 70, seed=5)]
    with engine_of(MODEL, recipe=recipe, prefix_caching=False) as engine:
        private = texts(engine, prompts)
    with engine_of(MODEL, recipe=recipe, prefix_caching=True) as engine:
        assert texts(engine, prompts) == private
        assert texts(engine, prompts) == private
        assert engine.stats()["prefix_hit_tokens"] > 0


def test_the_context_is_compressed_before_the_question_is_read():
    prompt = prompts_of(200)[0]
    recipe = f"{QUARTER}+snapkv(keep=0.3)"
    with engine_of(MODEL, recipe=recipe) as engine:
        (whole,) = engine.generate([prompt], GREEDY, progress=False)
        before = engine.stats()["retention_blocks_before"]
        (parted,) = engine.generate([prompt], SamplingParams(max_tokens=20, ignore_eos=True, context_tokens=160))
        assert engine.stats()["retention_blocks_before"] - before == 20
        assert len(parted.token_ids) == len(whole.token_ids) == 20
        with pytest.raises(RequestError, match="context_tokens"):
            engine.add_request(prompt, SamplingParams(context_tokens=201))


def test_completions_of_one_prompt_share_what_was_kept():
    prompt = prompts_of(240)[0]
    with engine_of(MODEL, recipe=f"{QUARTER}+snapkv(keep=0.3)") as engine:
        params = SamplingParams(n=3, temperature=0.8, seed=3, max_tokens=30, ignore_eos=True)
        engine.add_request(prompt, params)
        engine.step()
        assert engine.stats()["retention_runs"] == 1
        assert len(engine._core.scheduler.running) == 3
        kept = engine._runner.manager.sequences()
        assert len({engine._runner.manager.kept(seq, 0) for seq in kept}) == 1
        drain(engine)
        assert_idle_but_cached(engine)


def test_a_prompt_longer_than_the_pool_is_read_in_chunks():
    prompt = prompts_of(1500)[0]
    budget = "200KiB"
    with engine_of(MODEL, recipe=QUARTER, kv_memory=budget) as engine, pytest.raises(RequestError, match="never fit"):
        engine.add_request(prompt, GREEDY)
    refused = engine_of(MODEL, recipe=f"{QUARTER}+keydiff(budget=100)", kv_memory=budget)
    with refused as engine, pytest.raises(RequestError, match="chunk="):
        engine.add_request(prompt, GREEDY)
    with engine_of(MODEL, recipe=f"{QUARTER}+keydiff(budget=100,chunk=128)", kv_memory=budget) as engine:
        (output,) = engine.generate([prompt], GREEDY, progress=False)
        assert len(output.token_ids) == 20
        assert engine.stats()["preemptions"] == 0
        assert engine.stats()["kv_peak_bytes"] <= engine.stats()["kv_budget_bytes"]
        assert_idle_but_cached(engine)


def test_memory_is_flat_while_decoding_under_a_budget():
    with engine_of(MODEL, recipe=f"{QUARTER}+random(budget=96)", prefix_caching=False) as engine:
        engine.add_request(prompts_of(100)[0], SamplingParams(max_tokens=1200, ignore_eos=True))
        held = []
        while engine.has_unfinished():
            engine.step()
            held.append(engine.stats()["kv_in_use_bytes"])
        late = held[300:-1]
        assert max(late) - min(late) <= 10 * engine._runner.manager.groups[0].raw_block_bytes
        assert max(held) < 30 * engine._runner.manager.groups[0].raw_block_bytes
        assert engine.stats()["retention_runs"] >= 1100 // 64


def test_a_recipe_that_cannot_work_is_refused_when_the_engine_is_made():
    with pytest.raises(UnsupportedError, match="scales of channels"):
        engine_of(MODEL, recipe="int4,scales=channel+snapkv(keep=0.5)")


@pytest.mark.parametrize("method", ["", "+keydiff(keep=0.3)", "+keydiff(budget=80,every=8)"])
def test_a_shared_context_gives_what_a_private_one_gives(method):
    context = prompts_of(203)[0]
    questions = prompts_of(9, 30, 1, 17, seed=4)
    private = []
    with engine_of(MODEL, recipe=QUARTER + method) as engine:
        for question in questions:
            params = SamplingParams(max_tokens=20, ignore_eos=True, context_tokens=len(context))
            private += [o.token_ids for o in engine.generate([context + question], params, progress=False)]
    with engine_of(MODEL, recipe=QUARTER + method) as engine:
        held = engine.add_context(context)
        used = engine.stats()["kv_in_use_bytes"]
        outputs = engine.generate(questions, GREEDY, context=held, progress=False)
        assert [output.token_ids for output in outputs] == private
        assert outputs[0].prompt_token_ids == context + questions[0]
        assert engine.stats()["prefix_hit_tokens"] == 203 * len(questions)
        assert engine.stats()["kv_in_use_bytes"] == used
        assert engine.generate(questions[1], GREEDY, context=held, progress=False)[0].token_ids == private[1]
        engine.remove_context(held)
        assert_idle(engine)
        with pytest.raises(RequestError, match="does not hold"):
            engine.generate(questions, GREEDY, context=held)


def test_contexts_of_query_aware_methods_are_refused_and_those_in_use_stay():
    context = prompts_of(100)[0]
    with engine_of(MODEL, recipe=f"{QUARTER}+snapkv(keep=0.3)") as engine:
        with pytest.raises(UnsupportedError, match="queries of a request"):
            engine.add_context(context)
        assert_idle(engine)
    with engine_of(MODEL, recipe=f"{QUARTER}+keydiff(keep=0.3)") as engine:
        held = engine.add_context(context)
        engine.add_request(prompts_of(5)[0], GREEDY, context=held)
        with pytest.raises(RequestError, match="in use"):
            engine.remove_context(held)
        with pytest.raises(RequestError, match="salt"):
            engine.add_request(prompts_of(5)[0], GREEDY, context=held, salt=b"other")
        drain(engine)


def test_many_requests_on_one_context_in_a_small_pool():
    context = prompts_of(400)[0]
    with engine_of(MODEL, recipe=f"{QUARTER}+keydiff(keep=0.5)", kv_memory="200KiB", prefix_caching=False) as engine:
        held = engine.add_context(context)
        outputs = engine.generate(prompts_of(*[20] * 24, seed=2), GREEDY, context=held, progress=False)
        assert all(len(output.token_ids) == 20 for output in outputs)
        assert engine.stats()["kv_peak_bytes"] <= engine.stats()["kv_budget_bytes"]
