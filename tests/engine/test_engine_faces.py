"""The engine's faces: streams, log-probabilities, texts and chats, ids, statistics, budgets, closing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvfold.engine import Engine, SamplingParams
from kvfold.errors import RequestError
from tests.engine.tiny_engine import assert_idle, byte_tokenizer, drain, engine_of, prompts_of, tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def test_logprobs_are_reported(model: Any, tokenizer: Any) -> None:
    prompt = prompts_of(12)[0]
    with engine_of(model, tokenizer=tokenizer) as engine:
        output = engine.generate(prompt, SamplingParams(max_tokens=6, logprobs=2))[0].outputs[0]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids)
    for token, report, row in zip(output.token_ids, output.logprobs, logits.log_softmax(-1), strict=True):
        assert next(iter(report)) == token
        assert set(report) == set(row.topk(2).indices.tolist())
        assert report[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert report[token].decoded_token == tokenizer.decode([token])
    total = sum(report[token].logprob for token, report in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob == pytest.approx(total)


def test_texts_and_chats_are_prompts(model: Any, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "hi"}]
    with engine_of(model, tokenizer=tokenizer) as engine:
        outputs = engine.generate([chat, "hi", [3, 4]], SamplingParams(max_tokens=3))
        assert outputs[0].prompt_token_ids == tokenizer.encode("user:hi\n", add_special_tokens=False)
        assert outputs[1].prompt_token_ids == tokenizer.encode("hi")
        assert len(engine.generate(chat)) == len(engine.generate("hi")) == len(engine.generate([3, 4])) == 1
        tokenizer_without = byte_tokenizer()
        tokenizer_without.chat_template = None
        engine._intake._tokenizer = tokenizer_without
        with pytest.raises(RequestError, match="no chat template"):
            engine.add_request(chat)


def test_a_stream_is_the_text_in_pieces(model: Any, tokenizer: Any) -> None:
    params = SamplingParams(n=2, max_tokens=50, temperature=1.0, seed=1, ignore_eos=True, logprobs=0, stop=("qz",))
    with engine_of(model, tokenizer=tokenizer) as engine:
        bystander = engine.add_request([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True))
        chunks = list(engine.stream("A text", params))
        whole = engine.generate("A text", params)[0]
        assert [output.request_id for output in engine.step()] == [bystander]
        assert_idle(engine)
    final = chunks[-1].final
    assert final is not None
    assert [chunk.final for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    for index in (0, 1):
        mine = [chunk for chunk in chunks if chunk.index == index]
        completion = whole.outputs[index]
        assert "".join(chunk.text_delta for chunk in mine) == final.outputs[index].text == completion.text
        assert [token for chunk in mine for token in chunk.token_ids] == completion.token_ids
        assert [chunk.finish_reason for chunk in mine] == [None] * (len(mine) - 1) + [completion.finish_reason]
        assert [report for chunk in mine for report in chunk.logprobs or []] == final.outputs[index].logprobs


def test_a_stream_that_is_closed_aborts(model: Any) -> None:
    with engine_of(model) as engine:
        stream = engine.stream([5, 6, 7], SamplingParams(max_tokens=100, ignore_eos=True))
        next(iter(stream))
        assert engine.has_unfinished()
        stream.close()
        assert_idle(engine)
        engine.stream([5, 6, 7]).close()  # before the first chunk was asked for
        assert_idle(engine)
        with pytest.raises(RequestError):
            engine.stream([])


def test_a_stream_that_has_ended_leaves_a_later_request_of_its_id_alone(model: Any) -> None:
    with engine_of(model) as engine:
        stream = engine.stream([5, 6, 7], SamplingParams(max_tokens=1), request_id="mine")
        assert next(stream).final is not None
        engine.add_request([5], SamplingParams(max_tokens=2, ignore_eos=True), request_id="mine")
        stream.close()
        ended = drain(engine)
    assert len(ended["mine"].token_ids) == 2


def test_ids_are_unique_while_under_way(model: Any) -> None:
    with engine_of(model) as engine:
        assert engine.add_request([5], SamplingParams(max_tokens=2), request_id="0") == "0"
        with pytest.raises(RequestError, match="under way"):
            engine.add_request([5], request_id="0")
        assert engine.add_request([5], SamplingParams(max_tokens=2)) == "1"
        drain(engine)
        assert engine.add_request([5], SamplingParams(max_tokens=2), request_id="0") == "0"


def test_it_says_what_it_holds_and_what_it_did(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "kvfold.engine"), engine_of(model, max_length=256) as engine:
        assert "maximum concurrency for 256 tokens" in engine.capacity_report()
        assert engine.capacity_report() in caplog.text
        engine.generate(prompts_of(10, 20), SamplingParams(max_tokens=5, ignore_eos=True))
        stats = engine.stats()
    assert (stats["prefill_tokens"], stats["decode_tokens"], stats["finished_requests"]) == (30, 8, 2)
    assert stats["kv_budget_bytes"] == 4 * 2**20
    assert stats["kv_in_use_bytes"] == 0


def test_a_default_budget_holds_what_can_run_and_closing_ends_everything(model: Any) -> None:
    engine = Engine(model, max_sequences=2, recipe="int8", check=False)
    assert engine._runner.manager.concurrency(512) >= 2
    engine.add_request([5, 6])
    engine.step()
    engine.close()
    engine.close()
    assert_idle(engine)
    with pytest.raises(RequestError, match="closed"):
        engine.add_request([5])
    with pytest.raises(RequestError, match="max_length"):
        engine_of(model, max_length=513)


@pytest.mark.parametrize("recipe", ["raw", "int4"])
@pytest.mark.parametrize("chunk", [7, 512])
def test_a_default_budget_holds_one_full_context(model: Any, recipe: str, chunk: int) -> None:
    with Engine(model, max_sequences=1, recipe=recipe, max_batched_tokens=chunk, check=False) as engine:
        assert engine._intake._capacity.tokens == engine.context == 512
        cached = engine._runner.geometry.cache_bytes(engine.recipe, 4, [512 + chunk])
        assert engine.stats()["kv_budget_bytes"] < 2 * cached
