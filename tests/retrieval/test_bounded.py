"""Sampled attention: unbiased, within its error as often as it says, and the same again for the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvfold.attention.decode import attend_decode
from kvfold.attention.selected import PagesView, RetrievalAudit, Selected
from kvfold.cache import SequenceWork
from kvfold.engine.loading import load
from kvfold.engine.runner import ModelRunner, SeqWork
from kvfold.kernels.merge import merge
from kvfold.recipe import Recipe
from kvfold.retrieval.methods.bounded import Bounded
from tests.retrieval.worlds import KV_HEADS, World

LAYER = 1


def opened(recipe: str, length: int = 700) -> tuple[World, Selected, Tensor, object]:
    """A world, how its one sequence selects in a step that is open no more, and queries ``[1, Hq, D]``."""
    world = World(recipe)
    (seq,) = world.fill(length)
    step = world.cache.begin([SequenceWork(seq, 1)])
    tensors = world.draw(1)
    for layer, (_, k, v) in enumerate(tensors):
        step.write(layer, k, v)
    few = step._groups[0].few[0]
    assert few.selected is not None
    world.cache.abandon(step)
    return world, few.selected, tensors[LAYER][0] / 4, few


def view_of(world: World, selected: Selected, q: Tensor, position: int = 700) -> PagesView:
    registry, call = world.cache._layers.registry, world.call(LAYER)
    rest = attend_decode(q, LAYER, selected.rest, call, registry)
    pages = replace(selected.candidates[0], positions=torch.tensor([position]))
    return PagesView(pages, q, rest, LAYER, call, registry)


def test_one_page_alone_is_a_page_of_the_whole() -> None:
    for recipe in ("raw,block=8+bounded(pages=2,dense=0)", "int8,block=8+bounded(pages=4,dense=0)"):
        world, selected, q, _ = opened(recipe, 300)
        view = view_of(world, selected, q)
        count = view.shape[2]
        places = torch.arange(count).expand(1, KV_HEADS, -1)
        o, lse = view.each(places)
        total, all_lse = view.attend(places)
        joined = merge([(o[:, i], lse[:, i]) for i in range(count)])
        assert torch.allclose(joined[0], total, rtol=1e-2, atol=2e-3)
        assert torch.allclose(joined[1], all_lse, atol=1e-3)


class Fixed(Bounded):
    """Draws seven pages, whatever they hold."""

    def _budget(self, known: Any, pages: Any, there: Tensor, counts: tuple[Tensor, Tensor]) -> Tensor:
        return torch.full_like(counts[0], 7)


def test_the_estimate_of_a_sample_is_unbiased() -> None:
    world, selected, q, _ = opened("raw,block=8+bounded(pages=2,base=2,dense=0)")
    view = view_of(world, selected, q)
    count = view.shape[2]
    exact_o, exact_lse = view.attend(torch.arange(count).expand(1, KV_HEADS, -1))
    masses, outputs = [], []
    for seed in range(1200):
        view = view_of(world, selected, q)
        o, lse = Fixed(pages=2, base=3, seed=seed).attend(view)
        assert view.pages_read == KV_HEADS * (2 + 3 + 7)
        mass = (lse - exact_lse).exp()
        masses.append(mass)
        outputs.append(o * mass.unsqueeze(-1))
    for found, wanted in ((torch.stack(masses), torch.ones(())), (torch.stack(outputs), exact_o)):
        mean, noise = found.mean(0), found.std(0) / len(found) ** 0.5
        assert float(found.std(0).max()) > 0.01
        assert bool(((mean - wanted).abs() <= 4.5 * noise + 1e-4).all())


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.3])
def test_errors_are_rare_on_random_data(eps: float) -> None:
    delta = 0.1
    world, selected, q, few = opened("raw,block=8+bounded(pages=4,dense=0)", 1500)
    registry, call = world.cache._layers.registry, world.call(LAYER)
    exact, _ = attend_decode(q, LAYER, few.walks, call, registry)  # type: ignore[attr-defined]
    errors, outputs, read, there = [], [], 0, 0
    for seed in range(150):
        view = view_of(world, selected, q)
        o, _ = merge([view.rest, Bounded(pages=4, base=8, eps=eps, delta=delta, seed=seed).attend(view)])
        outputs.append(o)
        errors.append((o - exact).norm(dim=-1) / exact.norm(dim=-1))
        read, there = read + view.pages_read, there + int(view.there.sum())
    rate = float((torch.stack(errors) > eps).float().mean())
    # What stopping early adds to the mean is little beside the bound.
    assert float((torch.stack(outputs).mean(0) - exact).norm(dim=-1).div(exact.norm(dim=-1)).max()) < eps / 3
    # Heads of a seed share a sample: count seeds.
    noise = (delta * (1 - delta) / len(errors)) ** 0.5
    assert rate <= delta + 3 * noise, (rate, read / there)
    assert read < there


def test_a_looser_bound_reads_less_and_a_tight_one_everything() -> None:
    world, selected, q, few = opened("raw,block=8+bounded(pages=4,dense=0)", 1500)
    reads = []
    for eps in (1e-6, 0.1, 0.5):
        view = view_of(world, selected, q)
        o, lse = Bounded(pages=4, base=8, eps=eps).attend(view)
        reads.append(view.pages_read)
        if eps == 1e-6:
            exact, _ = attend_decode(q, LAYER, few.walks, world.call(LAYER), world.cache._layers.registry)  # type: ignore[attr-defined]
            assert torch.allclose(merge([view.rest, (o, lse)])[0], exact, atol=1e-5)
            assert view.pages_read == int(view.there.sum())
    assert reads == sorted(reads, reverse=True)
    assert len(set(reads)) == len(reads)


def test_the_draw_follows_from_seed_position_layer_and_nothing_else() -> None:
    text = "int8,block=8,recent=12+bounded(pages=2,base=4,eps=0.5,dense=0)"
    together, alone = World(text), World(text)
    sequences, mirror = (world.fill(400, 190, 330) for world in (together, alone))
    for _ in range(4):
        tensors = together.draw(3)
        outputs = together.step([(seq, 1) for seq in sequences], tensors)
        for row, seq in enumerate(mirror):
            own = [tuple(x[row : row + 1] for x in layer) for layer in tensors]
            for mine, other in zip(alone.step([(seq, 1)], own), outputs, strict=True):  # type: ignore[arg-type]
                assert torch.allclose(mine[0], other[row], rtol=1e-3, atol=1e-4)
    world, selected, q, _ = opened("raw,block=8+bounded(dense=0)")
    base = Bounded(pages=2, base=4, eps=0.5)

    def answer(method: Bounded, position: int) -> Tensor:
        return method.attend(view_of(world, selected, q, position))[0]

    assert torch.equal(answer(base, 700), answer(base, 700))
    assert not torch.equal(answer(base, 700), answer(base, 701))
    assert not torch.equal(answer(base, 700), answer(replace(base, seed=1), 700))


@pytest.mark.parametrize(
    "recipe", ["raw,block=8,recent=12+streaming(keep=0.6)", "int8,block=8,recent=12+random(keep=0.5)"]
)
def test_kept_pages_are_sampled_too(recipe: str) -> None:
    world = World(f"{recipe}+bounded(pages=2,base=4,eps=0.2,dense=0)")
    sequences = world.fill(300, 420)
    for seq in sequences:
        world.cache.retain(seq)
    assert world.cache.retriever is not None
    with world.cache.retriever.audit() as audit:
        for _ in range(20):
            world.step([(seq, 1) for seq in sequences])
    assert audit.error.numel() == 20 * 3 * 2 * KV_HEADS * 2
    assert 0 < audit.share_read < 1
    assert float(audit.error.max()) > 0
    assert audit.violations(0.2) <= 0.08


def audited(recipe: str, ids: list[int], prompt: int) -> RetrievalAudit:
    model, _ = load("bundled", dtype=torch.float32)
    runner = ModelRunner(model, recipe=Recipe.of(recipe, model.name_or_path), kv_memory=64 << 20, check=False)
    seq = runner.create()
    runner.execute([SeqWork(seq=seq, tokens=ids[:prompt], start=0, salt=b"", sample=True)])
    assert runner.cache.retriever is not None
    with runner.cache.retriever.audit() as audit:
        for at in range(prompt, len(ids)):
            runner.execute([SeqWork(seq=seq, tokens=[ids[at]], start=at, salt=b"", sample=True)])
    runner.release()
    return audit


def test_errors_are_rare_on_the_bundled_model() -> None:
    _model, tokenizer = load("bundled", dtype=torch.float32)
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[1].glob("test_c*.py")))
    ids = tokenizer.encode(text)[:1260]
    for eps in (0.05, 0.2):
        audit = audited(f"raw,block=8+bounded(pages=8,base=16,eps={eps},dense=1)", ids, 1200)
        assert audit.error.numel() == 60 * 3 * 4
        assert audit.share_read < 0.95
        assert audit.violations(eps) <= 0.05 + 0.04, (eps, audit.violations(eps), audit.share_read)


def test_an_audit_notes_what_quest_misses() -> None:
    world = World("raw,block=8,recent=12+quest(pages=3,dense=2)")
    sequences = world.fill(150, 20, 170)
    assert world.cache.retriever is not None
    with world.cache.retriever.audit() as audit:
        world.step([(seq, 1) for seq in sequences])
    world.step([(seq, 1) for seq in sequences])
    # Of three layers one selects, of three sequences two.
    assert [x.numel() for x in audit.errors] == [2 * KV_HEADS * 2]
    older = [len(world.pages(seq, 2, 0, world.cache.length(seq) - 1)[0]) for seq in (sequences[0], sequences[2])]
    assert audit.pages_read == 2 * KV_HEADS * 3
    assert abs(audit.pages - KV_HEADS * sum(older)) <= 2 * KV_HEADS
    assert float(audit.error.min()) > 0
    assert (audit.violations(0.0), audit.violations(99.0)) == (1.0, 0.0)
    assert (RetrievalAudit().share_read, RetrievalAudit().violations(0.1)) == (1.0, 0.0)
