"""Rotary factors that depend on the length: the engine gives what is right for each length, however it got there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from kvfold import KVCache
from kvfold.engine import Engine, RequestOutput, SamplingParams
from kvfold.engine.runner import ModelRunner, SeqWork
from kvfold.errors import UnsupportedError
from kvfold.quality.forced import teacher_force
from kvfold.quality.lm_score import Scorer, Window
from kvfold.recipe import Recipe
from kvfold.rotary import Lengths
from tests.engine.tiny_engine import assert_idle, drain, engine_of
from tests.rotary_models import CONFIGS, LIMIT, READ_AGAIN, right_logits, rotary_model, stock_greedy, tokens_of

MODELS = {name: rotary_model(name) for name in CONFIGS}
TOLERANCE = 2e-3  # nats; a wrong factor costs whole ones


def greedy(count: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, logprobs=0, **more)


def check(
    model: PreTrainedModel, output: RequestOutput, *, likeliest: bool = True, tolerance: float = TOLERANCE
) -> None:
    """Every token has the log-probability that is right for its length, and is the likeliest (but for near ties)."""
    prompt = output.prompt_token_ids
    for completion in output.outputs:
        tokens = completion.token_ids
        assert completion.logprobs is not None
        wanted = right_logits(model, [*prompt, *tokens], len(prompt)).log_softmax(-1)
        for token, found, row in zip(tokens, completion.logprobs, wanted, strict=True):
            assert found[token].logprob == pytest.approx(float(row[token]), abs=tolerance)
            assert not likeliest or float(row.max() - row[token]) < tolerance


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("length", [LIMIT - 6, LIMIT, LIMIT + 1, LIMIT + 30])
@pytest.mark.parametrize("batched", [8, 64])
def test_prompts_in_parts_and_answers_over_the_limit(name: str, length: int, batched: int) -> None:
    model = MODELS[name]
    with engine_of(model, max_batched_tokens=batched, max_sequences=4) as engine:
        for output in engine.generate([tokens_of(length), tokens_of(5, 1)], greedy(10), progress=False):
            check(model, output)
        assert_idle(engine)
        crossed = name in READ_AGAIN and length in (LIMIT - 6, LIMIT)
        assert engine.stats()["rope_rereads"] == int(crossed)
        assert engine.stats()["preemptions"] == 0


def test_tokens_equal_stock_generate() -> None:
    model = MODELS["phi3"]
    prompts = [tokens_of(length, length) for length in (LIMIT - 5, LIMIT, LIMIT + 25)]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        wanted.append(out[0, len(prompt) :].tolist())
        assert wanted[-1] == stock_greedy(model, prompt, 12)
    with engine_of(model, max_batched_tokens=16, max_sequences=4) as engine:
        found = engine.generate(prompts, greedy(12), progress=False)
    assert [output.token_ids for output in found] == wanted


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("lengths", [(LIMIT - 4, LIMIT + 20), (LIMIT + 20, LIMIT - 4)])
def test_a_prefix_is_shared_under_equal_factors_only(name: str, lengths: tuple[int, int]) -> None:
    model, text = MODELS[name], tokens_of(LIMIT + 30)
    with engine_of(model, max_batched_tokens=64) as engine:
        for length in lengths:
            (output,) = engine.generate([text[:length]], greedy(3), progress=False)
            assert output.num_cached_tokens == 0
            check(model, output)
        (again,) = engine.generate([text[: LIMIT + 20]], greedy(6), progress=False)
        assert again.num_cached_tokens >= LIMIT
        check(model, again)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_requests_of_both_kinds_from_one_context(name: str) -> None:
    model, text = MODELS[name], tokens_of(LIMIT + 40)
    with engine_of(model, max_batched_tokens=16, max_sequences=4) as engine:
        short = engine.add_context(text[:24])
        found = engine.generate([text[24:30], text[24 : LIMIT + 10]], greedy(LIMIT - 28), context=short, progress=False)
        long = engine.add_context(text[: LIMIT + 10])
        found += engine.generate([text[LIMIT + 10 : LIMIT + 15]], greedy(6), context=long, progress=False)
        for output in found:
            check(model, output)
        assert found[0].num_cached_tokens == 24
        assert found[1].num_cached_tokens == 0
        assert found[2].num_cached_tokens == (0 if name == "dynamic" else LIMIT + 10)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_completions_that_are_sampled(name: str) -> None:
    """Forks, penalties, seeds and streams go on over the limit."""
    model, chunks = MODELS[name], []
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, n=3, logprobs=0)
    with engine_of(model, max_batched_tokens=16, max_sequences=4) as engine:
        engine.add_request(tokens_of(LIMIT - 5), params, on_chunk=chunks.append)
        (output,) = drain(engine).values()
        again = engine.generate([tokens_of(LIMIT - 5)], params, progress=False)[0]
        assert engine.stats()["rope_rereads"] == (6 if name in READ_AGAIN else 0)
    check(model, output, likeliest=False)
    assert len({tuple(c.token_ids) for c in output.outputs}) > 1
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in output.outputs]
    for completion in output.outputs:
        parts = [t for chunk in chunks if chunk.index == completion.index for t in chunk.token_ids]
        assert parts == completion.token_ids


@pytest.mark.parametrize("name", list(CONFIGS))
def test_preemption_gives_back_the_same_factors(name: str) -> None:
    model = MODELS[name]
    options = {
        "recipe": "raw,block=4",
        "kv_memory": (16 if name == "gemma3" else 36) << 10,
        "max_batched_tokens": 16,
        "max_sequences": 4,
    }
    with engine_of(model, **options) as engine:
        prompts = [tokens_of(length, length) for length in (LIMIT - 8, LIMIT + 5, 12)]
        for output in engine.generate(prompts, greedy(24), progress=False):
            check(model, output)
        assert engine.stats()["preemptions"] > 0
        assert_idle(engine)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_repeated_tokens_have_the_factors_of_the_sequence(name: str) -> None:
    """A method that has a short context repeated goes over the limit with its positions, and not with its factors."""
    model, far = MODELS[name], rotary_model(name, limit=1000)
    recipe = "raw,block=4,sinks=4,recent=4+kvzip(keep=0.5)"
    found = []
    for each in (model, far):
        with engine_of(each, recipe=recipe, max_batched_tokens=64) as engine:
            (output,) = engine.generate([tokens_of(LIMIT - 8)], greedy(6), progress=False)
            assert engine.stats()["retention_runs"] > 0
            found.append(
                [
                    row[token].logprob
                    for row, token in zip(output.outputs[0].logprobs or [], output.token_ids, strict=True)
                ]
            )
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_runner_refuses_to_change_the_factors_of_a_sequence() -> None:
    runner = ModelRunner(MODELS["phi3"], recipe=Recipe(), kv_memory=4 << 20, check=False)
    seq, tokens = runner.create(), tokens_of(LIMIT + 2)
    runner.execute([SeqWork(seq=seq, tokens=tokens[:LIMIT], start=0, salt=b"", sample=True)])
    with pytest.raises(UnsupportedError, match="other rotary factors"):
        runner.execute([SeqWork(seq=seq, tokens=tokens[LIMIT:], start=LIMIT, salt=b"", sample=True)])
    fork = runner.fork(seq)
    with pytest.raises(UnsupportedError, match="other rotary factors"):
        runner.execute([SeqWork(seq=fork, tokens=tokens[LIMIT:], start=LIMIT, salt=b"", sample=True)])
    assert runner.cache.length(seq) == LIMIT
    long = runner.create()  # said to become long: it has other factors from the start, and its blocks another identity
    item = SeqWork(seq=long, tokens=tokens[:32], start=0, salt=b"a", sample=True, lengths=Lengths.whole(LIMIT + 2))
    runner.execute([item])
    adopted = runner.create()  # under short factors
    assert runner.adopt(adopted, tokens, b"") == 32
    with pytest.raises(UnsupportedError, match="other rotary factors"):
        runner.execute([SeqWork(seq=adopted, tokens=tokens[32:], start=32, salt=b"", sample=True)])
    assert runner.manager.match(tokens, b"a") == 0
    assert runner.manager.match(tokens, b"") == 32
    assert runner.manager.match(tokens, runner.rotary.salted(b"a", Lengths(60, 70))) == 32
    runner.release()


@pytest.mark.parametrize("name", READ_AGAIN)
def test_measuring_uses_the_factors_of_the_whole_text(name: str) -> None:
    model, text = MODELS[name], tokens_of(LIMIT + 20)
    runner = ModelRunner(model, recipe=Recipe(), kv_memory=4 << 20, check=False)
    with torch.inference_mode():
        wanted = model(torch.tensor([text]), use_cache=False).logits[0].float()
    forced = teacher_force(runner, text, score_from=LIMIT - 10)
    assert torch.allclose(forced.logits, wanted[LIMIT - 10 :], atol=1e-3)
    windows = [
        Window(prompt=tuple(text[:30]), inputs=tuple(text[30:end]), targets=tuple(text[31 : end + 1]))
        for end in (LIMIT - 2, LIMIT + 8)
    ]
    scores = dict(Scorer(runner).score(windows))
    for i, end in enumerate((LIMIT - 2, LIMIT + 8)):
        with torch.inference_mode():
            rows = model(torch.tensor([text[:end]]), use_cache=False).logits[0, 30:].float().log_softmax(-1)
        right = rows.gather(1, torch.tensor(text[31 : end + 1])[:, None]).sum()
        assert scores[i].logprob == pytest.approx(float(right), abs=1e-2)
    runner.release()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_right_whatever_the_way(data: st.DataObject) -> None:
    """Random models, lengths, chunks, orders, contexts, forks and budgets."""
    name = data.draw(st.sampled_from(list(CONFIGS)), "model")
    model, text = MODELS[name], tokens_of(100, data.draw(st.integers(0, 3), "text"))
    batched = data.draw(st.integers(4, 70), "tokens of a step")
    memory = data.draw(st.sampled_from([40 << 10, 64 << 10, 4 << 20]), "budget")
    lengths = data.draw(st.lists(st.integers(1, LIMIT + 30), min_size=1, max_size=5), "prompts")
    with Engine(
        model, recipe="raw,block=4", kv_memory=memory, check=False, max_batched_tokens=batched, max_sequences=4
    ) as engine:
        shared = data.draw(st.none() | st.integers(1, LIMIT + 10), "context") if memory > 1 << 20 else None
        context = None if shared is None else engine.add_context(text[:shared])
        for length in lengths:
            apart = data.draw(st.booleans(), "another text")
            n, count = data.draw(st.sampled_from([1, 1, 3]), "n"), data.draw(st.integers(1, 14), "tokens")
            params = SamplingParams(max_tokens=count, temperature=1.0, seed=length, n=n, logprobs=0)
            if context is not None and shared is not None and data.draw(st.booleans(), "from the context"):
                engine.add_request(text[shared : max(shared + 1, length)], params, context=context)
            else:
                engine.add_request(tokens_of(length, 99) if apart else text[:length], params)
            for _ in range(data.draw(st.integers(0, 6), "steps before the next")):
                engine.step() if engine.has_unfinished() else None
        drain_and_check(engine, model)


def drain_and_check(engine: Engine, model: PreTrainedModel) -> None:
    for output in drain(engine).values():
        assert output.error is None
        check(model, output, likeliest=False)


@pytest.mark.parametrize("name", ["phi3", "llama", "gemma3", "dynamic"])
@pytest.mark.parametrize(("length", "batched"), [(LIMIT - 6, 8), (LIMIT + 5, 4), (LIMIT + 27, 20)])
def test_a_packed_cache_is_off_by_its_rounding_alone(name: str, length: int, batched: int) -> None:
    """In parts, over the limit, and behind a prefix that other requests have left."""
    model, text = MODELS[name], tokens_of(length, 7)
    with engine_of(model, recipe="int8,block=8,recent=8", max_batched_tokens=batched, max_sequences=2) as engine:
        engine.generate([text[:24]], greedy(2), progress=False)
        (output,) = engine.generate([text], greedy(12), progress=False)
        assert engine.stats()["rope_rereads"] == (name in READ_AGAIN and length <= LIMIT)
    check(model, output, likeliest=False, tolerance=0.15)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_check_at_load_knows_of_the_limit(name: str) -> None:
    """Both faces take a model whose limit lies among the few tokens of the check."""
    model = rotary_model(name, limit=6)
    with engine_of(model, check=True, max_batched_tokens=4, max_sequences=2) as engine:
        assert engine.generate([tokens_of(10)], greedy(2), progress=False)[0].error is None
    KVCache(model)
