"""Scores of given continuations: right, read from the cache as it is stored, and each by itself."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from kvfold.engine.runner import ModelRunner
from kvfold.errors import CacheFullError
from kvfold.quality.lm_score import Likelihood, Scorer, Window, cut
from kvfold.recipe import Recipe
from tests.engine.tiny_engine import VOCAB, tiny_model

CONTEXT = 1400


@pytest.fixture(scope="module")
def model():
    return tiny_model(context=CONTEXT)


def tokens(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(count)]


def scores(model, windows: Sequence[Window], recipe: str = "raw", memory: int = 8 << 20) -> list[Likelihood]:
    """Scored in one go; every sequence is freed again."""
    runner = ModelRunner(model, recipe=Recipe.parse(recipe), kv_memory=memory, prefix_caching=False, check=False)
    try:
        found = dict(Scorer(runner).score(windows))
        runner.manager.check()
        assert not runner.manager.sequences()
    finally:
        runner.release()
    return [found[i] for i in range(len(windows))]


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    """Shared beginnings of more than one chunk, equal prompts, equal inputs, long continuations, no context."""
    preamble, other = tokens(1100, 0), tokens(600, 1)
    contexts = [preamble + tokens(20, 2), preamble + tokens(40, 3), preamble[:700], other, other, other, [1], [1]]
    continuations = [tokens(3, 4), tokens(1, 5), tokens(70, 6), [7], [8], tokens(5, 7), tokens(90, 8), tokens(1, 9)]
    return [cut(context, rest, CONTEXT) for context, rest in zip(contexts, continuations, strict=True)]


def expected(model, window: Window) -> Likelihood:
    """From one forward of transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([[*window.prompt, *window.inputs]])).logits[0, len(window.prompt) :]
    ids = torch.tensor(window.targets)
    chosen = logits.log_softmax(-1).gather(1, ids[:, None])
    return Likelihood(float(chosen.sum()), bool((logits.argmax(-1) == ids).all()))


def test_raw_is_what_transformers_says(model, windows) -> None:
    for found, window in zip(scores(model, windows), windows, strict=True):
        wanted = expected(model, window)
        assert found.logprob == pytest.approx(wanted.logprob, abs=2e-3)
        assert found.greedy == wanted.greedy


def test_a_likely_continuation_is_called_greedy(model) -> None:
    context = tokens(200, 10)
    likeliest = model.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False)[0, 200:].tolist()
    found = scores(model, [cut(context, likeliest, CONTEXT), cut(context, [*likeliest[:-1], 5], CONTEXT)])
    assert [one.greedy for one in found] == [True, likeliest[-1] == 5]


@pytest.mark.parametrize("recipe", ["raw", "int4", "int2,recent=32,sinks=0"])
def test_a_score_does_not_depend_on_the_others(model, windows, recipe) -> None:
    together = scores(model, windows, recipe)
    assert together == [scores(model, [window], recipe)[0] for window in windows]
    assert together == scores(model, windows[::-1], recipe)[::-1]


def test_the_first_scored_token_reads_the_packed_cache(model) -> None:
    window = cut(tokens(400, 11), [9], CONTEXT)  # a prompt shorter than one chunk, a continuation of one token
    raw, packed = (scores(model, [window], recipe)[0].logprob for recipe in ("raw", "int2"))
    assert abs(raw - packed) > 1e-3


def test_what_is_kept_gives_way_when_memory_is_short(model, windows) -> None:
    small = next(
        memory for memory in range(256 << 10, 8 << 20, 64 << 10) if _fits(model, max(windows, key=_length), memory)
    )
    assert scores(model, windows, memory=small) == scores(model, windows)


def _length(window: Window) -> int:
    return len(window.prompt) + len(window.inputs)


def _fits(model, window: Window, memory: int) -> bool:
    try:
        scores(model, [window], memory=memory)
    except CacheFullError:
        return False
    return True


def test_a_window_that_can_never_fit_is_an_error(model, windows) -> None:
    with pytest.raises(CacheFullError):
        scores(model, windows, memory=128 << 10)


def test_cut_keeps_the_end_of_the_context() -> None:
    assert cut([1, 2, 3], [4, 5], 10) == Window((1, 2), (3, 4), (4, 5))
    assert cut([1, 2, 3], [4, 5], 3) == Window((2,), (3, 4), (4, 5))
    assert cut(range(100), [100, 101], 4) == Window((97, 98), (99, 100), (100, 101))
    assert cut([1], [2, 3, 4], 3) == Window((), (1, 2, 3), (2, 3, 4))
