"""Recall tasks: texts with planted facts and the questions that ask for them.

Every generator takes a ``random.Random`` and a target length in tokens and returns a `Document`: a text plus the
facts that can be asked about it.  A `Sample` is a document with exactly one of its questions.  Nothing here needs
torch, so the command line can build its demo document before a model is loaded, and the same code makes the
training data, which keeps the wording of questions identical in training, evaluation and the demo.

Two disjoint sets of keys exist, ``"train"`` and ``"heldout"``: a key is a pair of words, and the pairs (not the
words) are divided.  A model scored on held-out keys therefore cannot answer from its weights.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ADJECTIVES",
    "ATTRIBUTES",
    "NAMES",
    "NOUNS",
    "TASKS",
    "Document",
    "Sample",
    "Split",
    "copy_document",
    "demo_document",
    "draw_keys",
    "kv_document",
    "make_sample",
    "multi_question",
    "needle_document",
    "passages_of",
    "plant",
    "real_text",
    "trace_document",
]

Split = Literal["train", "heldout"]
CountTokens = Callable[[str], int]

ADJECTIVES: tuple[str, ...] = tuple(
    """amber ancient azure bitter blue bold brave bright broken bronze calm careful clever cold copper crimson curious
    dark deep distant dusty eager early empty fancy fierce frozen gentle giant golden grand green happy heavy hidden
    hollow honest humble icy iron ivory jolly kind late lively lonely loud lucky mellow misty modern narrow nimble
    noble northern orange pale patient plain polite proud purple quick quiet rapid rare red round royal rustic salty
    scarlet secret sharp shiny silent silver simple slow small smooth snowy soft solid southern spare steady stormy
    strong sunny sweet swift tall tender thin tidy tiny vast velvet warm white wild windy wise wooden
    yellow young""".split()
)
NOUNS: tuple[str, ...] = tuple(
    """anchor apple arrow badger barrel basket beacon bell bishop bottle bridge bucket cabin camel candle canyon
    castle cedar chapel cherry cliff clock cloud comet copse coral cottage crane crow dagger desert diamond dolphin
    dragon eagle ember falcon farm feather ferry field flame forest fountain fox garden gate glacier hammer harbor
    hawk heron hill hotel island jacket jungle kettle kitchen ladder lake lantern lemon library lion lizard maple
    market meadow mill mirror monkey mountain museum needle oak ocean orchard otter owl palace panther parrot pearl
    pepper piano pigeon planet pond prairie quarry rabbit raven reef ribbon river rocket saddle salmon school ship
    shore sparrow spider station stone storm studio temple theater tiger tower trail tulip tunnel turtle valley
    village violin wagon walnut whale willow window winter wolf workshop""".split()
)
NAMES: tuple[str, ...] = tuple(
    """Adam Alice Anna Arthur Bella Carl Clara Daniel David Diana Edward Elena Emma Felix Frank George Grace Hannah
    Harold Helen Henry Iris Jack Jacob James Julia Karen Laura Leon Linda Louis Lucy Maria Martin Mary Nora Oliver
    Oscar Paul Peter Rachel Robert Rosa Ruth Samuel Sarah Simon Sofia Thomas Victor""".split()
)
#: What a planted fact says about its key, and how its value is drawn.
ATTRIBUTES: tuple[tuple[str, Literal["digits", "name"]], ...] = (
    ("access code", "digits"),
    ("serial number", "digits"),
    ("postal code", "digits"),
    ("phone number", "digits"),
    ("account number", "digits"),
    ("ticket number", "digits"),
    ("owner", "name"),
    ("keeper", "name"),
)
#: The task names `make_sample` knows.
TASKS: tuple[str, ...] = ("single", "multi", "needle", "trace", "copy")

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the facts in it, as ``(question, answer)`` pairs; an answer is a whole statement that ends in the
    value.
    """

    text: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about a context; ``answers`` holds the parts where several values are asked for."""

    task: str
    context: str
    question: str
    answer: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The content of the user's turn: the context, an empty line, the question."""
        return f"{self.context}\n\n{self.question}"


