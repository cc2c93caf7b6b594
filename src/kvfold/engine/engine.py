"""The face of the engine: requests in, outputs out, one step at a time or all at once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack, overload

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfold.engine.batch import asked, in_order, naming
from kvfold.engine.chat import ChatOptions, Conversation, as_chats, is_conversation
from kvfold.engine.contexts import Context, read_context
from kvfold.engine.core import EngineCore
from kvfold.engine.loading import check_recipe, load, load_model
from kvfold.engine.progress import ProgressLine
from kvfold.engine.request import Prompt, RequestOutput, SamplingParams, StreamChunk
from kvfold.engine.runner import ModelRunner
from kvfold.engine.setup import asked_budget, context_length, default_budget, make_intake, make_scheduler
from kvfold.engine.waiting import run_all, stream_chunks
from kvfold.engine.weights import WeightsWatch
from kvfold.errors import RequestError
from kvfold.formats import format_bytes
from kvfold.geometry import UNBOUNDED, Geometry
from kvfold.recipe import Recipe
from kvfold.replay import INSTRUCTION

__all__ = ["Engine"]


class Engine:
    """Serves many requests at once with one model, from a KV cache of a hard size.

    Requests join and leave between steps; long prompts are computed in chunks beside the decoding of others; prompts
    that begin alike share blocks; when the cache is full the youngest request gives its blocks back and is computed
    anew later. Not thread-safe: `AsyncEngine` has the same methods for asyncio, but those that step by hand
    (`add_request`, `step`, `has_unfinished`).
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        recipe: Recipe | str = "raw",
        kv_memory: str | int | None = None,
        max_batched_tokens: int = 512,
        max_sequences: int = 64,
        max_length: int | None = None,
        prefix_caching: bool = True,
        repeatable: bool | None = None,
        seed: int = 0,
        check: bool = True,
    ) -> None:
        """``model``: a loaded one (then give its ``tokenizer`` too, if prompts are texts), or what `load` takes.

        ``recipe``: what becomes of the cache. ``kv_memory``: its size, such as ``"2GiB"``; by default what
        ``max_sequences`` full contexts need, and at most a quarter of the memory available. ``max_batched_tokens``:
        tokens of a step. ``max_length``: a lower limit than the model's context. ``prefix_caching``: requests that
        begin alike share blocks. ``repeatable``: a prompt gives the same log-probabilities, to the bit, whether its
        prefix was cached or is computed, beside the same neighbours; that takes one more small step for a prompt. By
        default so under recipes that pack blocks; under others (``raw``) a cached prefix changes rounding. ``seed``:
        for the requests that bring none. ``check``: compare a short forward with the model's own first.
        """
        asked = asked_budget(kv_memory, model)
        if isinstance(model, (str, Path)):
            model, tokenizer = load(model) if tokenizer is None else (load_model(model), tokenizer)
        geometry = Geometry.from_config(model.config)
        self.context = context_length(geometry, max_length)
        self.recipe = check_recipe(recipe, model)
        self.tokenizer = tokenizer
        if asked is None:
            asked = default_budget(model, geometry, self.recipe, self.context, max_batched_tokens, max_sequences)
        self._runner = ModelRunner(
            model,
            recipe=self.recipe,
            kv_memory=asked,
            prefix_caching=prefix_caching,
            check=check,
            instruction=() if tokenizer is None else tokenizer.encode(INSTRUCTION, add_special_tokens=False),
        )
        limits = {"max_batched_tokens": max_batched_tokens, "max_sequences": max_sequences}
        scheduler = make_scheduler(self._runner, prefix_caching=prefix_caching, repeatable=repeatable, **limits)
        self._core = EngineCore(self._runner, scheduler, tokenizer)
        self._intake = make_intake(self._runner, tokenizer, self.context, seed=seed, **limits)
        self._weights = WeightsWatch(model)
        self._numbered, self._closed = 0, False
        self._unclaimed: list[RequestOutput] = []
        self._awaited: dict[str, dict[str, RequestOutput]] = {}  # by request of a `generate`: its outputs so far
        self._contexts: set[Context] = set()
        logging.getLogger("kvfold.engine").info(self.capacity_report())

    # -- one step at a time

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        salt: bytes = b"",
        on_chunk: Callable[[StreamChunk], None] | None = None,
        context: Context | None = None,
    ) -> str:
        """Queue a request; its id. RequestError if it can never be served.

        ``salt``: only requests with the same salt share prefix blocks. ``context``: what `add_context` gave; the prompt
        goes on from it, and its tokens are part of the request's. ``on_chunk``: is called at the end of each step
        that brought the request a token, and must not raise; the chunk of its last step carries the whole output.
        """
        if self._closed:
            raise RequestError("the engine is closed")
        if request_id is None:
            request_id = self._new_id()
        elif request_id in self._core.requests:
            raise RequestError(f"request id {request_id!r}", why="a request of this id is under way")
        self._follow_weights()
        if context is not None and (context not in self._contexts or context.salt != salt):
            why = "it was removed, is another engine's, or was read under another salt"
            raise RequestError("a context that this engine does not hold for this request", why=why)
        if context is not None and context.stale:
            why = "the model's weights or adapters have changed since it was read, or the prefix cache was reset"
            raise RequestError("a context of other weights", why=why, hint="remove_context, then add_context again")
        request = self._intake.make(
            prompt, params or SamplingParams(), request_id=request_id, salt=salt, on_chunk=on_chunk, shared=context
        )
        self._core.add(request)
        return request_id

    def add_context(self, text: Prompt, *, salt: bytes = b"") -> Context:
        """Reads a context now, compresses it as the recipe says, and holds it for requests of the same ``salt`` to
        begin with: they share its blocks, and give what they would give with ``context_tokens`` of their own.

        UnsupportedError if the recipe's retention chooses by a request's queries; RequestError if it is too long;
        CacheFullError if there is no room beside what runs.
        """
        if self._closed:
            raise RequestError("the engine is closed")
        self._follow_weights()
        tokens = self._intake.tokens(text)
        self._intake.check_length(tokens)
        scheduler = self._core.scheduler
        context = read_context(self._runner, scheduler.chunking, tokens, scheduler.max_batched_tokens, salt)
        self._contexts.add(context)
        return context

    def remove_context(self, context: Context) -> None:
        """Lets go of a context. RequestError if the engine does not hold it, or a request under way begins with it."""
        if context not in self._contexts:
            raise RequestError("a context that this engine does not hold")
        if any(request.shared is context for request in self._core.requests.values()):
            raise RequestError("a context in use", why="requests that begin with it have not ended")
        self._contexts.remove(context)
        self._runner.free(context.seq)

    def reset_prefix_cache(self) -> None:
        """Forgets what was computed so far: no request added from now on begins with it, and contexts are refused.

        Changes of the weights that torch counts, and of peft's adapters, do this by themselves when a request is added
        or admitted. Call it after others, such as writing through ``parameter.data``. Requests under way go on with
        the keys and values they have, and share nothing any more.
        """
        self._runner.manager.reset_prefix_cache()
        for context in self._contexts:
            context.stale = True

    def _follow_weights(self) -> None:
        if self._weights.changed():
            self.reset_prefix_cache()

    def _new_id(self) -> str:
        """A number that no request under way has for its id."""
        while True:
            request_id = str(self._numbered)
            self._numbered += 1
            if request_id not in self._core.requests:
                return request_id

    def step(self) -> list[RequestOutput]:
        """One forward of the model for everyone who has a turn; the requests that have ended."""
        claimed = self._unclaimed[:]
        self._unclaimed.clear()
        if not self._core.requests:
            return claimed
        if self._core.scheduler.waiting:
            self._follow_weights()
        return claimed + self._core.step()

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; what there is of it. The call that waits for it gets that too. None if it is not (any
        more) under way.
        """
        request = self._core.requests.get(request_id)
        if request is None:
            return None
        output = self._core.abort(request)
        if request_id in self._awaited:
            self._awaited[request_id][request_id] = output
        return output

    def has_unfinished(self) -> bool:
        """Whether `step` has something to do or to give back."""
        return bool(self._core.requests or self._unclaimed)

    # -- all at once

    def generate(
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
        """Completions of ``prompts`` (one, or several), in their order. ``params``: for all, or one for each.
        ``request_id``: one for each, for `abort`. ``salt``, ``context``: of all of them, see `add_request`.

        ``progress``: a line on stderr, if that is a terminal and it takes longer than two seconds. An error of one
        request (NumericsError) leaves the others alone; it is raised when all are done, or with ``raise_errors=False``
        left in the output's ``error``. A refusal (RequestError) of one ends the call before the first step.
        """
        requests = asked(prompts, params, request_id)
        ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            for prompt, one, wanted, name in requests:
                with naming(name):
                    ids.append(self.add_request(prompt, one, request_id=wanted, salt=salt, context=context))
                self._awaited[ids[-1]] = done
            run_all(self.step, self._core, ids, done, self._unclaimed, ProgressLine(len(ids), enabled=progress))
        finally:
            for added in ids:
                if added not in done:
                    self.abort(added)
                del self._awaited[added]
        return in_order(ids, done, raise_errors=raise_errors)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        salt: bytes = b"",
        context: Context | None = None,
        raise_errors: bool = True,
    ) -> Generator[StreamChunk, None, None]:
        """The completion of ``prompt`` as it grows; ``final`` of the last chunk is the whole output. A request that is
        refused raises here, not at the first chunk.

        An iterator that is closed before its end aborts the request. Other requests under way move along. An error of
        the request (NumericsError) is raised after its last chunk, or with ``raise_errors=False`` left in ``final``.
        """
        chunks: deque[StreamChunk] = deque()
        added = self.add_request(
            prompt, params, request_id=request_id, salt=salt, on_chunk=chunks.append, context=context
        )
        return stream_chunks(self.step, self._core, added, chunks, self._unclaimed, raise_errors=raise_errors)

    @overload
    def chat(
        self, messages: Conversation, params: SamplingParams | None = None, **options: Unpack[ChatOptions]
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]: ...

    def chat(
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
        """The model's next turn in a conversation, a list of messages ``{"role": ..., "content": ...}``; or in several,
        a list of such lists, for a list of outputs.

        ``chat_template``: in the place of the tokenizer's. ``continue_final_message``: go on with the last message
        (needs ``add_generation_prompt=False``). ``chat_template_kwargs``: further variables of the template. The rest
        as in `generate`. RequestError for what is not a conversation, and for what the template refuses.
        """
        chats = as_chats(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        outputs = self.generate(
            chats, params, request_id=request_id, salt=salt, progress=progress, raise_errors=raise_errors
        )
        return outputs[0] if is_conversation(messages) else outputs

    # -- what there is

    def capacity_report(self) -> str:
        """How much the cache holds, in one line."""
        books = self._runner.manager
        capacity = books.tokens_capacity()
        length = min(self.context, capacity)
        size = format_bytes(books.usage().budget)
        if capacity >= UNBOUNDED or length < 1:
            return f"KV cache: {size}, {self.recipe}: any number of tokens"
        at_once = books.concurrency(length)
        return (
            f"KV cache: {size}, {self.recipe}: {capacity} tokens; "
            f"maximum concurrency for {length} tokens: {at_once:.2f}"
        )

    def stats(self) -> dict[str, int | float | None]:
        """Counts since the start, and where the memory is now. Names that end in ``_bytes`` are bytes; None where the
        system does not tell.
        """
        work, books = self._core.stats, self._runner.manager
        usage, memory = books.usage(), books.stats()
        return {
            "steps": work.steps,
            "prefill_tokens": work.prefill_tokens,
            "decode_tokens": work.decode_tokens,
            "prefix_hit_tokens": work.prefix_hit_tokens,
            "finished_requests": work.finished_requests,
            "preemptions": work.preemptions,
            "rope_rereads": work.rope_rereads,
            "seconds": work.seconds,
            "tokens_per_s": work.tokens_per_s,
            "running": len(self._core.scheduler.running),
            "waiting": len(self._core.scheduler.waiting),
            "sealed_blocks": memory.sealed_blocks,
            "copied_blocks": memory.copied_blocks,
            "evicted_blocks": memory.evictions,
            **self._retention(),
            "kv_budget_bytes": usage.budget,
            "kv_reserved_bytes": self._runner.cache.bytes_allocated(),
            "kv_resident_bytes": self._runner.cache.bytes_resident(),
            "kv_peak_bytes": self._core.peak_bytes,
            "kv_in_use_bytes": usage.in_use,
            "kv_cached_bytes": usage.cached,
        }

    def _retention(self) -> dict[str, int]:
        """What retention has done, under names of its own; nothing without it."""
        retainer = self._runner.cache.retainer
        if retainer is None:
            return {}
        stats = asdict(retainer.stats)
        return {f"retention_{name}": count for name, count in stats.items()} | {
            "retention_notes_bytes": retainer.nbytes()
        }

    def close(self) -> None:
        """Abort what is under way and leave the model as it was. Closing twice is no error."""
        if self._closed:
            return
        self._closed = True
        for request in list(self._core.requests.values()):
            self._core.abort(request)
        for context in list(self._contexts):
            self.remove_context(context)
        self._runner.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
