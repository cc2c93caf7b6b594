"""`Engine` and `AsyncEngine` have the same methods, with the same parameters, and give the same outputs."""

from __future__ import annotations

import asyncio
import inspect
import io
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvfold.engine import AsyncEngine, Chat, Engine, RequestOutput, SamplingParams, progress
from kvfold.errors import NumericsError, RequestError
from tests.engine.tiny_engine import assert_idle, byte_tokenizer, prompts_of, tiny_model

BY_HAND = {"add_request", "step", "has_unfinished"}
"""Only of `Engine`: who steps by hand calls these; `AsyncEngine` steps by itself."""

CHAT = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
SAMPLED = SamplingParams(n=2, max_tokens=12, temperature=1.0, seed=3, ignore_eos=True, logprobs=1)
ENDLESS = SamplingParams(max_tokens=400, ignore_eos=True)
BROKEN = 9
"""The token whose embedding is NaN in `broken`."""


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return tiny_model()


@pytest.fixture(scope="module")
def broken() -> Any:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[BROKEN] = float("nan")
    return model


def methods(face: type) -> dict[str, Any]:
    """The public methods of a class."""
    return {name: value for name, value in vars(face).items() if not name.startswith("_") and callable(value)}


def new_engine(model: Any) -> Engine:
    return Engine(model, tokenizer=byte_tokenizer(), recipe="raw,block=8", kv_memory="2MiB", check=False, seed=5)


class Face:
    """Calls a method of one of the faces, and waits for what it gives; an iterator is read to its end."""

    def __init__(self, model: Any, *, asynchronous: bool) -> None:
        self.loop = asyncio.new_event_loop()
        self.engine = new_engine(model)
        self.face: Any = AsyncEngine(self.engine) if asynchronous else self.engine

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        found = getattr(self.face, name)(*args, **options)
        if isinstance(found, AsyncIterator):
            return self.loop.run_until_complete(_read(found))
        if isinstance(found, Iterator):
            return list(found)
        return self.loop.run_until_complete(found) if isinstance(found, Awaitable) else found

    def close(self) -> None:
        self.call("close")
        assert_idle(self.engine)
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


async def _read(found: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in found]


@pytest.fixture(params=[False, True], ids=["Engine", "AsyncEngine"])
def new_face(request: pytest.FixtureRequest) -> Iterator[Callable[[Any], Face]]:
    """Makes the one face or the other; afterwards it is closed, and nothing may be left."""
    made: list[Face] = []

    def make(model: Any) -> Face:
        made.append(Face(model, asynchronous=request.param))
        return made[-1]

    yield make
    for face in made:
        face.close()


def same(outputs: Any) -> Any:
    """Outputs or chunks without what may differ: ids of requests."""
    if isinstance(outputs, list):
        return [same(output) for output in outputs]
    final = getattr(outputs, "final", None)
    return replace(outputs, request_id="", **({"final": same(final)} if final is not None else {}))


def on_both(model: Any, use: Callable[[Face], Any]) -> list[Any]:
    """What ``use`` gives with a new engine of each face; nothing may be left."""
    found = []
    for asynchronous in (False, True):
        face = Face(model, asynchronous=asynchronous)
        try:
            found.append(use(face))
        finally:
            face.close()
    return found


# == the same methods


def test_both_have_the_same_methods() -> None:
    assert set(methods(Engine)) - BY_HAND == set(methods(AsyncEngine))
    assert set(methods(Engine)) >= BY_HAND | {"generate", "stream", "chat", "add_context", "remove_context", "abort"}


def test_the_methods_have_the_same_signatures() -> None:
    for name, of_async in methods(AsyncEngine).items():
        of_sync = getattr(Engine, name)
        mine, theirs = inspect.signature(of_sync), inspect.signature(of_async)
        assert list(mine.parameters.values()) == list(theirs.parameters.values()), name
        if inspect.isasyncgenfunction(of_async):
            assert mine.return_annotation == "Generator[StreamChunk, None, None]", name
            assert theirs.return_annotation == "AsyncGenerator[StreamChunk, None]", name
        else:
            assert inspect.iscoroutinefunction(of_async), name
            assert mine.return_annotation == theirs.return_annotation, name