def is_heldout(key: Key) -> bool:
    """Whether a word pair is kept out of training (one pair in eight, spread over all words)."""
    return (ADJECTIVES.index(key[0]) * 5 + NOUNS.index(key[1]) * 3) % 8 == 0


_KEYS: dict[Split, tuple[Key, ...]] = {
    "train": tuple((a, n) for a in ADJECTIVES for n in NOUNS if not is_heldout((a, n))),
    "heldout": tuple((a, n) for a in ADJECTIVES for n in NOUNS if is_heldout((a, n))),
}


def draw_keys(rng: random.Random, count: int, split: Split) -> list[Key]:
    """Draw ``count`` distinct word pairs of one split."""
    return rng.sample(_KEYS[split], count)


def _digits(rng: random.Random) -> str:
    return f"{rng.randrange(10_000):04d}"


def _fit(build: Callable[[int], Document], target: int, count_tokens: CountTokens, low: int = 1) -> Document:
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


def kv_document(
    seed: int, target_tokens: int, count_tokens: CountTokens, split: Split = "heldout", reserve: int = 0
) -> Document:
    """Lines such as ``- amber-falcon: 4821``; every line can be asked for, and is the answer.  ``reserve`` tokens are
    left free.
    """

    def build(items: int) -> Document:
        rng = random.Random(f"kv/{seed}")
        names = ["-".join(key) for key in draw_keys(rng, items, split)]
        pairs = [(name, _digits(rng)) for name in names]
        text = "\n".join(f"- {name}: {value}" for name, value in pairs)
        return Document(text, tuple((f"What is the value of {name}?", f"{name}: {value}") for name, value in pairs))

    return _fit(build, target_tokens - reserve, count_tokens)


def multi_question(document: Document, picked: Sequence[int]) -> tuple[str, str]:
    """One question for several values of a `kv_document`, and its answer: their lines in the order asked."""
    names = [document.facts[i][0].removeprefix("What is the value of ").removesuffix("?") for i in picked]
    return f"What are the values of {', '.join(names)}?", ", ".join(document.facts[i][1] for i in picked)


def trace_document(
    seed: int, target_tokens: int, count_tokens: CountTokens, split: Split = "heldout", reserve: int = 0
) -> Document:
    """Assignments in which some names take another name's value, so that an answer needs one or two hops."""

    def build(items: int) -> Document:
        rng = random.Random(f"trace/{seed}")
        names = ["-".join(key) for key in draw_keys(rng, max(items, 3), split)]
        value: dict[str, str] = {}
        lines: list[str] = []
        facts: list[tuple[str, str]] = []
        roots: list[str] = []
        for name in names:
            # A third of the names refer to an earlier one: that gives chains of mostly one and two hops.
            if roots and rng.random() < 0.34:
                source = rng.choice(roots)
                value[name] = value[source]
                lines.append(f"- {name} = {source}")
                facts.append((f"What does {name} come to?", f"{name} = {value[name]}"))
                if rng.random() < 0.3:
                    roots.append(name)
            else:
                value[name] = _digits(rng)
                lines.append(f"- {name} = {value[name]}")
                roots.append(name)
        if not facts:
            lines[-1] = f"- {names[-1]} = {names[0]}"
            facts.append((f"What does {names[-1]} come to?", f"{names[-1]} = {value[names[0]]}"))
        return Document("\n".join(lines), tuple(facts))

    return _fit(build, target_tokens - reserve, count_tokens, low=3)


def copy_document(
    seed: int, target_tokens: int, count_tokens: CountTokens, split: Split = "heldout", reserve: int = 0
) -> Document:
    """Numbered lines of random words, each of which can be asked for in full."""

    def build(items: int) -> Document:
        rng = random.Random(f"copy/{seed}")
        lines = [f"{' '.join(key)}: {' '.join(rng.choices(NOUNS, k=8))}" for key in draw_keys(rng, items, split)]
        facts = [tuple(line.split(": ")) for line in lines]
        text = "\n".join(f"- {line}" for line in lines)
        return Document(text, tuple((f"Copy the line of {name}.", f"{name}: {words}") for name, words in facts))

    return _fit(build, target_tokens - reserve, count_tokens)


