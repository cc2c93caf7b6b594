"""Retrieval reads few pages where one token goes in at a time: whatever measures it must go in like that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvfold.engine.runner import ModelRunner
from kvfold.quality.evaluate import EvalSettings, build_workload, evaluate
from kvfold.quality.lm_score import Scorer, Window, cut
from kvfold.quality.recipes import recipe_contestants
from kvfold.recipe import Recipe
from tests.engine.tiny_engine import byte_tokenizer, prompts_of, tiny_model

SETTINGS = EvalSettings(
    tasks=(),
    context=384,
    text_windows=1,
    scored_tokens=48,
    generation_tokens=24,
    generation_passages=1,
    decode_steps=0,
)
ALL = "raw,block=8+quest(pages=1000,dense=0)"
FEW = "raw,block=8+quest(pages=1,dense=0)"
LATER = "raw,block=8,recent=16+h2o(budget=48,every=8)"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(context=512)


def test_what_is_left_out_costs_something_and_what_is_read_costs_nothing(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {i * 7919 % 1000} of a text\n" for i in range(300)))
    work = build_workload(byte_tokenizer(), replace(SETTINGS, text=file), stop=frozenset({2}))
    contestants = recipe_contestants(model, [ALL, FEW, LATER])
    raw, whole, *others = evaluate(contestants, contestants[0], work)
    assert raw.kl_mean == 0
    assert whole.kl_mean is None  # nothing was left out: what would be measured is the full cache
    for row in others:
        assert row.kl_mean > 1e-4, row.contestant
        assert row.generation is not None
        assert row.generation.kl_mean > 1e-4, row.contestant
    assert others[0].top1_agreement < 1


def test_continuations_are_scored_step_by_step(model: Any) -> None:
    context, rest = prompts_of(300, 40)
    windows: list[Window] = [cut(context, rest, 512), cut(context[:200], rest[:1], 512)]
    found = {}
    for text in ("raw,block=8", ALL, FEW):
        runner = ModelRunner(model, recipe=Recipe.parse(text), kv_memory=4 << 20, prefix_caching=False, check=False)
        try:
            found[text] = dict(Scorer(runner).score(windows))
        finally:
            runner.release()
    for i in range(2):
        raw = found["raw,block=8"][i].logprob
        assert found[ALL][i].logprob == pytest.approx(raw, abs=1e-3)
        assert abs(found[FEW][i].logprob - raw) > 1e-2
