"""Texts in which words must be counted: common words and frequent words, after RULER (arXiv 2404.06654, section 3)."""

from __future__ import annotations

import random
from collections import Counter

from kvfold.quality.tasks.documents import CountTokens, Document, Fact, fit
from kvfold.quality.tasks.words import ADJECTIVES, NOUNS

__all__ = ["common_words_document", "frequent_words_document"]

_COMMON = 4
_ZIPF = 2.0


def common_words_document(seed: int, target_tokens: int, count_tokens: CountTokens) -> Document:
    """A list in which four words stand several times as often as all others."""

    def build(items: int) -> Document:
        rng = random.Random(f"common/{seed}")
        words = rng.sample((*ADJECTIVES, *NOUNS), len(ADJECTIVES) + len(NOUNS))
        common, others = words[:_COMMON], words[_COMMON:]
        # Half of the list is common words; the others take turns, so that each stands about equally often.
        each = max(2, items // (2 * _COMMON))
        listed = common * each + [others[i % len(others)] for i in range(max(items - each * _COMMON, 0))]
        rng.shuffle(listed)
        order = sorted(common, key=listed.index)
        fact = Fact(f"Which {_COMMON} words stand there most often?", ", ".join(order), tuple(order))
        return Document("\n".join(f"- {word}" for word in listed), (fact,))

    return fit(build, target_tokens, count_tokens, low=4 * _COMMON)


def frequent_words_document(seed: int, target_tokens: int, count_tokens: CountTokens) -> Document:
    """Words drawn with Zipf's law; the three most frequent are asked for, in the order of their counts."""

    def build(items: int) -> Document:
        rng = random.Random(f"frequent/{seed}")
        words = rng.sample(NOUNS, 40)
        weights = [1 / (rank + 1) ** _ZIPF for rank in range(len(words))]
        while True:
            # One more of each earlier word makes ties rare. Those among the first four would leave the answer open.
            listed = [*rng.choices(words, weights, k=items), *[words[0]] * 3, *[words[1]] * 2, words[2]]
            ranked = sorted(Counter(listed).items(), key=lambda pair: (-pair[1], pair[0]))
            first = [count for _, count in ranked[:4]]
            if len(set(first)) == len(first):
                break
        rng.shuffle(listed)
        top = [word for word, _ in ranked[:3]]
        fact = Fact("Which three words are the most frequent, in order?", ", ".join(top), tuple(top))
        return Document(" ".join(listed), (fact,))

    return fit(build, target_tokens, count_tokens, low=12)
