"""What may enter the engine: prompts become token ids, and a request that can never be served is refused at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from kvfold.engine.chat import encode_chat
from kvfold.engine.contexts import Context
from kvfold.engine.detokenize import TextStream
from kvfold.engine.prompts import PlainPrompt, plain
from kvfold.engine.request import Chat, Prompt, SamplingParams, StreamChunk
from kvfold.engine.sampling import RowSampler
from kvfold.engine.state import Branch, Request
from kvfold.errors import RequestError
from kvfold.memory.manager import CacheManager
from kvfold.rotary import NO_ROTARY_LENGTHS, RotaryLengths

__all__ = ["Intake", "Room"]


class Intake:
    """Makes requests. ``context``: tokens the model allows; ``capacity``: what one sequence can have in the cache."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        vocab: int,
        context: int,
        capacity: Room,
        max_sequences: int,
        *,
        end_ids: frozenset[int],
        seed: int,
        rotary: RotaryLengths = NO_ROTARY_LENGTHS,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._context = context
        self._capacity = capacity
        self._max_sequences = max_sequences
        self._end_ids = end_ids
        self._rotary = rotary
        self._seeds = random.Random(seed)
        self._arrivals = 0

    def make(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str,
        salt: bytes,
        on_chunk: Callable[[StreamChunk], None] | None,
        shared: Context | None = None,
    ) -> Request:
        """The request, with its first branch; RequestError says why it can never be served. ``shared``: the context
        that ``prompt`` goes on from.
        """
        tokens = self.tokens(prompt) if shared is None else [*shared.tokens, *self._continued(plain(prompt))]
        if shared is not None and params.context_tokens is not None:
            raise RequestError("context_tokens beside a shared context", why="that is the context", hint="leave it out")
        context = len(shared.tokens) if shared is not None else params.context_tokens or len(tokens)
        limit = self._limit(tokens, params, context)
        self._check(params, len(tokens))
        end_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._end_ids)
        request = Request(
            id=request_id,
            prompt=tokens,
            params=params,
            salt=salt,
            arrival=self._arrivals,
            limit=limit,
            end_ids=end_ids,
            on_chunk=on_chunk,
            shared=shared,
            rotary=self._rotary,
        )
        self._arrivals += 1
        seed = params.seed if params.seed is not None or params.greedy else self._seeds.getrandbits(62)
        request.seed = seed or 0
        request.branches.append(
            Branch(
                request=request,
                index=0,
                tokens=list(tokens),
                sampler=RowSampler(params, prompt=tokens, end_ids=sorted(end_ids), seed=request.seed),
                text=self._text(params, streamed=on_chunk is not None),
                logprobs=None if params.logprobs is None else [],
            )
        )
        return request

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a text (with the tokenizer's special tokens), of chat messages, or as they are."""
        return self._ids(plain(prompt))

    def _ids(self, prompt: PlainPrompt) -> list[int]:
        if isinstance(prompt, str):
            return self._checked(self._need("a text").encode(prompt))
        if isinstance(prompt, Chat):
            return self._checked(encode_chat(self._need("chat messages"), prompt))
        return self._checked(prompt)

    def _continued(self, prompt: PlainPrompt) -> list[int]:
        """Token ids of what stands behind a context: a text without special tokens, or ids."""
        if isinstance(prompt, str):
            return self._checked(self._need("a text").encode(prompt, add_special_tokens=False))
        if isinstance(prompt, Chat):
            hint = "render the chat yourself and give what follows the context as a text or as token ids"
            raise RequestError("chat messages behind a shared context", why="a template renders whole chats", hint=hint)
        return self._checked(prompt)

    def _need(self, what: str) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise RequestError(f"{what} as a prompt", why="the engine has no tokenizer", hint="give token ids")
        return self._tokenizer

    def _checked(self, ids: list[int]) -> list[int]:
        """``ids``, each within the vocabulary."""
        if not ids:
            raise RequestError("empty prompt", why="there is no token to go on from")
        if not 0 <= min(ids) <= max(ids) < self._vocab:
            wrong = next(token for token in ids if not 0 <= token < self._vocab)
            raise RequestError(f"bad token id {wrong} in a prompt", why=f"the vocabulary has {self._vocab} tokens")
        return ids

    def check_length(self, tokens: Sequence[int]) -> int:
        """Tokens of a prompt and the first one behind it; RequestError if that is more than the model takes."""
        if len(tokens) + 1 > self._context:
            raise RequestError(
                f"prompt of {len(tokens)} tokens",
                why=f"the context is {self._context} tokens, with at least one generated",
                hint="shorten the prompt",
            )
        return len(tokens) + 1

    def _limit(self, tokens: Sequence[int], params: SamplingParams, context: int) -> int:
        """Most tokens of prompt and completion together. The last one is never stored in the cache."""
        least = self.check_length(tokens)
        asked = min(self._context, len(tokens) + params.max_tokens) if params.max_tokens else least
        if not self._capacity.holds(asked - 1, context):
            hint = "raise kv_memory, lower max_tokens, or choose a recipe with fewer bits"
            if self._capacity.retains:
                hint += ", or retention with chunk=512: it then runs while the prompt is read"
            raise RequestError(
                f"prompt of {len(tokens)} tokens with max_tokens={params.max_tokens}",
                why=f"{asked - 1} tokens can never fit: the cache holds {self._capacity.tokens} of one sequence",
                hint=hint,
            )
        return asked if params.max_tokens else min(self._context, self._capacity.tokens + 1)

    def _check(self, params: SamplingParams, prompt_tokens: int) -> None:
        if params.n > self._max_sequences:
            raise RequestError(f"n={params.n}", why=f"at most {self._max_sequences} sequences run at once")
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings", why="the engine has no tokenizer", hint="use stop_token_ids")
        if params.context_tokens is not None and params.context_tokens > prompt_tokens:
            raise RequestError(
                f"context_tokens={params.context_tokens}",
                why=f"the prompt has {prompt_tokens} tokens",
                hint="the context is a part of the prompt; None for all of it",
            )
        for token in params.stop_token_ids:
            if token >= self._vocab:
                raise RequestError(f"bad stop token id {token}", why=f"the vocabulary has {self._vocab} tokens")

    def _text(self, params: SamplingParams, *, streamed: bool) -> TextStream | None:
        if self._tokenizer is None or not (params.stop or streamed):
            return None
        return TextStream(
            self._tokenizer,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )


class Room:
    """What one sequence can have in the cache of ``books``, up to ``context`` tokens, in steps of ``chunk``."""

    def __init__(self, books: CacheManager, context: int, chunk: int) -> None:
        self._books = books
        self._chunk = chunk
        self.retains = any(spec.rule is not None for spec in books.groups)
        self.tokens = self._longest(context)
        """The most tokens, all of them a prompt."""

    def holds(self, tokens: int, prompt: int) -> bool:
        """Whether a sequence can get to ``tokens`` tokens, the first ``prompt`` of which retention sees as one."""
        if tokens <= self.tokens:
            return True
        return self.retains and self._books.can_ever_fit(tokens, min(self._chunk, tokens), prompt)

    def _longest(self, context: int) -> int:
        if self._fits(context):
            return context
        low, high = 0, context
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(middle) else (low, middle)
        return low

    def _fits(self, tokens: int) -> bool:
        return self._books.can_ever_fit(tokens, min(self._chunk, tokens))
