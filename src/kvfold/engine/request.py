"""What a caller asks for and what comes back: sampling parameters, outputs, stream chunks. Plain data, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from kvfold.errors import KVFoldError, RequestError

__all__ = [
    "GREEDY_BELOW",
    "Chat",
    "CompletionOutput",
    "FinishReason",
    "Logprob",
    "Prompt",
    "RequestOutput",
    "SamplingParams",
    "StreamChunk",
]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and how the chat template writes it."""

    messages: Sequence[Mapping[str, Any]]
    """``{"role": ..., "content": ...}`` each."""
    chat_template: str | None = None
    """A template in the place of the tokenizer's."""
    add_generation_prompt: bool = True
    """End with the start of the model's turn."""
    continue_final_message: bool = False
    """Leave the last message open: the model goes on with it. Needs ``add_generation_prompt=False``."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Further variables of the template."""


Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]] | Chat
"""A text, token ids, chat messages (``{"role": ..., "content": ...}``), or a `Chat`: messages with options."""

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]
"""``stop``: end token, stop token or stop string; ``length``: ``max_tokens`` or the context is full."""

GREEDY_BELOW = 1e-5
"""Temperatures below this mean greedy: dividing by them would only overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends. Names as in vLLM; the default is greedy.

    The order of work on the logits: ``min_tokens`` (end tokens barred), repetition penalty, presence and frequency
    penalty, temperature, top-k, top-p, min-p. Log-probabilities are those of the model's logits, before any of it.
    """

    n: int = 1
    """Completions of the one prompt; the prompt is computed once and its cache shared."""
    max_tokens: int | None = 128
    """Most tokens of a completion; None: up to what context and cache hold."""
    temperature: float = 0.0
    """0 is greedy (the default, other than vLLM's 1.0: the same call gives the same text)."""
    top_k: int = 0
    """Only the ``k`` likeliest tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Only the smallest set of likeliest tokens that holds this probability."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides (or, if negative, multiplies) the logits of tokens in prompt or completion; 1 is none."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens already generated."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time a token was generated."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion (a single string is taken as one). The text is cut before the match."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end a completion, as the model's own end tokens do. They stay in ``token_ids``."""
    ignore_eos: bool = False
    """Go on past the model's own end tokens."""
    min_tokens: int = 0
    """No end token and no stop string before this many tokens."""
    seed: int | None = None
    """Seed of this request's draws (completion ``i`` of ``n`` uses ``seed + i``); None: drawn from the engine's
    seed.
    """
    logprobs: int | None = None
    """Report the log-probability of each chosen token, and of so many likeliest ones; None: of none."""
    include_stop_str_in_output: bool = False
    """Keep the stop string at the end of the text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    context_tokens: int | None = None
    """The first so many tokens of the prompt are its context: retention compresses at its end, before what follows is
    read; None: at the end of the prompt.
    """

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value: object = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, (value,))
            elif value is None or isinstance(value, list):
                object.__setattr__(self, name, tuple(value or ()))
        self._check_counts()
        self._check_numbers()
        self._check_stops()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature < GREEDY_BELOW

    def _check_counts(self) -> None:
        _whole("n", self.n, low=1)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, low=1, hint="None generates up to the end of the context")
        _whole("top_k", self.top_k, low=-1, hint="0 keeps all tokens")
        _whole("min_tokens", self.min_tokens, low=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", self.min_tokens, f"it is more than max_tokens={self.max_tokens}")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, low=0, hint="0 reports the chosen token alone, None nothing")
        if self.seed is not None:
            _whole("seed", self.seed, low=None)
        if self.context_tokens is not None:
            _whole("context_tokens", self.context_tokens, low=1, hint="None compresses all of the prompt")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "True or False is needed")

    def _check_numbers(self) -> None:
        _number("temperature", self.temperature, low=0.0, high=math.inf, hint="0 is greedy")
        _number("top_p", self.top_p, low=0.0, high=1.0, open_low=True, hint="1 keeps all tokens")
        _number("min_p", self.min_p, low=0.0, high=1.0, hint="0 keeps all tokens")
        _number("repetition_penalty", self.repetition_penalty, low=0.0, high=math.inf, open_low=True, hint="1 is none")
        _number("presence_penalty", self.presence_penalty, low=-2.0, high=2.0, hint="0 is none")
        _number("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0, hint="0 is none")

    def _check_stops(self) -> None:
        stop: object = self.stop
        if not isinstance(stop, tuple) or not all(isinstance(text, str) and text for text in stop):
            raise _bad("stop", stop, "texts that are not empty are needed")
        stop_ids: object = self.stop_token_ids
        if not isinstance(stop_ids, tuple):
            raise _bad("stop_token_ids", stop_ids, "a list of token ids is needed")
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, low=0)


def _bad(name: str, value: object, why: str, hint: str = "") -> RequestError:
    return RequestError(f"bad sampling parameter {name}={value!r}", why=why, hint=hint)


def _whole(name: str, value: object, *, low: int | None, hint: str = "") -> None:
    """Refuse what is not a whole number of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise _bad(name, value, "a whole number is needed", hint)
    if low is not None and value < low:
        raise _bad(name, value, f"at least {low} is needed", hint)


def _number(name: str, value: object, *, low: float, high: float, open_low: bool = False, hint: str = "") -> None:
    """Refuse what is not a finite number from ``low`` (not itself, if ``open_low``) to ``high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _bad(name, value, "a finite number is needed", hint)
    if value < low or value > high or (open_low and value == low):
        bound = f"above {low:g}" if open_low else f"at least {low:g}"
        raise _bad(name, value, bound + (f" and at most {high:g}" if high < math.inf else "") + " is needed", hint)


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token at one place of a completion."""

    logprob: float
    """Natural logarithm of the model's probability."""
    rank: int
    """1 for the likeliest token of the vocabulary."""
    decoded_token: str
    """The token alone, as text; empty without a tokenizer."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    """The stop token or stop string that ended it; None for the model's own end token."""
    logprobs: list[dict[int, Logprob]] | None = None
    """For each token: token id -> `Logprob`, the chosen one first, then the likeliest."""
    cumulative_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request: its prompt and its ``n`` completions."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    """By index; fewer than ``n`` only if the request ended before its prompt was computed."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix index instead of computed."""
    error: KVFoldError | None = None
    """Why a completion ended with ``finish_reason == "error"``."""

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Tokens of the first completion."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first completion ended."""
        return self.outputs[0].finish_reason


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What one completion of a streamed request gained. Joined, the deltas are the final text."""

    request_id: str
    index: int
    """Which of the ``n`` completions."""
    text_delta: str
    """Text that is now certain: whole characters that no stop string can still cut away. May be empty."""
    token_ids: list[int]
    """The new tokens."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    """For the new tokens, as in `CompletionOutput`."""
    final: RequestOutput | None = None
    """The whole request, on its very last chunk."""