def plant(rng: random.Random, lines: Sequence[str], count: int, split: Split = "heldout") -> Document:
    """Plant ``count`` facts between lines of text; no two facts share a key."""
    out = list(lines)
    places = sorted(rng.choices(range(len(out) + 1), k=count), reverse=True)
    facts: list[tuple[str, str]] = []
    for place, (adjective, noun) in zip(places, draw_keys(rng, count, split), strict=True):
        attribute, kind = rng.choice(ATTRIBUTES)
        value = _digits(rng) if kind == "digits" else rng.choice(NAMES)
        subject = f"the {attribute} of the {adjective} {noun}"
        verb = "What is" if kind == "digits" else "Who is"
        statement = f"T{subject[1:]} is {value}."
        facts.append((f"{verb} {subject}?", statement))
        # Going from the end to the front keeps the remaining places valid.
        out.insert(place, statement)
    return Document("\n".join(out), tuple(reversed(facts)))


def needle_document(
    seed: int,
    target_tokens: int,
    count_tokens: CountTokens,
    split: Split = "heldout",
    reserve: int = 0,
    facts: int = 8,
    passages: Sequence[str] | None = None,
) -> Document:
    """Facts planted in real text: whole lines of one or more passages, in order, up to the target length."""
    rng = random.Random(f"needle/{seed}")
    pool = list(passages if passages is not None else passages_of(real_text()))
    rng.shuffle(pool)
    budget = target_tokens - reserve
    lines: list[str] = []
    used = count_tokens(plant(random.Random(seed), [], facts, split).text)
    for passage in pool:
        for line in [*passage.split("\n"), ""]:
            used += count_tokens(line + "\n")
            if used > budget:
                return plant(rng, lines, facts, split)
            lines.append(line)
    return plant(rng, lines, facts, split)


def real_text() -> str:
    """The running Python's own language documentation: plain text that every installation carries."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics))


def passages_of(text: str, minimum: int = 600) -> list[str]:
    """Cut a text at empty lines into passages of at least ``minimum`` characters."""
    passages: list[str] = []
    current: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        current.append(paragraph)
        size += len(paragraph)
        if size >= minimum:
            passages.append("\n\n".join(current))
            current, size = [], 0
    if current:
        passages.append("\n\n".join(current))
    return passages


def demo_document(seed: int, target_tokens: int, count_tokens: CountTokens, facts: int = 8) -> Document:
    """The demo's document: a stretch of the Python documentation with ``facts`` planted facts and their questions."""
    return needle_document(seed, target_tokens, count_tokens, facts=facts)


def make_sample(
    task: str, seed: int, target_tokens: int, count_tokens: CountTokens, split: Split = "heldout", keys: int = 4
) -> Sample:
    """One question of one of `TASKS`, its prompt about ``target_tokens`` long (``keys``: how many "multi" asks)."""
    rng = random.Random(f"ask/{task}/{seed}")
    # Room for the question, the answer and the chat template's own tokens.
    reserve = 20 + 12 * keys if task == "multi" else 40
    if task in ("single", "multi"):
        document = kv_document(seed, target_tokens, count_tokens, split, reserve)
    elif task == "needle":
        document = needle_document(seed, target_tokens, count_tokens, split, reserve)
    elif task == "trace":
        document = trace_document(seed, target_tokens, count_tokens, split, reserve)
    elif task == "copy":
        document = copy_document(seed, target_tokens, count_tokens, split, reserve)
    else:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if task == "multi":
        picked = rng.sample(range(len(document.facts)), min(keys, len(document.facts)))
        question, answer = multi_question(document, picked)
        return Sample(task, document.text, question, answer, tuple(answer.split(", ")))
    question, answer = rng.choice(document.facts)
    return Sample(task, document.text, question, answer, (answer,))
