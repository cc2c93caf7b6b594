"""The engine for asyncio: one worker thread steps it, coroutines wait for their own requests only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias, TypeVar, Unpack, overload

from transformers import PreTrainedModel

from kvfold.engine.batch import Asked, asked, in_order, naming, raise_error
from kvfold.engine.chat import ChatOptions, Conversation, as_chats, is_conversation
from kvfold.engine.contexts import Context
from kvfold.engine.engine import Engine
from kvfold.engine.progress import ProgressLine
from kvfold.engine.request import Prompt, RequestOutput, SamplingParams, StreamChunk
from kvfold.errors import RequestError

__all__ = ["AsyncEngine"]

T = TypeVar("T")
Item: TypeAlias = "StreamChunk | RequestOutput | BaseException"
Inbox: TypeAlias = "asyncio.Queue[Item]"

_GLANCE: Final = 0.2
"""Seconds between two looks at the progress of a `generate` that shows it."""


class AsyncEngine:
    """An `Engine` for the coroutines of one event loop: the same methods with the same parameters, as coroutines;
    `stream` is an asynchronous iterator.

    A worker thread steps as long as there are requests; between steps it lets other calls in. A task that is cancelled
    while it waits aborts its requests. An error that ends the engine's step is raised by every call that waits.
    """

    def __init__(self, engine: Engine | PreTrainedModel | str | Path, **options: Any) -> None:
        """``engine``: one that nothing else uses; or a model, with the ``options`` of `Engine`."""
        self.engine = engine if isinstance(engine, Engine) else Engine(engine, **options)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvfold-engine")
        self._inboxes: dict[str, Inbox] = {}  # of the requests that have not ended
        self._stepping: asyncio.Task[None] | None = None
        self._visitors = 0  # calls under way: the worker pauses for them
        self._outbox: list[tuple[str, Item]] = []  # worker thread only
        self._numbered = 0
        self._closed = False
        self._shut = False

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_id: str | Sequence[str] | None = None,
        salt: bytes = b"",
        context: Context | None = None,
        progress: bool = True,
        raise_errors: bool = True,
    ) -> list[RequestOutput]:
        """Completions of ``prompts`` (one, or several), in their order: see `Engine.generate`.

        Other calls go on meanwhile, and their requests share the steps.
        """
        requests = asked(prompts, params, request_id)
        done: dict[str, RequestOutput] = {}
        self._refuse_if_closed()
        line = ProgressLine(len(requests), enabled=progress)
        async with self._shown(line, done), self._under_way(requests, salt, context) as (ids, inbox):
            while len(done) < len(ids):
                item = await inbox.get()
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, RequestOutput):
                    done[item.request_id] = item
        return in_order(ids, done, raise_errors=raise_errors)

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        salt: bytes = b"",
        context: Context | None = None,
        raise_errors: bool = True,
    ) -> AsyncGenerator[StreamChunk, None]:
        """The completion of ``prompt`` as it grows: see `Engine.stream`. The request begins with the first chunk that
        is asked for; a refusal (RequestError) is raised there. Closing it (``aclose``) aborts the request.
        """
        one = [Asked(prompt, params, request_id, "the prompt")]
        async with self._under_way(one, salt, context, streamed=True) as (_, inbox):
            final = None
            while final is None:
                item = await inbox.get()
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, StreamChunk):
                    yield item
                    final = item.final
        if raise_errors:
            raise_error(final)

    @overload
    async def chat(
        self, messages: Conversation, params: SamplingParams | None = None, **options: Unpack[ChatOptions]
    ) -> RequestOutput: ...

    @overload
    async def chat(
        self,
        messages: Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]: ...

    async def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_id: str | Sequence[str] | None = None,
        salt: bytes = b"",
        progress: bool = True,
        raise_errors: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """The model's next turn in a conversation, or in several: see `Engine.chat`."""
        chats = as_chats(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        outputs = await self.generate(
            chats, params, request_id=request_id, salt=salt, progress=progress, raise_errors=raise_errors
        )
        return outputs[0] if is_conversation(messages) else outputs

    async def add_context(self, text: Prompt, *, salt: bytes = b"") -> Context:
        """Reads a context now, for requests to begin with: see `Engine.add_context`. Requests under way wait for it."""
        return await self._visit(partial(self.engine.add_context, text, salt=salt))

    async def remove_context(self, context: Context) -> None:
        """Lets go of a context: see `Engine.remove_context`."""
        await self._visit(partial(self.engine.remove_context, context))

    async def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; what there is of it. The call that waits for it gets that too. None if it is not (any
        more) under way.
        """
        return await self._visit(partial(self._abort, request_id, asyncio.get_running_loop()))

    async def capacity_report(self) -> str:
        """How much the cache holds, in one line."""
        return await self._visit(self.engine.capacity_report)

    async def reset_prefix_cache(self) -> None:
        """Forgets what was computed so far: see `Engine.reset_prefix_cache`."""
        await self._visit(self.engine.reset_prefix_cache)

    async def stats(self) -> dict[str, int | float | None]:
        """Counts since the start, and where the memory is now: see `Engine.stats`."""
        return await self._visit(self.engine.stats)

    async def close(self) -> None:
        """Abort what is under way, end the thread, and leave the model as it was. Closing twice is no error."""
        if self._closed:
            return
        self._closed = True
        self._visitors += 1  # for good: the worker steps no more
        if self._stepping is not None:
            await asyncio.wait([self._stepping])
        await asyncio.get_running_loop().run_in_executor(self._worker, self.engine.close)
        self._shut = True
        self._worker.shutdown()
        for inbox in self._inboxes.values():
            inbox.put_nowait(RequestError("the engine was closed before the request had ended"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # -- on the event loop

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RequestError("the engine is closed")

    @asynccontextmanager
    async def _under_way(
        self, requests: Sequence[Asked], salt: bytes, context: Context | None, *, streamed: bool = False
    ) -> AsyncIterator[tuple[list[str], Inbox]]:
        """New requests: their ids, and the inbox where what they give arrives. Those that have not ended when it is
        left are aborted.
        """
        self._refuse_if_closed()
        inbox: Inbox = asyncio.Queue()
        ids: list[str] = []
        adds = []
        try:
            for prompt, params, wanted, name in requests:
                ids.append(self._register(wanted, inbox))
                sink = partial(self._post, ids[-1]) if streamed else None
                add = partial(self.engine.add_request, salt=salt, context=context)
                adds.append(naming(name)(partial(add, prompt, params, request_id=ids[-1], on_chunk=sink)))
            await self._visit(lambda: [add() for add in adds])
            self._keep_stepping()
            yield ids, inbox
        finally:
            left = [request_id for request_id in ids if self._inboxes.get(request_id) is inbox]
            if self._closed:
                self._forget(left, inbox)
            elif left:
                # Shielded: it has to happen although this task is being cancelled. Until then the ids are taken, or
                # the next request of such an id would get what there is of this one.
                loop = asyncio.get_running_loop()
                aborting = asyncio.ensure_future(self._visit(lambda: [self._abort(each, loop) for each in left]))
                aborting.add_done_callback(lambda _: self._forget(left, inbox))
                await asyncio.shield(aborting)

    def _register(self, request_id: str | None, inbox: Inbox) -> str:
        """The id of a new request, which is taken from now on."""
        while request_id is None:
            if (number := f"async-{self._numbered}") not in self._inboxes:
                request_id = number
            self._numbered += 1
        if request_id in self._inboxes:
            raise RequestError(f"request id {request_id!r}", why="a request of this id is under way")
        self._inboxes[request_id] = inbox
        return request_id

    def _forget(self, ids: Sequence[str], inbox: Inbox) -> None:
        for request_id in ids:
            if self._inboxes.get(request_id) is inbox:
                del self._inboxes[request_id]

    @asynccontextmanager
    async def _shown(self, line: ProgressLine, done: Mapping[str, RequestOutput]) -> AsyncIterator[None]:
        """Keeps ``line`` up to date as long as it lasts, if it is shown at all."""
        if not line.enabled:
            yield
            return

        async def decoded() -> int:
            return int((await self.stats())["decode_tokens"] or 0)

        begun = await decoded()

        async def look() -> None:
            line.update(len(done), await decoded() - begun)

        async def watch() -> None:
            while True:
                await asyncio.sleep(_GLANCE)
                await look()

        watching = asyncio.create_task(watch())
        try:
            yield
            await look()
        finally:
            watching.cancel()
            line.close()

    async def _visit(self, call: Callable[[], T]) -> T:
        """Run ``call`` on the worker thread, between two steps; when that has ended, here."""
        if self._shut:
            return call()
        self._visitors += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, call)
        finally:
            self._visitors -= 1

    def _keep_stepping(self) -> None:
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.get_running_loop().create_task(self._step_on())
            # Its error is raised where its requests are waited for; asyncio need not complain about it too.
            self._stepping.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _step_on(self) -> None:
        """Keep the worker stepping while there is anything to do; all that wait get its error."""
        loop = asyncio.get_running_loop()
        try:
            while not self._closed and await loop.run_in_executor(self._worker, self._steps, loop):
                await asyncio.sleep(0)  # calls that wait to get in are in the worker's queue by then
        except BaseException as error:
            for inbox in set(self._inboxes.values()):
                inbox.put_nowait(error)
            raise

    def _deliver(self, mail: list[tuple[str, Item]]) -> None:
        for request_id, item in mail:
            inbox = self._inboxes.get(request_id)
            if inbox is not None:
                inbox.put_nowait(item)
                if isinstance(item, RequestOutput) or (isinstance(item, StreamChunk) and item.final is not None):
                    del self._inboxes[request_id]

    # -- on the worker thread

    def _post(self, request_id: str, item: StreamChunk | RequestOutput) -> None:
        self._outbox.append((request_id, item))

    def _steps(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Step until a call waits to get in, or nothing is left; whether anything is."""
        while self.engine.has_unfinished():
            for output in self.engine.step():
                self._post(output.request_id, output)
            self._send(loop)
            if self._visitors:
                return True
        return False

    def _abort(self, request_id: str, loop: asyncio.AbstractEventLoop) -> RequestOutput | None:
        output = self.engine.abort(request_id)
        if output is not None:
            self._post(request_id, output)
        self._send(loop)
        return output

    def _send(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._outbox:
            mail, self._outbox = self._outbox, []
            loop.call_soon_threadsafe(self._deliver, mail)
