"""The tasks: a document with exactly one question, and how an answer is scored.

The names are RULER's (arXiv 2404.06654) where it has the task; ``kv`` is a key-value lookup, ``copy`` asks for a line
in full. Values stand in real text for the ``niah`` tasks, and among their like for the others.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from kvfold.quality.tasks.counting import common_words_document, frequent_words_document
from kvfold.quality.tasks.documents import (
    CountTokens,
    Document,
    Fact,
    chain_document,
    copy_document,
    kv_document,
    multivalue_document,
    needle_document,
)
from kvfold.quality.tasks.words import Split

__all__ = ["TASKS", "Sample", "join_facts", "make_sample", "score"]

TASKS: tuple[str, ...] = (
    "niah_single",
    "niah_multikey",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "kv",
    "copy",
)
"""The task names `make_sample` knows."""

_KEYS = 4  # planted facts of multikey, and questions of multiquery
# Room for the question, the answer and the chat template's own tokens.
_RESERVE = {"niah_multivalue": 110, "niah_multiquery": 170}
_RESERVE_ELSE = 50


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about a context, its answer in full, and the values an answer must hold."""

    task: str
    context: str
    question: str
    answer: str
    references: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The content of the user's turn: the context, an empty line, the question."""
        return f"{self.context}\n\n{self.question}"


def join_facts(facts: list[Fact]) -> Fact:
    """Several facts asked for at once: the questions and the answers one after the other."""
    return Fact(
        " ".join(fact.question for fact in facts),
        " ".join(fact.answer for fact in facts),
        tuple(value for fact in facts for value in fact.references),
    )


def make_sample(
    task: str,
    seed: int,
    target_tokens: int,
    count_tokens: CountTokens,
    split: Split = "heldout",
    depth: float | None = None,
) -> Sample:
    """One question of one of `TASKS`, its prompt about ``target_tokens`` long. ValueError for an unknown task.

    ``depth``: where in the text the fact stands that is asked for, from 0 (first) to 1 (last); tasks that ask for
    facts all over the text leave it unused. None: at random.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    target = target_tokens - _RESERVE.get(task, _RESERVE_ELSE)
    build: dict[str, Callable[[], Document]] = {
        "niah_single": lambda: needle_document(seed, target, count_tokens, split, facts=1, depth=depth),
        "niah_multikey": lambda: needle_document(seed, target, count_tokens, split, facts=_KEYS),
        "niah_multivalue": lambda: multivalue_document(seed, target, count_tokens, split),
        "niah_multiquery": lambda: needle_document(seed, target, count_tokens, split, facts=2 * _KEYS),
        "vt": lambda: chain_document(seed, target, count_tokens, split),
        "cwe": lambda: common_words_document(seed, target, count_tokens),
        "fwe": lambda: frequent_words_document(seed, target, count_tokens),
        "kv": lambda: kv_document(seed, target, count_tokens, split),
        "copy": lambda: copy_document(seed, target, count_tokens, split),
    }
    document = build[task]()
    rng = random.Random(f"ask/{task}/{seed}")
    if task == "niah_multiquery":
        fact = join_facts(rng.sample(document.facts, _KEYS))
    elif depth is None:
        fact = rng.choice(document.facts)
    else:
        fact = document.facts[round(depth * (len(document.facts) - 1))]
    return Sample(task, document.text, fact.question, fact.answer, fact.references)


def score(sample: Sample, said: str) -> float:
    """Share of the sample's references that stand in what was said, as whole words; case does not matter."""
    found = sum(bool(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said, re.I)) for value in sample.references)
    return found / len(sample.references)
