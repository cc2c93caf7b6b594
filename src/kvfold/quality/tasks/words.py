"""The words of the recall tasks, and the two disjoint sets of keys made of them.

A key is a pair of words, and the pairs (not the words) are divided into ``"train"`` and ``"heldout"``: a model that is
scored on held-out keys cannot answer from its weights. Plain English words and digits, which every tokenizer knows.
"""

from __future__ import annotations

import random
from typing import Literal

__all__ = ["ADJECTIVES", "ATTRIBUTES", "NAMES", "NOUNS", "Key", "Split", "draw_digits", "draw_keys", "is_heldout"]

Split = Literal["train", "heldout"]
Key = tuple[str, str]

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


def is_heldout(key: Key) -> bool:
    """Whether a word pair is kept out of training (one pair in eight, spread over all words)."""
    return (ADJECTIVES.index(key[0]) * 5 + NOUNS.index(key[1]) * 3) % 8 == 0


_KEYS: dict[Split, tuple[Key, ...]] = {
    "train": tuple((a, n) for a in ADJECTIVES for n in NOUNS if not is_heldout((a, n))),
    "heldout": tuple((a, n) for a in ADJECTIVES for n in NOUNS if is_heldout((a, n))),
}


def draw_keys(rng: random.Random, count: int, split: Split) -> list[Key]:
    """Draw ``count`` distinct word pairs of one split; when there are no more, pairs come again with a number."""
    pairs = _KEYS[split]
    if count <= len(pairs):
        return rng.sample(pairs, count)
    rounds = -(-count // len(pairs))
    return rng.sample([(a, f"{n}{i or ''}") for i in range(rounds) for a, n in pairs], count)


def draw_digits(rng: random.Random) -> str:
    """Four random digits."""
    return f"{rng.randrange(10_000):04d}"