# == the same outputs


def test_the_same_requests_give_the_same_outputs(model: Any) -> None:
    prompts: list[Any] = [*prompts_of(5, 40, 17), "A text", CHAT]
    params = [SAMPLED, *[SamplingParams(max_tokens=9)] * 3, SamplingParams(max_tokens=20, temperature=0.9)]

    def use(face: Face) -> Any:
        many = face.call("generate", prompts, params)
        one = face.call("generate", "A text", SamplingParams(max_tokens=9))
        assert one[0].token_ids == many[3].token_ids
        assert face.call("generate", []) == []
        streamed = face.call("stream", prompts[0], SAMPLED)
        tokens = [output.token_ids for output in streamed[-1].final.outputs]
        assert tokens == [output.token_ids for output in many[0].outputs]
        return same(many), same(one), same(streamed), face.call("capacity_report"), set(face.call("stats"))

    of_sync, of_async = on_both(model, use)
    assert of_sync == of_async


def test_contexts_and_salts_are_the_same(model: Any) -> None:
    text, params = prompts_of(40)[0], SamplingParams(max_tokens=6)

    def use(face: Face) -> Any:
        context = face.call("add_context", text, salt=b"a")
        outputs = face.call("generate", [[5, 6], [7]], params, salt=b"a", context=context)
        chunks = face.call("stream", [5, 6], params, salt=b"a", context=context)
        assert chunks[-1].final.token_ids == outputs[0].token_ids
        assert [output.prompt_token_ids for output in outputs] == [[*text, 5, 6], [*text, 7]]
        with pytest.raises(RequestError, match="context"):
            face.call("generate", [5], params, salt=b"b", context=context)
        with pytest.raises(RequestError, match="context"):
            face.call("stream", [5], params, context=context)
        face.call("remove_context", context)
        with pytest.raises(RequestError, match="context"):
            face.call("remove_context", context)
        first = face.call("generate", [text], params, salt=b"c")
        other = face.call("generate", [text], params, salt=b"d")
        again = face.call("generate", [text], params, salt=b"c")
        assert [out[0].num_cached_tokens > 0 for out in (first, other, again)] == [False, False, True]
        return same([*outputs, *first, *other, *again])

    of_sync, of_async = on_both(model, use)
    assert of_sync == of_async


def test_chats_are_the_same(model: Any) -> None:
    params = SamplingParams(max_tokens=7)

    def use(face: Face) -> Any:
        answer = face.call("chat", CHAT, params)
        assert isinstance(answer, RequestOutput)
        assert face.call("generate", [CHAT], params)[0].token_ids == answer.token_ids
        answers = face.call("chat", [CHAT, CHAT[1:]], [params, SamplingParams(max_tokens=2)])
        assert [len(output.token_ids) for output in answers] == [7, 2]
        assert answers[0].token_ids == answer.token_ids
        options = {"add_generation_prompt": False, "chat_template_kwargs": {"mark": "!"}}
        plain = face.call("chat", CHAT, params, **options, chat_template="{{ messages[1].content }}{{ mark }}")
        return same([answer, *answers, plain])

    of_sync, of_async = on_both(model, use)
    assert of_sync == of_async
    tokenizer = byte_tokenizer()
    assert of_sync[0].prompt_token_ids == tokenizer.encode("system:be short\nuser:hi\n", add_special_tokens=False)
    assert of_sync[-1].prompt_token_ids == tokenizer.encode("hi!", add_special_tokens=False)


# == options of a chat

ROLES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}</{{ m.role }}>{% endif %}{% endfor %}"
    "{% if not continue_final_message %}</{{ messages[-1].role }}>{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the first role must be user') }}{% endif %}x"


def prompt_of(face: Face, messages: Any, **options: Any) -> str:
    output = face.call("chat", messages, SamplingParams(max_tokens=1), **options)
    return str(byte_tokenizer().decode(output.prompt_token_ids))


