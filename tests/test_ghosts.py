"""The experiment on ghost pages: budgets are kept, pages are the runtime's, the protocol by itself costs nothing."""

from __future__ import annotations

import pytest
import torch
from benchmarks.codecs.protocol import Passage
from benchmarks.ghosts.plans import Coded, plans
from benchmarks.ghosts.protocol import cost, rank, shuffled

from kvfold.engine.loading import load
from kvfold.geometry import Geometry


def test_plans_spend_no_more_than_the_budget_and_nearly_all_of_it() -> None:
    model, _ = load("bundled", dtype=torch.float32)
    geometry = Geometry.from_config(model.config)
    words = ("int4", "int2", "int2:calibrated")
    codes = {word: Coded(geometry, word, model.name_or_path, heads=2) for word in words}
    assert codes["int4"].page_bytes == 4 * 2 * 32 * 2 * (32 + 4)
    budget = 10 * codes["int4"].page_bytes
    found = plans(list(codes.values()), 10, 60)
    assert [len(plan.parts) for plan in found] == [1, 1, 1, *[2] * 6]
    for plan in found:
        spent = sum(codes[word].page_bytes * pages for word, pages in plan.parts)
        assert budget - max(code.page_bytes for code in codes.values()) < spent <= budget
    # No more tokens than there are.
    assert all(sum(pages for _, pages in plan.parts) <= 12 for plan in plans(list(codes.values()), 10, 12))


def test_a_passage_is_ranked_and_costs_what_is_dropped() -> None:
    model, tokenizer = load("bundled", dtype=torch.float32)
    ids = tokenizer.encode("\n".join(f"- amber-{i}: {i * 37}" for i in range(120)), add_special_tokens=False)[:420]
    ranked = [rank(model, Passage(kind, tuple(ids), 400), ["keydiff"]) for kind in ("text", "recall")]
    candidates = ranked[0].end - ranked[0].first
    assert (ranked[0].first, ranked[0].end) == (32, 320)
    for order in ranked[0].orders["keydiff"]:
        assert torch.equal(order.sort(dim=1).values, torch.arange(candidates).expand(2, -1))
    assert abs(shuffled(model, ranked[0], "keydiff")) < 1e-5
    geometry = Geometry.from_config(model.config)
    codes = {word: Coded(geometry, word, model.name_or_path, heads=2) for word in ("int4", "int2:calibrated")}
    all_of_it, some = (plans(list(codes.values()), pages, candidates // 32)[0] for pages in (candidates // 32, 2))
    dear, cheap = (cost(model, ranked, "keydiff", plan, codes) for plan in (some, all_of_it))
    assert 0 < cheap.recall_kl < dear.recall_kl
    assert cheap.text_kl == pytest.approx(cheap.recall_kl)


@pytest.mark.parametrize("word", ["int4", "int2:calibrated"])
def test_read_back_is_by_head_and_token(word: str) -> None:
    model, _ = load("bundled", dtype=torch.float32)
    code = Coded(Geometry.from_config(model.config), word, model.name_or_path, heads=2)
    k, v = torch.randn(2, 2, 96, 64, generator=torch.Generator().manual_seed(0)).mul(3)
    found = code.read_back(1, k, v)
    swapped = code.read_back(1, k[:, torch.arange(95, -1, -1)], v)
    assert found[0].shape == k.shape
    assert torch.allclose(swapped[0].flip(1), found[0], atol=1e-5)
    if word == "int4":
        for x, y in zip((k, v), found, strict=True):
            assert float((x - y).norm() / x.norm()) < 0.1
