"""Stepping an engine until what a call waits for is there; what else ends meanwhile is kept for the next `step`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence

from kvfold.engine.batch import raise_error
from kvfold.engine.core import EngineCore
from kvfold.engine.progress import ProgressLine
from kvfold.engine.request import RequestOutput, StreamChunk

__all__ = ["run_all", "stream_chunks"]

Step = Callable[[], "list[RequestOutput]"]


def run_all(
    step: Step,
    core: EngineCore,
    ids: Sequence[str],
    done: dict[str, RequestOutput],
    kept: list[RequestOutput],
    line: ProgressLine,
) -> None:
    """Call ``step`` until the requests ``ids`` have ended, into ``done``; outputs of others go to ``kept``."""
    mine = set(ids)
    others: list[RequestOutput] = []
    begun = core.stats.decode_tokens
    try:
        while len(done) < len(mine):
            for output in step():
                if output.request_id in mine:
                    done[output.request_id] = output
                else:
                    others.append(output)
            line.update(len(done), core.stats.decode_tokens - begun)
    finally:
        kept += others
        line.close()


def stream_chunks(
    step: Step,
    core: EngineCore,
    request_id: str,
    chunks: deque[StreamChunk],
    kept: list[RequestOutput],
    *,
    raise_errors: bool,
) -> Generator[StreamChunk, None, None]:
    """What the request adds to ``chunks``, with calls of ``step`` where there is nothing yet.

    Started already, so that closing it aborts the request even before its first chunk was asked for.
    """
    started = _stream_chunks(step, core, request_id, chunks, kept, raise_errors=raise_errors)
    next(started)
    return started


def _stream_chunks(
    step: Step,
    core: EngineCore,
    request_id: str,
    chunks: deque[StreamChunk],
    kept: list[RequestOutput],
    *,
    raise_errors: bool,
) -> Generator[StreamChunk, None, None]:
    request = core.requests[request_id]
    others: list[RequestOutput] = []
    try:
        yield StreamChunk(request_id, 0, "", [])  # taken by `stream_chunks`
        while True:
            while not chunks and core.requests.get(request_id) is request:
                others += (output for output in step() if output.request_id != request_id)
            if not chunks:
                return
            yield (chunk := chunks.popleft())
            if chunk.final is not None and raise_errors:
                raise_error(chunk.final)
    finally:
        # When it has ended, another request may have its id.
        if core.requests.get(request_id) is request:
            core.abort(request)
        kept += others
