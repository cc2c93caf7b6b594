"""What all contestants of an evaluation are given: passages of text, questions, and prompts to go on from.

A pure function of the settings and the tokenizer, so that runs in different environments can be compared: `digest` is
equal exactly when all tokens are.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Final

from transformers import PreTrainedTokenizerBase

from kvfold.errors import RequestError
from kvfold.quality.settings import EvalSettings
from kvfold.quality.tasks import Sample, make_sample, read_text

__all__ = ["Question", "Workload", "build_workload", "cut_passages"]

_ANSWER_FACTOR: Final = 2
_ANSWER_SLACK: Final = 32
"""A model may take this many times the tokens of the right answer, and these on top."""

_COUNTED: Final = 1 << 14  # texts whose lengths are remembered

_CHARACTERS_PER_TOKEN: Final = 6  # a first guess; doubled where it is not enough


@dataclass(frozen=True, slots=True)
class Question:
    """A sample of a task as tokens, and how many an answer may take. ``context_tokens``: so many tokens at the
    beginning of ``prompt`` are its context. They end with its last line, and are the same whatever is asked.
    """

    sample: Sample
    prompt: tuple[int, ...]
    max_tokens: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """``passages``: text to be teacher-forced, scored from token ``score_from`` on. ``prompts``: to be continued.
    ``stop``: the tokens with which an answer ends; ``decode`` makes text of tokens.
    """

    settings: EvalSettings
    passages: tuple[tuple[int, ...], ...]
    score_from: int
    prompts: tuple[tuple[int, ...], ...]
    questions: tuple[Question, ...]
    stop: frozenset[int]
    decode: Callable[[Sequence[int]], str]

    @property
    def digest(self) -> str:
        """Equal for equal tokens and references, and, where contexts are compressed, equal contexts."""
        asked = [(q.prompt, q.max_tokens, q.sample.references) for q in self.questions]
        data: tuple[object, ...] = (self.passages, self.score_from, self.prompts, asked, sorted(self.stop))
        if self.settings.compress == "context":
            data = (*data, [q.context_tokens for q in self.questions])
        return hashlib.sha256(repr(data).encode()).hexdigest()


def build_workload(
    tokenizer: PreTrainedTokenizerBase, settings: EvalSettings, *, stop: frozenset[int] = frozenset()
) -> Workload:
    """The same workload for the same arguments. RequestError if the text is not there or too short."""
    text = read_text(settings.text)
    length = settings.context - settings.decode_steps
    passages = cut_passages(tokenizer, text, length, settings.text_windows, f"text/{settings.seed}")
    prompts: list[tuple[int, ...]] = []
    if settings.generation_tokens:
        count, seed = settings.generation_passages, f"go on/{settings.seed}"
        prompts = cut_passages(tokenizer, text, settings.generation_prompt, count, seed)
    # Samples of a task are cut from the same lines of text, which are counted again and again.
    count_tokens = lru_cache(_COUNTED)(lambda text: len(_tokens(tokenizer, text)))
    asked = [(task, i) for task in settings.tasks for i in range(settings.samples)]
    return Workload(
        settings=settings,
        passages=tuple(passages),
        score_from=length - settings.scored_tokens,
        prompts=tuple(prompts),
        questions=tuple(_question(tokenizer, count_tokens, settings, task, i) for task, i in asked),
        stop=stop,
        decode=lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def cut_passages(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int, seed: str
) -> list[tuple[int, ...]]:
    """``count`` windows of ``length`` tokens that begin at lines spread evenly over ``text``, each moved at random
    within its share. They begin with the tokenizer's first token of a text, if it has one.
    """
    begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    wanted = length - len(begin)
    last = len(text) - _tail(tokenizer, text, wanted)
    rng = random.Random(seed)
    found = []
    for i in range(count):
        place = int(last * (i + rng.random()) / count)
        start = text.rfind("\n", 0, place) + 1
        size = _CHARACTERS_PER_TOKEN * wanted
        while len(tokens := _tokens(tokenizer, text[start : start + size])) <= wanted and start + size < len(text):
            size *= 2
        found.append((*begin, *tokens[:wanted]))
    return found


def _tail(tokenizer: PreTrainedTokenizerBase, text: str, wanted: int) -> int:
    """Characters at the end of ``text`` that surely are ``wanted`` tokens."""
    size = _CHARACTERS_PER_TOKEN * wanted
    while True:
        tokens = len(_tokens(tokenizer, text[-size:]))
        if tokens >= wanted:
            return min(size, len(text))
        if size >= len(text):
            raise RequestError(
                f"a text of {tokens} tokens",
                why=f"passages of {wanted} are to be cut from it",
                hint="give a longer --text, or a shorter --context",
            )
        size *= 2


def _question(
    tokenizer: PreTrainedTokenizerBase,
    count_tokens: Callable[[str], int],
    settings: EvalSettings,
    task: str,
    index: int,
) -> Question:
    """Sample ``index`` of a task, as long as it may be so that prompt and answer fill the context."""
    depth = settings.depths[index % len(settings.depths)] if settings.depths else None
    seed = settings.seed * 1_000_003 + index
    target = settings.context
    while True:
        sample = make_sample(task, seed, target, count_tokens, depth=depth)
        prompt, context_tokens = _render(tokenizer, sample)
        room = _ANSWER_FACTOR * count_tokens(sample.answer) + _ANSWER_SLACK
        excess = len(prompt) + room - settings.context
        if excess <= 0:
            return Question(sample, tuple(prompt), room, context_tokens)
        target -= excess
        if target < settings.context // 4:
            raise RequestError(
                f"task {task} in a context of {settings.context} tokens",
                why="its question and answer leave hardly any room for a text",
                hint="give a longer --context, or leave the task out",
            )


def _render(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[list[int], int]:
    """As a chat, or, for base models, as a text to be continued; and how many of its tokens are the context's."""
    chat = bool(tokenizer.chat_template)
    text = f"{sample.context}\n\n{sample.question}\nAnswer:"
    if chat:
        messages = [{"role": "user", "content": sample.prompt}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    if (asked := text.rfind(sample.question)) < 0:
        raise RequestError("the tokenizer's chat template", why="it does not give the user's words as they are")

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=not chat, verbose=False))

    prompt, context = encode(text), encode(text[:asked].rstrip())
    # A token that reaches over the end of the context is not in both, and goes with the question.
    same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, context, strict=False))
    return prompt, sum(1 for _ in same)
