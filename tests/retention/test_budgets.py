"""How pages are dealt: whole, never more than there are, floors held, and where they save most."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.clause import Clause
from kvfold.geometry import Geometry
from kvfold.recipe import Recipe
from kvfold.retention.build import build_method
from kvfold.retention.method import Notes
from kvfold.retention.repack import dealt
from tests.retention.views import layer_view, normal
from tests.test_cache import LLAMA

SIZE = 4
quick = settings(max_examples=150, deadline=None)


def method(text: str):
    return build_method(Clause.parse(text))


@st.composite
def layers(draw) -> tuple[list[torch.Tensor], int]:
    """Scores of layers with equally many candidates, some of them padding, and pages to deal."""
    count, heads, pages = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    scores = []
    for _ in range(count):
        spread = torch.rand(heads, 1, generator=generator) * 8
        x = torch.randn(heads, pages * SIZE, generator=generator) * spread
        for head in range(heads):
            x[head, draw(st.integers(0, pages)) * SIZE :] = -torch.inf
        scores.append(x)
    return scores, draw(st.integers(0, count * heads * pages))


DEALERS = (
    "random",
    "duo",
    "adakv(random)",
    "adakv(criticalkv(random),alpha=0)",
    "adakv(pyramidkv(random,beta=3),alpha=0.9)",
    "pyramidkv(random)",
    "pyramidkv(adakv(random))",
    "pyramidkv(duo)",
)


@quick
@given(layers(), st.sampled_from(DEALERS))
def test_no_more_is_dealt_than_there_is(case, text):
    scores, pages = case
    found = method(text).deal(scores, pages, SIZE, range(len(scores)))
    assert found.dtype == torch.int64
    assert torch.equal(dealt(found, scores, pages, SIZE), found)


@quick
@given(layers(), st.sampled_from((0.0, 0.2, 0.5, 1.0)))
def test_adakv_holds_its_floor_and_uses_what_the_layer_has(case, alpha):
    scores, pages = case
    found = method(f"adakv(random,alpha={alpha})").deal(scores, pages, SIZE, range(len(scores)))
    even = method("random").deal(scores, pages, SIZE, range(len(scores)))
    over = (pages - int(even.sum())) // len(scores)
    for mine, its, x in zip(found, even, scores, strict=True):
        have = (x > -torch.inf).sum(1) // SIZE
        total = int(its.sum()) + over
        assert int(mine.sum()) == min(total, int(have.sum()))
        floor = min(int(total / len(have) * alpha * SIZE), total // len(have) * SIZE)
        assert bool((mine * SIZE >= torch.minimum(torch.tensor(floor), have * SIZE)).all())


@pytest.mark.parametrize("seed", range(8))
def test_adakv_keeps_the_greatest_sum_that_whole_pages_allow(seed):
    scores = normal(3, 5 * SIZE, seed=seed).exp() * torch.tensor([[1.0], [3.0], [0.3]])
    found = method("adakv(random,alpha=0)").deal([scores], 6, SIZE, [0])[0]
    best = scores.sort(1, descending=True).values

    def worth(counts) -> float:
        return sum(float(row[: count * SIZE].sum()) for row, count in zip(best, counts, strict=True))

    others = [counts for counts in itertools.product(range(6), repeat=3) if sum(counts) == 6]
    assert worth(found.tolist()) == pytest.approx(max(worth(counts) for counts in others))


def test_pyramidkv_deals_along_a_line():
    scores = [torch.zeros(2, 100 * SIZE) for _ in range(5)]
    found = method("pyramidkv(random,beta=20)").deal(scores, 400, SIZE, range(5))
    # 40 pages a head on average: 2 at the top, 78 at the bottom, 19 between neighbours.
    assert found.tolist() == [[78, 78], [59, 59], [40, 40], [21, 21], [2, 2]]
    flat = method("pyramidkv(random,beta=1)").deal(scores, 400, SIZE, range(5))
    assert flat.tolist() == [[40, 40]] * 5


def test_pyramidkv_gives_what_a_layer_cannot_use_to_the_others():
    scores = [torch.zeros(2, 50 * SIZE) for _ in range(5)]
    found = method("pyramidkv(random)").deal(scores, 400, SIZE, range(5))
    assert found[:, 0].tolist() == [50, 45, 40, 35, 30]  # the lowest has no more; the uppermost gets the difference
    scores[0] = torch.zeros(2, 10 * SIZE)
    found = method("pyramidkv(random)").deal(scores, 300, SIZE, range(5))
    assert int(found.sum()) == 300
    assert int(found[0, 0]) == 10
    one = method("pyramidkv(random)").deal(scores[1:2], 60, SIZE, [1])
    assert one.tolist() == [[30, 30]]


# == duo


def gates_file(folder, **changes) -> str:
    path = folder / "gates.json"
    data = {"format": "kvfold-gates", "version": 1, "model_type": "llama", "sinks": 4, "recent": 8}
    path.write_text(json.dumps(data | {"gates": {"0": [0.1, 0.9], "1": [0.5, 0.9]}} | changes), encoding="utf-8")
    return str(path)


def test_duo_fills_heads_in_falling_order_of_gate(tmp_path):
    duo = method(f"duo({gates_file(tmp_path)})")
    views = []
    for layer in range(2):
        view = layer_view(normal(2, 40, 16), normal(2, 40, 16), candidates=slice(8, 32))
        view.layer = layer
        views.append(view)
    scores = [duo.score(view, Notes()) for view in views]
    assert scores[0].tolist() == [[pytest.approx(0.1)] * 24, [pytest.approx(0.9)] * 24]
    wanted = {0: [[0, 0], [0, 0]], 4: [[0, 4], [0, 0]], 9: [[0, 6], [0, 3]], 14: [[0, 6], [2, 6]], 24: [[6, 6]] * 2}
    for pages, counts in wanted.items():
        assert duo.deal(scores, pages, SIZE, [0, 1]).tolist() == counts


def test_duo_refuses_what_is_no_file_of_this_model(tmp_path):
    geometry = Geometry.from_config(LLAMA)
    assert method(f"duo({gates_file(tmp_path)})").refusals(geometry) == []
    for text, why in [("duo", "beside its weights"), (f"adakv(duo({tmp_path}/no.json))", "no such file")]:
        assert why in method(text).refusals(geometry)[0]
    for changes, why in [
        ({"model_type": "gemma3"}, "of a gemma3"),
        ({"gates": {"0": [0.1, 0.9]}}, "other layers or heads"),
        ({"gates": {"0": [0.1, 0.9], "1": [0.5]}}, "other layers or heads"),
        ({"version": 2}, "version"),
    ]:
        assert why in method(f"duo({gates_file(tmp_path, **changes)})").refusals(geometry)[0]


def test_files_beside_the_weights_are_found(tmp_path):
    recipe = Recipe.parse("raw+adakv(duo,keep=0.5)")
    assert recipe.located(tmp_path) == recipe
    path = gates_file(tmp_path)
    found = recipe.located(tmp_path)
    assert str(found) == f"raw+adakv(duo({path}),keep=0.5)"
    assert Recipe.parse(str(found)) == found
    assert found.located("/elsewhere") == found
    assert str(Recipe.of("int4+duo(keep=0.5)", tmp_path)) == f"int4+duo({path},keep=0.5)"
    assert str(Recipe.of("int4+duo(other.json,keep=0.5)", tmp_path)) == "int4+duo(other.json,keep=0.5)"