def test_a_chat_takes_the_options_of_the_template(model: Any, new_face: Callable[[Any], Face]) -> None:
    face = new_face(model)
    asked = [{"role": "user", "content": "hi"}]
    begun = [*asked, {"role": "assistant", "content": "well"}]
    assert prompt_of(face, asked, chat_template=ROLES) == "<user>hi</user><assistant>"
    assert prompt_of(face, asked, chat_template=ROLES, add_generation_prompt=False) == "<user>hi</user>"
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert prompt_of(face, begun, chat_template=ROLES, **options) == "<user>hi</user><assistant>well"
    chunks = face.call("stream", Chat(begun, chat_template=ROLES, **options), SamplingParams(max_tokens=1))
    assert byte_tokenizer().decode(chunks[-1].final.prompt_token_ids) == "<user>hi</user><assistant>well"


def test_a_bad_chat_is_refused(model: Any, new_face: Callable[[Any], Face]) -> None:
    face = new_face(model)
    for wrong, message in (
        ([], "no messages"),
        ([CHAT, []], "no messages"),
        ("hi", "messages"),
        (["hi"], "messages"),
        ([{"content": "hi"}], "role"),
        ([CHAT, [{"content": "hi"}]], "role"),
        ([5, 6], "messages"),
    ):
        with pytest.raises(RequestError, match=message):
            face.call("chat", wrong)
    with pytest.raises(RequestError, match="add_generation_prompt=False"):
        face.call("chat", CHAT, continue_final_message=True)
    with pytest.raises(RequestError, match="first role must be user"):
        face.call("chat", CHAT, chat_template=STRICT)
    with pytest.raises(RequestError, match="1 sampling parameters for 2 prompts"):
        face.call("chat", [CHAT, CHAT], [SamplingParams()])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    face.engine._intake._tokenizer = tokenizer
    with pytest.raises(RequestError, match="no chat template"):
        face.call("chat", CHAT)
    face.engine._intake._tokenizer = None
    with pytest.raises(RequestError, match="no tokenizer"):
        face.call("chat", CHAT)


# == errors, ids, aborting


def test_an_error_of_one_request_leaves_the_others_alone(broken: Any, new_face: Callable[[Any], Face]) -> None:
    face, params = new_face(broken), SamplingParams(max_tokens=5)
    with pytest.raises(NumericsError):
        face.call("generate", [[5, 6], [BROKEN]], params)
    good, bad = face.call("generate", [[5, 6], [BROKEN]], params, raise_errors=False)
    assert good.error is None
    assert len(good.token_ids) == 5
    assert isinstance(bad.error, NumericsError)
    assert bad.finish_reason == "error"
    with pytest.raises(NumericsError):
        face.call("stream", [BROKEN], params)
    last = face.call("stream", [BROKEN], params, raise_errors=False)[-1]
    assert isinstance(last.final.error, NumericsError)


def test_a_refusal_stops_the_call_and_leaves_nothing(model: Any, new_face: Callable[[Any], Face]) -> None:
    face = new_face(model)
    with pytest.raises(RequestError, match="empty prompt"):
        face.call("generate", [[5, 6], []], ENDLESS)
    assert_idle(face.engine)
    with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
        face.call("generate", [[5, 6]], [ENDLESS, ENDLESS])
    with pytest.raises(RequestError, match="2 request ids for 1 prompts"):
        face.call("generate", [[5, 6]], ENDLESS, request_id=["a", "b"])
    with pytest.raises(RequestError, match="under way"):
        face.call("generate", [[5, 6], [7]], ENDLESS, request_id=["a", "a"])
    assert_idle(face.engine)


def test_ids_are_the_callers(model: Any, new_face: Callable[[Any], Face]) -> None:
    face, params = new_face(model), SamplingParams(max_tokens=2)
    outputs = face.call("generate", [[5], [6]], params, request_id=["a", "b"])
    assert [output.request_id for output in outputs] == ["a", "b"]
    assert face.call("generate", [5], params, request_id="a")[0].request_id == "a"
    assert {chunk.request_id for chunk in face.call("stream", [5], params, request_id="a")} == {"a"}
    assert face.call("chat", CHAT, params, request_id="a").request_id == "a"
    assert face.call("abort", "a") is None


