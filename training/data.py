"""Training sequences: recall tasks with many questions per text, real text, and copied spans.

A sequence is token ids plus one weight per token (the weight of predicting it).  Numbers in a key-value list cannot
be predicted, so they weigh nothing; answers, which can, weigh most.  Answers are found by the special tokens around
them, in exactly the rendering the chat template gives.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from corpus import training_texts
from kvfold.quality.tasks.counting import common_words_document, frequent_words_document
from kvfold.quality.tasks.documents import (
    Document,
    Fact,
    chain_document,
    copy_document,
    kv_document,
    multivalue_document,
    needle_document,
)
from kvfold.quality.tasks.samples import join_facts
from kvfold.quality.tasks.text import passages_of, real_text
from kvfold.quality.tasks.words import ADJECTIVES, NOUNS

Ids = NDArray[np.int64]
Weights = NDArray[np.float32]

#  Weights of a token of ordinary text, of a repeated span, of a repeated value, and of an answer.  Only a tenth of a
# conversation is answer,  so these make the three kinds of sequence weigh about the same.
TEXT_WEIGHT, SPAN_WEIGHT, ECHO_WEIGHT, ANSWER_WEIGHT = 0.3, 1.0, 1.0, 1.0
# Kinds whose facts stand in real text.
_IN_TEXT = ("needle", "multiquery", "multivalue")


@dataclass(slots=True)
class Mixture:
    """How often each kind of sequence is drawn; the sum need not be one."""

    kv: float = 2.0
    needle: float = 1.5
    multiquery: float = 1.5
    multivalue: float = 0.7
    chain: float = 1.5
    count: float = 0.5
    copy: float = 0.4
    text: float = 2.5
    spans: float = 0.2
    echo: float = 0.5


@dataclass(slots=True)
class Source:
    """Draws training sequences of any length, reproducibly from a seed and a running number."""

    tokenizer: PreTrainedTokenizerBase
    seed: int = 0
    passages: list[str] = field(default_factory=list)
    text_ids: Ids = field(default_factory=lambda: np.zeros(0, np.int64))
    words: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        texts = training_texts()
        end = self._ids("<|end|>")
        pieces = [np.asarray(self._ids(text) + end, np.int64) for text in texts]
        # Documentation is small and plain prose, so it is seen several times as often as the sources.
        self.text_ids = np.concatenate([*(pieces[:1] * 4), *pieces])
        prose = passages_of(real_text())
        self.words = self._ids(" " + " ".join((*ADJECTIVES, *NOUNS))) + self._ids("0123456789") * 4
        self.passages = prose * 3 + [p for text in texts[1:] for p in passages_of(text)]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._ids(text))

    def sequence(self, kind: str, length: int, rng: random.Random) -> tuple[Ids, Weights]:
        """One sequence of exactly ``length`` tokens (padded with weightless tokens where it falls short)."""
        if kind == "text":
            start = rng.randrange(len(self.text_ids) - length)
            ids = self.text_ids[start : start + length].copy()
            if rng.random() < 0.5:
                ids[0] = self.tokenizer.bos_token_id
            return ids, np.full(length, TEXT_WEIGHT, np.float32)
        if kind == "spans":
            return self._spans(length, rng)
        if kind == "echo":
            return self._echo(length, rng)
        ids = np.asarray(self._conversation(kind, length, rng)[:length], np.int64)
        weights = self._weights(ids, TEXT_WEIGHT if kind in _IN_TEXT else 0.0)
        short = length - len(ids)
        return (
            np.pad(ids, (0, short), constant_values=self.tokenizer.pad_token_id),
            np.pad(weights, (0, short)),
        )

    def _spans(self, length: int, rng: random.Random) -> tuple[Ids, Weights]:
        """A span of random words and digits, and then pieces of it again: the plainest reason to look back."""
        pool = self.words if rng.random() < 0.9 else range(5, len(self.tokenizer))
        span = np.asarray(rng.choices(pool, k=rng.randint(min(16, length // 4), length // 2)), np.int64)
        parts, weights = [span], [np.zeros(len(span), np.float32)]
        filled = len(span)
        while filled < length:
            start = rng.randrange(len(span) - 8)
            piece = span[start : start + rng.randint(8, len(span))]
            weight = np.full(len(piece), SPAN_WEIGHT, np.float32)
            weight[:2] = 0.0  # where a piece begins cannot be known
            parts.append(piece)
            weights.append(weight)
            filled += len(piece)
        return np.concatenate(parts)[:length], np.concatenate(weights)[:length]

    def _echo(self, length: int, rng: random.Random) -> tuple[Ids, Weights]:
        """A key-value list, and its lines again in other orders: a lookup in which the key is right before the
        value.
        """
        share = rng.uniform(0.15, 0.5)
        lines = kv_document(rng.randrange(1 << 40), int(length * share), self.count, "train").text.split("\n")
        coded = [np.asarray(self._ids(line + "\n"), np.int64) for line in lines]
        parts, weights = list(coded), [np.zeros(len(line), np.float32) for line in coded]
        filled = sum(map(len, coded))
        while filled < length:
            for line in rng.sample(coded, len(coded)):
                weight = np.zeros(len(line), np.float32)
                weight[-5:-1] = ECHO_WEIGHT  # the four digits before the line's end
                parts.append(line)
                weights.append(weight)
                filled += len(line)
        return np.concatenate(parts)[:length], np.concatenate(weights)[:length]

    def _weights(self, ids: Ids, text_weight: float) -> Weights:
        """Full weight inside answers (the end token included), ``text_weight`` elsewhere."""
        token = {name: self._ids(name)[0] for name in ("<|assistant|>", "<|end|>")}
        weights = np.full(len(ids), text_weight, np.float32)
        ends = np.flatnonzero(ids == token["<|end|>"])
        for start in np.flatnonzero(ids == token["<|assistant|>"]):
            after = ends[ends > start]
            stop = int(after[0]) + 1 if len(after) else len(ids)
            weights[start + 2 : stop] = ANSWER_WEIGHT
        return weights

    def _conversation(self, kind: str, length: int, rng: random.Random) -> list[int]:
        """A document with as many questions as fit in ``length`` tokens, rendered by the chat template."""
        document = self._document(kind, length, rng)
        room = length - self.count(document.text) - 8
        messages: list[dict[str, str]] = []
        for fact in self._questions(kind, document, rng):
            content = fact.question if messages else f"{document.text}\n\n{fact.question}"
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": fact.answer}]
            room -= self.count(fact.question) + self.count(fact.answer) + 6
            if room <= 0:
                break
        return list(self.tokenizer.apply_chat_template(messages)["input_ids"])

    def _document(self, kind: str, length: int, rng: random.Random) -> Document:
        # The part of the window that is document: mostly large, so that answers are far from their facts.
        target, seed = int(length * rng.uniform(0.4, 0.85)), rng.randrange(1 << 40)
        facts = rng.randint(4, max(5, length // 50)) if kind in _IN_TEXT else 0
        if kind == "needle" and rng.random() < 0.4:
            facts = 1  # a lone fact in much text is a task of its own
        passages = self._some_passages(length, rng) if kind in _IN_TEXT else ()
        counted = rng.choice((common_words_document, frequent_words_document))
        build: dict[str, Callable[[], Document]] = {
            "kv": lambda: kv_document(seed, target, self.count, "train"),
            "chain": lambda: chain_document(seed, target, self.count, "train", hops=(1, 2)),
            "copy": lambda: copy_document(seed, target, self.count, "train"),
            "count": lambda: counted(seed, int(length * 0.85), self.count),
            "needle": lambda: needle_document(seed, target, self.count, "train", facts, passages),
            "multiquery": lambda: needle_document(seed, target, self.count, "train", facts, passages),
            "multivalue": lambda: multivalue_document(seed, target, self.count, "train", 1 + facts // 6, passages),
        }
        return build[kind]()

    def _some_passages(self, length: int, rng: random.Random) -> Sequence[str]:
        return rng.sample(self.passages, 2 + length // 100)

    @staticmethod
    def _questions(kind: str, document: Document, rng: random.Random) -> list[Fact]:
        order = rng.sample(document.facts, len(document.facts))
        if kind != "multiquery":
            return order
        out: list[Fact] = []
        while order:
            size = rng.choice((2, 3, 4, 4))
            out.append(join_facts(order[:size]))
            order = order[size:]
        return out

    def batch(self, number: int, length: int, rows: int, mixture: Mixture) -> tuple[Ids, Weights]:
        """Batch ``number``: the same for the same seed, however training was interrupted."""
        rng = random.Random(f"{self.seed}/{number}")
        names = list(Mixture.__slots__)
        shares = [getattr(mixture, name) for name in names]
        drawn = [self.sequence(rng.choices(names, shares)[0], length, rng) for _ in range(rows)]
        return np.stack([ids for ids, _ in drawn]), np.stack([weights for _, weights in drawn])
