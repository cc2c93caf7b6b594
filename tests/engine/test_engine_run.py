"""The engine end to end on a tiny random model: what it says is what transformers says, however the work is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kvfold.engine import SamplingParams
from kvfold.engine.runner import Ran, SeqWork
from kvfold.errors import CacheFullError, NumericsError, RequestError
from tests.engine.tiny_engine import (
    EOS,
    VOCAB,
    assert_idle,
    byte_tokenizer,
    drain,
    engine_of,
    expected,
    prompts_of,
    tiny_model,
)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


# == the same tokens


@pytest.mark.parametrize("batched", [8, 64, 512])
def test_greedy_equals_transformers_in_chunks_of_any_size(model: Any, batched: int) -> None:
    prompts = prompts_of(1, 5, 40, 130, 64)
    with engine_of(model, max_batched_tokens=batched, max_sequences=8) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=30))
        assert_idle(engine)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == expected(model, prompt, 30)
        assert output.prompt_token_ids == prompt
        assert output.finish_reason == ("stop" if output.token_ids[-1] == EOS else "length")


def test_requests_that_arrive_one_by_one(model: Any) -> None:
    prompts = prompts_of(30, 3, 77, 12, 50, seed=5)
    with engine_of(model, max_batched_tokens=16, max_sequences=3) as engine:
        done, ids = {}, []
        for prompt in prompts:
            ids.append(engine.add_request(prompt, SamplingParams(max_tokens=20)))
            for _ in range(3):
                done |= {output.request_id: output for output in engine.step()}
        done |= drain(engine)
        assert_idle(engine)
    assert [done[i].token_ids for i in ids] == [expected(model, prompt, 20) for prompt in prompts]


def test_preemption_changes_no_token(model: Any) -> None:
    prompts = prompts_of(*[60] * 6, seed=9)
    params = SamplingParams(max_tokens=100, temperature=0.8, seed=4, ignore_eos=True)
    with engine_of(model, max_sequences=8) as roomy:
        wanted = roomy.generate(prompts, params)
        assert roomy.stats()["preemptions"] == 0
    with engine_of(model, max_sequences=8, kv_memory="200KiB") as tight:
        found = tight.generate(prompts, params)
        assert tight.stats()["preemptions"] > 0
        assert_idle(tight)
    assert [output.token_ids for output in found] == [output.token_ids for output in wanted]


def test_a_seed_gives_the_same_tokens_among_any_neighbours(model: Any) -> None:
    prompt, *others = prompts_of(20, 33, 4, 60)
    params = SamplingParams(max_tokens=40, temperature=1.0, top_p=0.9, seed=11)
    with engine_of(model) as engine:
        alone = engine.generate(prompt, params)[0].token_ids
        among = engine.generate([*others, prompt], [SamplingParams(temperature=1.3, max_tokens=25)] * 3 + [params])[3]
    assert among.token_ids == alone


def test_the_engines_seed_serves_requests_that_bring_none(model: Any) -> None:
    prompts, params = prompts_of(9, 9), SamplingParams(max_tokens=20, temperature=1.5)
    runs = []
    for seed in (1, 1, 2):
        with engine_of(model, seed=seed) as engine:
            runs.append([output.token_ids for output in engine.generate(prompts, params)])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("recipe", ["int8,block=8,recent=16", "k8v4,block=8,recent=8", "int4,block=16"])
def test_packed_recipes_run_and_repeat(model: Any, recipe: str) -> None:
    prompts, params = prompts_of(70, 20, 33), SamplingParams(max_tokens=60, ignore_eos=True)
    with engine_of(model, recipe=recipe, prefix_caching=False) as engine:
        first, second = engine.generate(prompts, params), engine.generate(prompts, params)
        assert engine.stats()["sealed_blocks"] > 0
        assert_idle(engine)
    assert [output.token_ids for output in first] == [output.token_ids for output in second]


# == sharing


def test_a_shared_prefix_is_computed_once(model: Any) -> None:
    start, (tail, other) = prompts_of(64)[0], prompts_of(5, 6, seed=3)
    with engine_of(model) as engine:
        first = engine.generate([*start, *tail], SamplingParams(max_tokens=5))[0]
        second = engine.generate([*start, *other], SamplingParams(max_tokens=5))[0]
        salted = engine.generate([*start, *other], SamplingParams(max_tokens=5), salt=b"other tenant")[0]
        assert engine.stats()["prefix_hit_tokens"] == 64
    assert [output.num_cached_tokens for output in (first, second, salted)] == [0, 64, 0]
    assert second.token_ids == salted.token_ids == expected(model, [*start, *other], 5)


def test_a_common_start_is_computed_once_even_if_all_arrive_together(model: Any) -> None:
    start, tails = prompts_of(64)[0], prompts_of(*[5] * 6, seed=3)
    with engine_of(model) as engine:
        outputs = engine.generate([start + tail for tail in tails], SamplingParams(max_tokens=10))
        assert engine.stats()["prefill_tokens"] == 64 + 6 * 5
    assert [output.num_cached_tokens for output in outputs] == [0] + [64] * 5
    assert [output.token_ids for output in outputs] == [expected(model, start + tail, 10) for tail in tails]


def test_n_completions_share_the_prompt_and_are_those_of_single_requests(model: Any) -> None:
    prompt = prompts_of(45)[0]
    params = {"max_tokens": 25, "temperature": 1.2, "presence_penalty": 0.5, "logprobs": 0}
    with engine_of(model) as engine:
        many = engine.generate(prompt, SamplingParams(n=4, seed=100, **params))[0]
        assert engine.stats()["prefill_tokens"] == 45
        assert engine.stats()["copied_blocks"] > 0
        single = [engine.generate(prompt, SamplingParams(seed=100 + i, **params))[0] for i in range(4)]
        assert_idle(engine)
    assert [completion.index for completion in many.outputs] == [0, 1, 2, 3]
    assert [completion.token_ids for completion in many.outputs] == [output.token_ids for output in single]
    assert len({tuple(completion.token_ids) for completion in many.outputs}) == 4


# == ends


def test_stop_tokens_end_tokens_and_ignoring_them(model: Any) -> None:
    prompt = prompts_of(10)[0]
    said = expected(model, prompt, 30)
    stop = said[5]
    at = said.index(stop)
    with engine_of(model) as engine:
        stopped = engine.generate(prompt, SamplingParams(stop_token_ids=(stop,)))[0]
        assert (stopped.finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
        assert stopped.token_ids == said[: at + 1]
        engine._intake._end_ids = frozenset({stop})
        ended = engine.generate(prompt)[0]
        assert (ended.token_ids, ended.finish_reason, ended.outputs[0].stop_reason) == (said[: at + 1], "stop", None)
        ignored = engine.generate(prompt, SamplingParams(max_tokens=30, ignore_eos=True))[0]
        assert ignored.token_ids == said
        late = engine.generate(prompt, SamplingParams(max_tokens=30, min_tokens=at + 1))[0]
        assert len(late.token_ids) > at + 1
        assert stop not in late.token_ids[: at + 1]


def test_stop_strings_cut_the_text(model: Any, tokenizer: Any) -> None:
    with engine_of(model, tokenizer=tokenizer) as engine:
        free = engine.generate("A text", SamplingParams(max_tokens=60, ignore_eos=True))[0]
        assert free.text == tokenizer.decode(free.token_ids, skip_special_tokens=True)
        word = free.text[8:11]
        cut = engine.generate("A text", SamplingParams(max_tokens=60, ignore_eos=True, stop=(word, "\x00never")))[0]
        kept = engine.generate(
            "A text", SamplingParams(max_tokens=60, ignore_eos=True, stop=(word,), include_stop_str_in_output=True)
        )[0]
    assert cut.text == free.text[: free.text.index(word)]
    assert kept.text == cut.text + word
    assert (cut.finish_reason, cut.outputs[0].stop_reason) == ("stop", word)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]


def test_without_max_tokens_the_context_or_the_cache_ends_it(model: Any) -> None:
    prompt, params = prompts_of(500)[0], SamplingParams(max_tokens=None, ignore_eos=True)
    with engine_of(model) as engine:
        output = engine.generate(prompt, params)[0]
        assert (len(output.token_ids), output.finish_reason) == (12, "length")
    with engine_of(model, kv_memory="100KiB") as engine:
        capacity = engine._intake._capacity.tokens
        assert capacity < 500
        output = engine.generate(prompt[:50], params)[0]
        assert len(output.token_ids) == capacity + 1 - 50
        assert_idle(engine)
    with engine_of(model, max_length=60) as engine:
        assert len(engine.generate(prompt[:50], params)[0].token_ids) == 10


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], SamplingParams(), "empty prompt"),
        ([5] * 512, SamplingParams(), "context"),
        ([5, VOCAB], SamplingParams(), "vocabulary"),
        ([5, -1], SamplingParams(), "vocabulary"),
        ([5, 1.5], SamplingParams(), "whole number"),
        ("text", SamplingParams(), "no tokenizer"),
        ([{"role": "user", "content": "x"}], SamplingParams(), "no tokenizer"),
        (5, SamplingParams(), "it is of type int"),
        ([5], SamplingParams(n=65), "n=65"),
        ([5], SamplingParams(stop=("x",)), "no tokenizer"),
        ([5], SamplingParams(stop_token_ids=(VOCAB,)), "vocabulary"),
        ([5] * 200, SamplingParams(max_tokens=300), "can never fit"),
        ([5] * 450, SamplingParams(max_tokens=None), "can never fit"),
        ([5] * 10, SamplingParams(context_tokens=11), "the prompt has 10 tokens"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(
    model: Any, prompt: Any, params: SamplingParams, words: str
) -> None:
    with engine_of(model, kv_memory="100KiB") as engine:
        with pytest.raises(RequestError, match=words):
            engine.add_request(prompt, params)
        assert_idle(engine)


def test_one_refused_prompt_refuses_the_call(model: Any) -> None:
    with engine_of(model) as engine:
        with pytest.raises(RequestError):
            engine.generate([[5, 6], []])
        with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
            engine.generate([[5, 6]], [SamplingParams()] * 2)
        assert_idle(engine)


# == abort, errors


def test_abort_at_any_stage(model: Any) -> None:
    long, short = prompts_of(100, 10)
    with engine_of(model, max_batched_tokens=16, max_sequences=4) as engine:
        decoding = engine.add_request(short, SamplingParams(max_tokens=50, ignore_eos=True))
        for _ in range(3):
            engine.step()
        prefilling = engine.add_request(long, SamplingParams(n=3))
        waiting = engine.add_request(long, SamplingParams(n=3))
        engine.step()
        outputs = [engine.abort(request_id) for request_id in (prefilling, decoding, waiting)]
        assert engine.abort(decoding) is None
        assert engine.abort("never heard of") is None
        assert engine.step() == []
        assert_idle(engine)
    assert [output.finish_reason for output in outputs if output] == ["abort"] * 3
    assert outputs[1] is not None
    assert outputs[1].token_ids == expected(model, short, 4)


def test_nan_ends_its_own_request_only(tokenizer: Any) -> None:
    model = tiny_model()
    good, other = prompts_of(20, 30)
    poison, wanted = 7, [expected(model, prompt, 20) for prompt in (good, other)]
    good, other = ([t if t != poison else 8 for t in prompt] for prompt in (good, other))
    wanted = [expected(model, prompt, 20) for prompt in (good, other)]
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = float("nan")
    with engine_of(model) as engine:
        outputs = engine.generate(
            [good, [3, poison, 4], other], SamplingParams(max_tokens=20), raise_errors=False, progress=False
        )
        assert [outputs[0].token_ids, outputs[2].token_ids] == wanted
        assert (outputs[1].finish_reason, outputs[1].token_ids) == ("error", [])
        assert isinstance(outputs[1].error, NumericsError)
        with pytest.raises(NumericsError, match="not finite"):
            engine.generate([good, [3, poison, 4]], SamplingParams(max_tokens=5))
        assert engine.generate(good, SamplingParams(max_tokens=20))[0].token_ids == wanted[0]
        assert_idle(engine)


def test_an_error_of_the_forward_is_raised_and_leaves_nothing_behind(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts_of(30)[0]
    with engine_of(model) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner._packed, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
            with pytest.raises(RuntimeError, match="broken"):
                engine.generate([prompt, prompt])
        assert_idle(engine)
        assert engine.generate(prompt, SamplingParams(max_tokens=9))[0].token_ids == expected(model, prompt, 9)


def test_a_plan_that_does_not_fit_after_all_costs_a_preemption_and_no_token(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(20, 21, 22)
    with engine_of(model) as engine:
        run, calls = engine._runner.run, 0

        def grudging(work: Sequence[SeqWork]) -> Ran:
            nonlocal calls
            calls += 1
            if calls % 5 == 2:
                raise CacheFullError("the KV cache is full")
            return run(work)

        monkeypatch.setattr(engine._runner, "run", grudging)
        outputs = engine.generate(prompts, SamplingParams(max_tokens=12), raise_errors=False)
        assert engine.stats()["preemptions"] > 0
        assert_idle(engine)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.finish_reason == "error" or output.token_ids == expected(model, prompt, 12)
    assert outputs[0].finish_reason != "error" or isinstance(outputs[0].error, CacheFullError)
