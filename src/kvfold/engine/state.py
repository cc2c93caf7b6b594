"""The engine's own record of a request: mutable, internal. The public data stand in `request`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from kvfold.engine.contexts import Context
from kvfold.engine.detokenize import TextStream
from kvfold.engine.request import FinishReason, SamplingParams, StreamChunk
from kvfold.engine.sampling import RowSampler, TokenLogprob
from kvfold.errors import KVFoldError
from kvfold.rotary import NO_ROTARY_LENGTHS, Lengths, RotaryLengths

__all__ = ["Branch", "Request", "Status"]


class Status(Enum):
    """Where a branch stands."""

    WAITING = auto()
    """Never run."""
    RUNNING = auto()
    """Holds a sequence of the cache."""
    PREEMPTED = auto()
    """Has given its blocks back; its tokens are computed anew when there is room."""
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and its ``params.n`` branches. The first branch computes the prompt; the others are forked from it."""

    id: str
    prompt: list[int]
    params: SamplingParams
    salt: bytes
    arrival: int
    """Requests are served in this order."""
    limit: int
    """Prompt and completion together have at most so many tokens."""
    end_ids: frozenset[int]
    """Tokens that end a completion: the model's own, unless ignored, and ``stop_token_ids``."""
    on_chunk: Callable[[StreamChunk], None] | None = None
    branches: list[Branch] = field(default_factory=list)
    seed: int = 0
    """Of the first branch's generator; branch ``i`` has ``seed + i``."""
    cached_tokens: int | None = None
    """Prompt tokens found in the prefix index at the first admission."""
    error: KVFoldError | None = None
    shared: Context | None = None
    """The context that the engine holds and the prompt begins with."""
    rotary: RotaryLengths = NO_ROTARY_LENGTHS
    """How the model's rotary factors depend on the length."""

    @property
    def context(self) -> int:
        """Tokens of the prompt at whose end retention runs: all, unless the request says otherwise."""
        if self.shared is not None:
            return len(self.shared.tokens)
        return self.params.context_tokens or len(self.prompt)

    @property
    def finished(self) -> bool:
        """Whether every completion has ended. One that ends before the prompt is computed is the only one there ever
        is.
        """
        return all(branch.status is Status.FINISHED for branch in self.branches)


@dataclass(slots=True, eq=False)
class Branch:
    """One completion: the unit that is scheduled.

    Whether it was preempted or prefilled in chunks never matters to it: ``tokens[computed:]`` are still to be
    computed, and the logits of the last one give the next token.
    """

    request: Request
    index: int
    tokens: list[int]
    """Prompt and completion so far."""
    sampler: RowSampler
    text: TextStream | None
    """Only where someone reads text while it grows: a stop string, a stream."""
    status: Status = Status.WAITING
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    seq: int | None = None
    """The sequence of the cache, while running."""
    logprobs: list[list[TokenLogprob]] | None = None
    cumulative_logprob: float = 0.0
    streamed: int = 0
    """Completion tokens already handed out as chunks."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Age: (arrival, index). The smaller goes first; the greatest is preempted first."""
        return self.request.arrival, self.index

    @property
    def slots(self) -> int:
        """Sequences it stands for: all ``n`` of its request until it is forked."""
        request = self.request
        return 1 if len(request.branches) == request.params.n else request.params.n

    @property
    def lengths(self) -> Lengths:
        """What its rotary factors follow from."""
        return Lengths(len(self.request.prompt), len(self.tokens))

    @property
    def salt(self) -> bytes:
        """Only branches of an equal one share prefix blocks: of the same request's salt, under the same factors."""
        return self.request.rotary.salted(self.request.salt, self.lengths)

    @property
    def shared(self) -> Context | None:
        """The context whose blocks it begins with; None also if those are stored under other rotary factors, or were
        computed with other weights.
        """
        shared = self.request.shared
        if shared is None or shared.stale or shared.factors != self.request.rotary.key(self.lengths):
            return None
        return shared

    @property
    def generated(self) -> int:
        """Tokens of the completion."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def completion(self) -> list[int]:
        """The tokens of the completion."""
        return self.tokens[len(self.request.prompt) :]

    def fork(self, index: int, *, seq: int | None, seed: int) -> Branch:
        """A further completion of the same prompt, in the state of this one, on the cache sequence ``seq``."""
        return Branch(
            request=self.request,
            index=index,
            tokens=list(self.tokens),
            sampler=self.sampler.fork(seed),
            text=None if self.text is None else self.text.copy(),
            status=Status.RUNNING,
            computed=self.computed,
            seq=seq,
            logprobs=None if self.logprobs is None else list(self.logprobs),
        )
