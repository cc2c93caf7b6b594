"""Texts with planted facts: what the recall tasks ask about.

Every generator takes a seed and a target length in tokens and returns a `Document`: a text, and the facts that can be
asked about it in the order in which they stand there. The same code makes the training data, which keeps the wording of
questions identical in training, evaluation and the demo.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvfold.quality.tasks.text import passages_of, real_text
from kvfold.quality.tasks.words import ATTRIBUTES, NAMES, NOUNS, Key, Split, draw_digits, draw_keys

__all__ = [
    "CountTokens",
    "Document",
    "Fact",
    "chain_document",
    "copy_document",
    "demo_document",
    "fit",
    "kv_document",
    "multivalue_document",
    "needle_document",
    "plant",
]

CountTokens = Callable[[str], int]
"""Tokens of a text."""

_VALUES_PER_KEY = 4


@dataclass(frozen=True, slots=True)
class Fact:
    """A question, its answer (a whole statement that ends in the value), and the values that an answer must hold."""

    question: str
    answer: str
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the facts in it."""

    text: str
    facts: tuple[Fact, ...]


def fit(build: Callable[[int], Document], target: int, count_tokens: CountTokens, low: int = 1) -> Document:
    """The largest document of ``build(n_items)`` that keeps to ``target`` tokens, found from two probes.

    ``build`` must be deterministic in ``n_items``; token counts grow almost linearly, so a secant step and a short
    walk down suffice and no search over full-length texts is needed.
    """
    first, second = count_tokens(build(low).text), count_tokens(build(low + 8).text)
    slope = max((second - first) / 8, 1.0)
    items = max(low, low + int((target - first) / slope))
    document = build(items)
    while items > low and (excess := count_tokens(document.text) - target) > 0:
        items = max(low, items - max(1, int(excess / slope)))
        document = build(items)
    return document


def kv_document(seed: int, target_tokens: int, count_tokens: CountTokens, split: Split = "heldout") -> Document:
    """Lines such as ``- amber-falcon: 4821``; every line can be asked for, and is the answer."""

    def build(items: int) -> Document:
        rng = random.Random(f"kv/{seed}")
        names = ["-".join(key) for key in draw_keys(rng, items, split)]
        pairs = [(name, draw_digits(rng)) for name in names]
        text = "\n".join(f"- {name}: {value}" for name, value in pairs)
        facts = (Fact(f"What is the value of {name}?", f"{name}: {value}", (value,)) for name, value in pairs)
        return Document(text, tuple(facts))

    return fit(build, target_tokens, count_tokens)


def chain_document(
    seed: int, target_tokens: int, count_tokens: CountTokens, split: Split = "heldout", hops: Sequence[int] = (2,)
) -> Document:
    """Assignments in which names take other names' values; the facts are the names that are ``hops`` references away
    from their value.

    An answer follows the chain: ``c = b = a = 4821`` where the text says ``c = b``, ``b = a`` and ``a = 4821``.
    """
    longest = max(hops)

    def build(items: int) -> Document:
        rng = random.Random(f"chain/{seed}")
        names = ["-".join(key) for key in draw_keys(rng, max(items, longest + 1), split)]
        chains: dict[str, list[str]] = {}
        lines: list[str] = []
        facts: list[Fact] = []
        for index, name in enumerate(names):
            # The first names make one chain of full length, so that even a short text can be asked.
            open_ends = [other for other in chains if len(chains[other]) - 2 < longest]
            refers = 0 < index <= longest or (bool(open_ends) and index > 0 and rng.random() < 0.55)
            source = names[index - 1] if 0 < index <= longest else rng.choice(open_ends) if refers else ""
            chains[name] = [name, *chains[source]] if refers else [name, draw_digits(rng)]
            lines.append(f"- {name} = {chains[name][1]}")
            if len(chains[name]) - 2 in hops:
                facts.append(Fact(f"What does {name} come to?", " = ".join(chains[name]), (chains[name][-1],)))
        return Document("\n".join(lines), tuple(facts))

    return fit(build, target_tokens, count_tokens, low=longest + 1)


def copy_document(seed: int, target_tokens: int, count_tokens: CountTokens, split: Split = "heldout") -> Document:
    """Lines of random words, each of which can be asked for in full."""

    def build(items: int) -> Document:
        rng = random.Random(f"copy/{seed}")
        lines = [(" ".join(key), " ".join(rng.choices(NOUNS, k=8))) for key in draw_keys(rng, items, split)]
        text = "\n".join(f"- {name}: {words}" for name, words in lines)
        facts = (Fact(f"Copy the line of {name}.", f"{name}: {words}", (words,)) for name, words in lines)
        return Document(text, tuple(facts))

    return fit(build, target_tokens, count_tokens)


