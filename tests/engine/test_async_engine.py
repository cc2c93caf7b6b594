"""The asynchronous engine: many tasks, one worker; cancellation and errors reach whom they concern."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import torch

from kvfold.engine import AsyncEngine, Engine, SamplingParams
from kvfold.errors import NumericsError, RequestError
from tests.engine.tiny_engine import assert_idle, byte_tokenizer, expected, prompts_of, tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return tiny_model()


def serve(model: Any, test: Callable[[AsyncEngine], Coroutine[Any, Any, None]]) -> None:
    """Runs ``test`` with an engine; afterwards nothing may be left."""

    async def main() -> None:
        engine = Engine(model, tokenizer=byte_tokenizer(), recipe="raw,block=8", kv_memory="2MiB", check=False)
        async with AsyncEngine(engine) as served:
            await test(served)
        assert_idle(engine)

    asyncio.run(asyncio.wait_for(main(), 60))


ENDLESS = SamplingParams(max_tokens=400, ignore_eos=True)


def test_many_tasks_get_their_own_tokens(model: Any) -> None:
    prompts = prompts_of(5, 40, 17, 60, 8)

    async def test(engine: AsyncEngine) -> None:
        async def stream(prompt: list[int]) -> list[int]:
            chunks = [chunk async for chunk in engine.stream(prompt, SamplingParams(max_tokens=20))]
            assert chunks[-1].final is not None
            tokens = [token for chunk in chunks for token in chunk.token_ids]
            assert tokens == chunks[-1].final.token_ids
            assert "".join(chunk.text_delta for chunk in chunks) == chunks[-1].final.text
            return tokens

        async def whole(prompt: list[int]) -> list[int]:
            return (await engine.generate(prompt, SamplingParams(max_tokens=20)))[0].token_ids

        found = await asyncio.gather(*map(stream, prompts), *map(whole, prompts))
        wanted = [expected(model, prompt, 20) for prompt in prompts]
        assert found == wanted + wanted

    serve(model, test)


def test_a_cancelled_task_aborts_its_request(model: Any) -> None:
    async def test(engine: AsyncEngine) -> None:
        seen = asyncio.Event()

        async def watch() -> None:
            async for _ in engine.stream([5, 6], ENDLESS):
                seen.set()

        task, other = asyncio.create_task(watch()), asyncio.create_task(engine.generate([7, 8], ENDLESS))
        await seen.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(engine.engine._core.requests) <= 1
        other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other
        assert not engine.engine.has_unfinished()

    serve(model, test)


def test_the_id_of_a_cancelled_request_is_taken_until_it_is_gone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(engine: AsyncEngine) -> None:
        task = asyncio.create_task(engine.generate([5, 6], ENDLESS, request_id="x"))
        while not engine.engine._core.requests:
            await asyncio.sleep(0.001)
        step = engine.engine.step
        monkeypatch.setattr(engine.engine, "step", lambda: (time.sleep(0.05), step())[1])
        await asyncio.sleep(0.06)  # the worker is in a slow step, for which the abort has to wait
        task.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        with pytest.raises(RequestError, match="under way"):
            await engine.generate([7, 8], request_id="x")
        output = None
        while output is None:
            try:
                (output,) = await engine.generate([7, 8], SamplingParams(max_tokens=9), request_id="x")
            except RequestError:
                await asyncio.sleep(0)
        assert output.token_ids == expected(model, [7, 8], 9)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine._inboxes

    serve(model, test)


def test_leaving_the_loop_early_aborts(model: Any) -> None:
    async def test(engine: AsyncEngine) -> None:
        chunks = engine.stream([5, 6], ENDLESS)
        async for _ in chunks:
            break
        await chunks.aclose()
        assert not engine.engine.has_unfinished()

    serve(model, test)


@pytest.mark.parametrize("streamed", [True, False])
def test_abort_ends_the_waiting_with_what_there_is(model: Any, streamed: bool) -> None:
    async def test(engine: AsyncEngine) -> None:
        async def stream() -> Any:
            async for chunk in engine.stream([5, 6], ENDLESS, request_id="mine"):
                last = chunk
            return [last.final]

        waiting = stream() if streamed else engine.generate([5, 6], ENDLESS, request_id="mine")
        task = asyncio.create_task(waiting)
        while not engine.engine._core.requests:
            await asyncio.sleep(0.001)
        with pytest.raises(RequestError, match="under way"):
            await engine.generate([5], request_id="mine")
        aborted = await engine.abort("mine")
        assert await task == [aborted]
        assert aborted is not None
        assert aborted.finish_reason == "abort"
        assert await engine.abort("mine") is None

    serve(model, test)


def test_refusals_and_errors_reach_the_one_who_asked() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = float("nan")

    async def test(engine: AsyncEngine) -> None:
        good = asyncio.create_task(engine.generate([5, 6], SamplingParams(max_tokens=10)))
        with pytest.raises(RequestError, match="empty prompt"):
            await engine.generate([[]])
        with pytest.raises(RequestError, match="empty prompt"):
            async for _ in engine.stream([]):
                pass
        with pytest.raises(NumericsError):
            await engine.generate([9])
        with pytest.raises(NumericsError):
            async for _ in engine.stream([9]):
                pass
        assert (await good)[0].token_ids

    serve(model, test)


def test_an_error_of_the_step_reaches_everyone_and_the_engine_goes_on(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(engine: AsyncEngine) -> None:
        def broken(*_: object) -> None:
            raise RuntimeError("broken")

        with monkeypatch.context() as patch:
            patch.setattr(engine.engine._runner._packed, "forward", broken)
            tasks = [asyncio.create_task(engine.generate([5, i])) for i in (6, 7)]
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(error, RuntimeError)
        assert (await engine.generate([5, 6], SamplingParams(max_tokens=4)))[0].token_ids == expected(model, [5, 6], 4)

    serve(model, test)


def test_closing_ends_the_waiting_and_refuses_newcomers(model: Any) -> None:
    async def test(engine: AsyncEngine) -> None:
        task = asyncio.create_task(engine.generate([5, 6], ENDLESS))
        await asyncio.sleep(0.02)
        await engine.close()
        with pytest.raises(RequestError, match="closed"):
            await task
        with pytest.raises(RequestError, match="closed"):
            await engine.generate([5])
        assert await engine.abort("mine") is None
        await engine.close()

    serve(model, test)
