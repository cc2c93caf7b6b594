"""Texts in which something far back must be found again, and where in them it stands.

A model that chats, with a tokenizer that says where its tokens lie in a text, is asked for facts of a document
(`kvfold.quality.tasks`). Any other reads random tokens a second time, the pattern of induction heads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from transformers import PreTrainedTokenizerBase

from kvfold.errors import RequestError
from kvfold.quality.profile.results import LookupKind
from kvfold.quality.tasks import Sample, make_sample

__all__ = ["Lookup", "lookup_texts", "repeated_texts"]

_TASKS: Final = ("kv", "niah_multikey", "copy")  # their answers stand in the text word for word
_DEPTHS: Final = (0.15, 0.5)
_COUNTED: Final = 1 << 14  # texts whose lengths are remembered
_REPEATS: Final = 4
_MOST_ASKED: Final = 64


@dataclass(frozen=True, slots=True)
class Lookup:
    """A text of a kind. ``asked``: positions (rising) whose next token must be found; ``right``: for each of them the
    positions of the tokens that say it.
    """

    kind: LookupKind
    tokens: tuple[int, ...]
    asked: tuple[int, ...]
    right: tuple[tuple[int, ...], ...]


def lookup_texts(tokenizer: PreTrainedTokenizerBase, *, tokens: int, near: int, seed: int, vocab: int) -> list[Lookup]:
    """The texts for a model of this tokenizer, each of at most ``tokens`` tokens; the same for the same arguments.

    What is asked for lies more than ``near`` tokens before its question. RequestError if the texts have no room for
    that.
    """
    if not tokenizer.chat_template or not tokenizer.is_fast:
        special = set(tokenizer.all_special_ids)
        usable = [token for token in range(vocab) if token not in special]
        begin = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
        return repeated_texts(usable, begin, tokens=tokens, near=near, seed=seed)
    count_tokens = lru_cache(_COUNTED)(lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
    asked = [(task, depth, index) for task in _TASKS for index, depth in enumerate(_DEPTHS)]
    tried = [
        _question(tokenizer, count_tokens, task, seed * 1_000_003 + index, depth, tokens)
        for task, depth, index in asked
    ]
    found = [text for text in tried if text is not None and _is_far(text, near)]
    if not found:
        raise _too_short(tokens, near)
    return found


def repeated_texts(usable: Sequence[int], begin: Sequence[int], *, tokens: int, near: int, seed: int) -> list[Lookup]:
    """Random tokens, and all of them again. At its second coming, a token says what comes next by its first: the right
    ones are that token and the one after it.
    """
    rng = random.Random(f"repeat/{seed}")
    length = (tokens - len(begin)) // 2
    if length <= near + 1:
        raise _too_short(tokens, near)
    step = max(1, length // _MOST_ASKED)
    places = range(step, length - 1, step) if length > 2 else ()
    texts = []
    for _ in range(_REPEATS):
        passage = rng.choices(usable, k=length)
        asked = tuple(len(begin) + length + place for place in places)
        right = tuple((len(begin) + place, len(begin) + place + 1) for place in places)
        texts.append(Lookup("repeat", (*begin, *passage, *passage), asked, right))
    return texts


def _question(
    tokenizer: PreTrainedTokenizerBase,
    count_tokens: Callable[[str], int],
    task: str,
    seed: int,
    depth: float,
    tokens: int,
) -> Lookup | None:
    """A question with its answer, as long as may be; None if it does not fit, or its answer is not in the document."""
    target = tokens
    while target >= tokens // 4:
        sample = make_sample(task, seed, target, count_tokens, depth=None if task == "niah_multikey" else depth)
        text = _asked(tokenizer, sample)
        if text is None or len(text.tokens) <= tokens:
            return text
        target -= len(text.tokens) - tokens
    return None


def _asked(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Lookup | None:
    messages = [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.answer}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    said, stands, value = text.rfind(sample.answer), text.find(sample.answer), sample.references[0]
    if not 0 <= stands < said:
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans: list[tuple[int, int]] = encoded["offset_mapping"]
    first = said + sample.answer.rfind(value)
    answer = _within(spans, first, first + len(value))
    statement = tuple(_within(spans, stands, stands + len(sample.answer)))
    return Lookup("question", tuple(encoded["input_ids"]), tuple(at - 1 for at in answer), (statement,) * len(answer))


def _within(spans: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Tokens that hold letters of ``text[start:end]``."""
    return [index for index, (first, last) in enumerate(spans) if first < end and last > start]


def _is_far(text: Lookup, near: int) -> bool:
    pairs = zip(text.asked, text.right, strict=True)
    return bool(text.asked) and all(at - max(right) > near and min(right) > 0 for at, right in pairs)


def _too_short(tokens: int, near: int) -> RequestError:
    return RequestError(
        f"texts of {tokens} tokens to find retrieval heads in",
        why=f"what is asked for has to lie more than {near} tokens back",
        hint="give a longer --context, or a recipe with a smaller recent window",
    )