def test_a_request_of_generate_that_is_aborted_gives_what_there_is(
    model: Any, new_face: Callable[[Any], Face], monkeypatch: pytest.MonkeyPatch
) -> None:
    face = new_face(model)
    step, found = face.engine.step, []

    def step_and_abort() -> list[RequestOutput]:
        ended = step()
        if "mine" in face.engine._core.requests and not found:
            found.append(face.call("abort", "mine") if face.face is face.engine else _abort(face))
        return ended

    def _abort(face: Face) -> Any:
        face.loop.call_soon_threadsafe(lambda: asyncio.ensure_future(face.face.abort("mine"), loop=face.loop))
        return None

    monkeypatch.setattr(face.engine, "step", step_and_abort)
    (output,) = face.call("generate", [5, 6], ENDLESS, request_id="mine")
    assert output.finish_reason == "abort"
    assert 0 < len(output.token_ids) < 400


def test_a_closed_engine_refuses(model: Any, new_face: Callable[[Any], Face]) -> None:
    face = new_face(model)
    face.call("close")
    face.call("close")
    for name, *args in (("generate", [5]), ("stream", [5]), ("chat", CHAT), ("add_context", [5])):
        with pytest.raises(RequestError, match="closed"):
            face.call(name, *args)
    assert face.call("abort", "mine") is None
    assert face.call("stats")["running"] == 0
    assert face.call("capacity_report").startswith("KV cache")


def test_progress_is_shown_where_it_is_asked_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setattr(progress, "_PAUSE", 0.0)

    def use(face: Face) -> None:
        for wanted in (True, False):
            monkeypatch.setattr(sys, "stderr", terminal := Terminal())
            face.call("generate", [[5, 6], [7]], SamplingParams(max_tokens=40, ignore_eos=True), progress=wanted)
            assert ("2/2 requests, 78 tokens" in terminal.getvalue()) is wanted

    on_both(model, use)


# == many tasks at once


def serve(model: Any, test: Callable[[AsyncEngine], Coroutine[Any, Any, None]]) -> None:
    """Runs ``test`` with an engine; afterwards nothing may be left."""

    async def main() -> None:
        engine = new_engine(model)
        async with AsyncEngine(engine) as served:
            await test(served)
        assert_idle(engine)

    asyncio.run(asyncio.wait_for(main(), 60))


def test_calls_at_the_same_time_give_what_they_give_alone(model: Any) -> None:
    prompts, params = prompts_of(5, 40, 17, 60), SamplingParams(max_tokens=20)
    with new_engine(model) as engine:
        wanted = [output.token_ids for output in engine.generate(prompts, params)]
        chatted = engine.chat(CHAT, params).token_ids

    async def test(engine: AsyncEngine) -> None:
        async def stream(prompt: list[int]) -> list[int]:
            return [token async for chunk in engine.stream(prompt, params) for token in chunk.token_ids]

        async def whole(prompts: list[list[int]]) -> list[list[int]]:
            return [output.token_ids for output in await engine.generate(prompts, params)]

        streams = asyncio.gather(*map(stream, prompts))
        found = await asyncio.gather(whole(prompts[:2]), whole(prompts[2:]), engine.chat(CHAT, params), streams)
        assert found[0] + found[1] == found[3] == wanted
        assert found[2].token_ids == chatted

    serve(model, test)


def test_a_cancelled_generate_aborts_all_its_requests(model: Any) -> None:
    async def test(engine: AsyncEngine) -> None:
        task = asyncio.create_task(engine.generate([[5, 6], [7, 8], [9]], ENDLESS))
        while len(engine.engine._core.requests) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine.engine.has_unfinished()
        assert not engine._inboxes

    serve(model, test)


def test_a_context_in_use_is_not_removed(model: Any) -> None:
    async def test(engine: AsyncEngine) -> None:
        context = await engine.add_context(prompts_of(40)[0])
        chunks = engine.stream([5], SamplingParams(max_tokens=300, ignore_eos=True), context=context)
        async for _ in chunks:
            with pytest.raises(RequestError, match="in use"):
                await engine.remove_context(context)
            break
        await chunks.aclose()
        await engine.remove_context(context)

    serve(model, test)