def _statement(rng: random.Random, key: Key) -> Fact:
    attribute, kind = rng.choice(ATTRIBUTES)
    value = draw_digits(rng) if kind == "digits" else rng.choice(NAMES)
    subject = f"the {attribute} of the {' '.join(key)}"
    verb = "What is" if kind == "digits" else "Who is"
    return Fact(f"{verb} {subject}?", f"T{subject[1:]} is {value}.", (value,))


def plant(
    rng: random.Random, lines: Sequence[str], count: int, split: Split = "heldout", depth: float | None = None
) -> Document:
    """Plant ``count`` facts between lines of text, at random places or all at ``depth`` (0: first, 1: last); no two
    facts share a key.
    """
    out = list(lines)
    if depth is None:
        places = sorted(rng.choices(range(len(out) + 1), k=count), reverse=True)
    else:
        places = [round(depth * len(out))] * count
    facts: list[Fact] = []
    for place, key in zip(places, draw_keys(rng, count, split), strict=True):
        facts.append(_statement(rng, key))
        # Going from the end to the front keeps the remaining places valid.
        out.insert(place, facts[-1].answer)
    return Document("\n".join(out), tuple(reversed(facts)))


def _haystack(rng: random.Random, budget: int, count_tokens: CountTokens, passages: Sequence[str] | None) -> list[str]:
    """Whole lines of one or more passages of real text, in order, up to ``budget`` tokens."""
    pool = list(passages if passages is not None else passages_of(real_text()))
    rng.shuffle(pool)
    lines: list[str] = []
    used = 0
    for passage in pool:
        for line in [*passage.split("\n"), ""]:
            used += count_tokens(line + "\n")
            if used > budget:
                return lines
            lines.append(line)
    return lines


def needle_document(
    seed: int,
    target_tokens: int,
    count_tokens: CountTokens,
    split: Split = "heldout",
    facts: int = 8,
    passages: Sequence[str] | None = None,
    depth: float | None = None,
) -> Document:
    """Facts planted in real text, up to the target length."""
    rng = random.Random(f"needle/{seed}")
    planted = count_tokens(plant(random.Random(seed), [], facts, split).text)
    lines = _haystack(rng, target_tokens - planted, count_tokens, passages)
    return plant(rng, lines, facts, split, depth)


def multivalue_document(
    seed: int,
    target_tokens: int,
    count_tokens: CountTokens,
    split: Split = "heldout",
    keys: int = 2,
    passages: Sequence[str] | None = None,
) -> Document:
    """Keys that have several values each, planted one by one in real text; all values of a key are asked for."""
    rng = random.Random(f"multivalue/{seed}")
    statements: list[tuple[int, str, str]] = []
    subjects: list[str] = []
    for index, key in enumerate(draw_keys(rng, keys, split)):
        attribute = rng.choice([name for name, kind in ATTRIBUTES if kind == "digits"])
        subjects.append(f"the {attribute}s of the {' '.join(key)}")
        values = {draw_digits(rng): None for _ in range(_VALUES_PER_KEY)}
        statements += [(index, f"One of {subjects[-1]} is {value}.", value) for value in values]
    rng.shuffle(statements)
    planted = count_tokens("\n".join(text for _, text, _ in statements))
    lines = _haystack(rng, target_tokens - planted, count_tokens, passages)
    places = sorted(rng.choices(range(len(lines) + 1), k=len(statements)), reverse=True)
    for place, (_, text, _) in zip(places, reversed(statements), strict=True):
        lines.insert(place, text)
    facts = []
    for index, subject in enumerate(subjects):
        own = [(text, value) for number, text, value in statements if number == index]
        answer = " ".join(text for text, _ in own)
        facts.append(Fact(f"What are all {subject}?", answer, tuple(value for _, value in own)))
    return Document("\n".join(lines), tuple(facts))


def demo_document(seed: int, target_tokens: int, count_tokens: CountTokens, facts: int = 8) -> Document:
    """The demo's document: a stretch of the Python documentation with ``facts`` planted facts and their questions."""
    return needle_document(seed, target_tokens, count_tokens, facts=facts)
