"""The engine for asyncio: one worker thread steps it, coroutines wait for their own request only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from transformers import PreTrainedModel

from kvfold.engine.engine import Engine
from kvfold.engine.request import Prompt, RequestOutput, SamplingParams, StreamChunk
from kvfold.errors import RequestError

__all__ = ["AsyncEngine"]

T = TypeVar("T")
Mail = tuple[str, "StreamChunk | RequestOutput | BaseException"]


class AsyncEngine:
    """An `Engine` for coroutines of one event loop.

    The worker thread steps as long as there are requests; between steps it lets additions and aborts in. A task that is
    cancelled while it waits aborts its request. An error that ends the engine's step reaches everyone who waits.
    """

    def __init__(self, engine: Engine | PreTrainedModel | str | Path, **options: Any) -> None:
        """``engine``: one that nobody else uses; or a model, with the ``options`` of `Engine`."""
        self.engine = engine if isinstance(engine, Engine) else Engine(engine, **options)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvfold-engine")
        self._inboxes: dict[str, asyncio.Queue[StreamChunk | RequestOutput | BaseException]] = {}
        self._stepping: asyncio.Task[None] | None = None
        self._visitors = 0  # additions and aborts under way: the worker pauses for them
        self._outbox: list[Mail] = []  # worker thread only
        self._numbered = 0
        self._closed = False

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        salt: bytes = b"",
    ) -> AsyncIterator[StreamChunk]:
        """The completion of ``prompt`` as it grows; the last chunk's ``final`` is the whole output.

        An error of the request (NumericsError) is raised after the chunks before it; a refusal (RequestError) at the
        first.
        """
        async with aclosing(self._receive(prompt, params, request_id, salt, streamed=True)) as items:
            async for item in items:
                if isinstance(item, StreamChunk):
                    yield item
                    if item.final is not None:
                        _raise_error(item.final)
                        return

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        salt: bytes = b"",
    ) -> RequestOutput:
        """The whole output of ``prompt``: cheaper than `generate`, as no text is made on the way."""
        async with aclosing(self._receive(prompt, params, request_id, salt, streamed=False)) as items:
            async for item in items:
                if isinstance(item, RequestOutput):
                    _raise_error(item)
                    return item
        raise RequestError("the engine is closed")

    async def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; what there is of it. Whoever waits for it gets that too. None if it is not under way."""
        if self._closed:
            return None  # closing aborts everything
        return await self._visit(partial(self._abort, request_id, asyncio.get_running_loop()))

    async def close(self) -> None:
        """Abort what is under way, end the thread, and leave the model as it was. Closing twice is no error."""
        if self._closed:
            return
        self._closed = True
        self._visitors += 1  # for good: the worker steps no more
        if self._stepping is not None:
            await asyncio.wait([self._stepping])
        await asyncio.get_running_loop().run_in_executor(self._worker, self.engine.close)
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

    async def _receive(
        self, prompt: Prompt, params: SamplingParams | None, request_id: str | None, salt: bytes, *, streamed: bool
    ) -> AsyncGenerator[StreamChunk | RequestOutput, None]:
        """What arrives for a new request, which is aborted if nobody waits for it any more."""
        if self._closed:
            raise RequestError("the engine is closed")
        if request_id is None:
            request_id = f"async-{self._numbered}"
            self._numbered += 1
        if request_id in self._inboxes:
            raise RequestError(f"request id {request_id!r}", why="a request of this id is under way")
        inbox = self._inboxes[request_id] = asyncio.Queue()
        sink = partial(self._post, request_id) if streamed else None
        add = partial(self.engine.add_request, prompt, params, request_id=request_id, salt=salt, on_chunk=sink)
        ended = False
        try:
            await self._visit(add)
            self._keep_stepping()
            while True:
                item = await inbox.get()
                if isinstance(item, BaseException):
                    raise item
                ended = isinstance(item, RequestOutput) or item.final is not None
                yield item
        finally:
            if ended or self._closed:
                del self._inboxes[request_id]
            else:
                # Shielded: it has to happen although this task is being cancelled. Until then the id is taken, or who
                # takes it next would get what there is of this request.
                aborting = asyncio.ensure_future(self.abort(request_id))
                aborting.add_done_callback(lambda _: self._inboxes.pop(request_id))
                await asyncio.shield(aborting)

    async def _visit(self, call: Callable[[], T]) -> T:
        """Run ``call`` on the worker thread, between two steps."""
        self._visitors += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, call)
        finally:
            self._visitors -= 1

    def _keep_stepping(self) -> None:
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.get_running_loop().create_task(self._step_on())
            # Its error is told to those who wait; asyncio need not complain about it too.
            self._stepping.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _step_on(self) -> None:
        """Keep the worker stepping while there is anything to do; its error is everybody's."""
        loop = asyncio.get_running_loop()
        try:
            while not self._closed and await loop.run_in_executor(self._worker, self._steps, loop):
                await asyncio.sleep(0)  # those who wait to get in are in the worker's queue by then
        except BaseException as error:
            for inbox in self._inboxes.values():
                inbox.put_nowait(error)
            raise

    def _deliver(self, mail: list[Mail]) -> None:
        for request_id, item in mail:
            inbox = self._inboxes.get(request_id)
            if inbox is not None:
                inbox.put_nowait(item)

    # -- on the worker thread

    def _post(self, request_id: str, item: StreamChunk | RequestOutput) -> None:
        self._outbox.append((request_id, item))

    def _steps(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Step until somebody wants to get in, or nothing is left; whether anything is."""
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


def _raise_error(output: RequestOutput) -> None:
    if output.error is not None:
        raise output.error
