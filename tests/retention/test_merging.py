"""Methods that merge what they drop: what the merged tokens give, and what becomes of their biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from kvfold.clause import Clause
from kvfold.engine.runner import ModelRunner, SeqWork
from kvfold.errors import RecipeError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.recipe import Recipe
from kvfold.retention.build import build_method, refusals
from kvfold.retention.matching import References, fit_factors, fit_values
from kvfold.retention.method import Merged, Notes, RetentionMethod, Seen
from kvfold.retention.methods.attention_matching import AttentionMatching
from kvfold.retention.methods.keepkv import KeepKV
from kvfold.retention.sample import QuerySample
from kvfold.retention.view import LayerFacts, LayerView
from tests.calibrations import tiny, tokens
from tests.conformance.families import tiny_config

FIRST, LAST = 3, 5  # tokens before and behind the candidates


def view_of(k: Tensor, v: Tensor, **facts: object) -> LayerView:
    """All of ``k, v [T, H, D]`` but a few at the ends are candidates."""
    known = LayerFacts(nn.Identity(), scale=k.shape[-1] ** -0.5, **facts)  # type: ignore[arg-type]
    return LayerView(0, 0, list, known, slice(FIRST, k.shape[0] - LAST), (k, v))


def seen_by(method: RetentionMethod, view: LayerView, q: Tensor, notes: Notes | None = None) -> Notes:
    notes = notes or Notes()
    k, v = (x.transpose(0, 1) for x in (view.keys(), view.values()))
    method.observe(Seen(view, q, k[-q.shape[0] :], v[-q.shape[0] :]), notes)
    return notes


def output(view: LayerView, q: Tensor, kept: Tensor, merged: Merged | None) -> Tensor:
    """``[H, R, Dv]``: what all queries get of the ends and of the kept candidates, merged or as they were."""
    rows, columns = References(view, q).rows, torch.arange(view.columns)
    ends = columns[(columns < view.candidates.start) | (columns >= view.candidates.stop)]
    outs = []
    for head in range(view.kv_heads):
        own = kept[head][kept[head] >= 0]
        if merged is None:
            k, v = view.keys(view.candidates)[head, own], view.values(view.candidates)[head, own]
            bias = torch.zeros(len(own))
        else:
            there = kept[head] >= 0
            k, v, bias = merged.k[head][there], merged.v[head][there], merged.bias[head][there]
        logits = torch.cat(
            (view.logits(rows[head], view.keys()[head, ends]), view.logits(rows[head], k) + bias), dim=-1
        )
        outs.append(logits.softmax(-1) @ torch.cat((view.values()[head, ends], v)))
    return torch.stack(outs)


def everything(view: LayerView) -> Tensor:
    return torch.arange(view.candidates.stop - view.candidates.start).expand(view.kv_heads, -1)


def random_view(count: int, heads: int = 2, dim: int = 16, queries: int = 4, seed: int = 0) -> tuple[LayerView, Tensor]:
    """Correlated tokens, as those of texts are, and ``count`` queries ``[count, queries, D]``."""
    g = torch.Generator().manual_seed(seed)
    topics = torch.randn(8, heads, dim, generator=g)
    k = topics[torch.randint(8, (count,), generator=g)] + 0.5 * torch.randn(count, heads, dim, generator=g)
    v = torch.randn(count, heads, dim, generator=g)
    return view_of(k, v), torch.randn(count, queries, dim, generator=g)


# == keepkv


def test_two_tokens_with_one_key_become_their_mean_with_two_votes() -> None:
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(FIRST + 2 + LAST, 1, 8, generator=g) for _ in range(2))
    k[FIRST + 1] = k[FIRST]
    view, q = view_of(k, v), torch.randn(4, 2, 8, generator=g)
    method, kept = KeepKV(latest=4), torch.tensor([[1]])
    merged = method.merge(view, seen_by(method, view, q), torch.tensor([[0.0, 1.0]]), kept)
    assert torch.allclose(merged.bias, torch.tensor([[2.0]]).log(), atol=1e-5)
    assert torch.allclose(merged.v[0, 0], v[FIRST : FIRST + 2, 0].mean(0), atol=1e-5)
    assert bool(merged.fresh.all())
    anyone = torch.randn(9, 2, 8, generator=g)  # not only for the queries it was merged for
    assert torch.allclose(output(view, anyone, kept, merged), output(view, anyone, everything(view), None), atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_reference_query_sees_no_difference(seed: int) -> None:
    view, q = random_view(60, heads=2, queries=2, seed=seed)  # one query head to a KV head
    method = KeepKV(similarity=-1.0, latest=1)
    scores = torch.rand(2, view.candidates.stop - view.candidates.start)
    kept = scores.topk(6).indices.sort(dim=1).values
    merged = method.merge(view, seen_by(method, view, q), scores, kept)
    whole = output(view, q[-1:], everything(view), None)
    assert torch.allclose(output(view, q[-1:], kept, merged), whole, atol=1e-4)
    assert not torch.allclose(output(view, q[-1:], kept, None), whole, atol=1e-2)
    votes = merged.bias.exp()
    assert bool((votes >= 1 - 1e-4).all())
    assert bool((votes.sum(1) <= scores.shape[1] + 1e-3).all())


def test_what_is_not_alike_is_dropped_and_padding_never_counts() -> None:
    view, q = random_view(40, heads=1, queries=1)
    method, count = KeepKV(similarity=1.0), 32
    scores = torch.rand(1, count)
    scores[0, 10:] = -torch.inf
    kept = torch.tensor([[2, 7, -1]])
    merged = method.merge(view, seen_by(method, view, q), scores, kept)
    assert not merged.fresh.any()
    assert not merged.bias[0, :2].any()
    loose = KeepKV(similarity=-1.0).merge(view, seen_by(method, view, q), scores, kept)
    assert bool(loose.fresh[0, :2].all())
    assert float(loose.bias[0, :2].exp().sum()) <= 10
    assert torch.isfinite(loose.k[0, :2]).all()
    assert torch.isfinite(loose.v[0, :2]).all()


# == attention matching


@pytest.mark.parametrize("seed", range(3))
def test_matching_beats_dropping_on_its_queries(seed: int) -> None:
    view, q = random_view(300, seed=seed)
    method = AttentionMatching(latest=0, spread=40)
    notes = seen_by(method, view, q)
    sample = QuerySample(0, 40).queries(notes)
    scores = method.score(view, notes)
    kept = scores.topk(24).indices.sort(dim=1).values
    whole = output(view, sample, everything(view), None)
    top = (output(view, sample, kept, None) - whole).norm()
    found = (output(view, sample, kept, method.merge(view, notes, scores, kept)) - whole).norm()
    assert found * 4 < top


def test_matching_all_tokens_is_exact() -> None:
    view, q = random_view(80)
    method = AttentionMatching(latest=64, spread=64)
    notes = seen_by(method, view, q)
    scores, kept = method.score(view, notes), everything(view)
    merged = method.merge(view, notes, scores, kept)
    assert float(merged.bias.abs().max()) < 1e-4
    assert torch.allclose(merged.v, view.values(view.candidates), atol=1e-4)


def test_rows_are_taken_in_parts_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    view, q = random_view(90)
    whole = [torch.cat([x for x, _ in References(view, q).parts(head)]) for head in range(2)]
    monkeypatch.setattr("kvfold.retention.matching._SCORES", 700)
    parts = [list(References(view, q).parts(head)) for head in range(2)]
    assert all(len(each) > 1 for each in parts)
    for a, b in zip(whole, parts, strict=True):
        assert torch.allclose(torch.cat([x for x, _ in b]), a, atol=1e-5)


def test_the_latest_queries_count_as_much_as_the_others() -> None:
    view, q = random_view(100)
    sample = QuerySample(4, 64)
    notes = Notes()
    sample.observe(Seen(view, q, view.keys(), view.values()), notes)
    importance = sample.importance(notes)
    assert float(importance[:4].square().sum()) == pytest.approx(float(importance[4:].square().sum()))
    plain, weighed = (References(view, sample.queries(notes), each) for each in (None, importance))
    (a, total), (b, same) = next(plain.parts(1)), next(weighed.parts(1))
    assert torch.equal(total, same)
    assert torch.allclose(b.exp(), a.exp() * importance.repeat(2)[:, None], rtol=1e-4)


def test_learned_sinks_take_their_share_of_the_totals() -> None:
    g = torch.Generator().manual_seed(0)
    k, v, q = torch.randn(30, 2, 8, generator=g), torch.randn(30, 2, 8, generator=g), torch.randn(5, 6, 8, generator=g)
    sinks = torch.linspace(-2, 3, 6)
    plain, sunk = view_of(k, v), view_of(k, v, sinks=sinks)
    for head in range(2):
        (_, without), (_, total) = (next(References(view, q).parts(head)) for view in (plain, sunk))
        want = without.exp() + sinks[3 * head : 3 * head + 3].exp().repeat_interleave(5)
        assert torch.allclose(total.exp(), want, rtol=1e-4)


def test_fits_are_least_squares() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.rand(50, 6, generator=g) * torch.tensor([1.0, 1e-2, 1e-3, 1.0, 0.1, 1.0])
    true = torch.tensor([2.0, 30.0, 5.0, 0.1, 1.0, 7.0])
    mass = a @ true
    assert float((a @ fit_factors(a, mass, 0.05, 1000.0) - mass).norm() / mass.norm()) < 1e-3
    bounded = fit_factors(a, a @ true, 1.0, 20.0)
    assert bool((bounded >= 1.0 - 1e-5).all() and (bounded <= 20.0 + 1e-4).all())
    values = torch.randn(6, 3, generator=g)
    assert torch.allclose(fit_values(a, a @ values, torch.zeros(6, 3), 1e-9), values, atol=2e-2)
    wide = torch.rand(6, 50, generator=g)
    out = torch.randn(6, 3, generator=g)
    assert torch.allclose(wide @ fit_values(wide, out, torch.zeros(50, 3), 1e-6), out, atol=1e-3)


# == samples of queries


def test_samples_are_bounded_and_even() -> None:
    q = torch.arange(1000.0)[:, None, None]
    for chunks in ([1000], [1] * 40 + [360, 600], [7] * 142 + [6]):
        notes, sample = Notes(), QuerySample(5, 16)
        for part in q.split(chunks):
            sample.observe(Seen(None, part, part, part), notes)  # type: ignore[arg-type]
        found = sample.queries(notes)[:, 0, 0].tolist()
        assert found[:5] == [995.0, 996.0, 997.0, 998.0, 999.0]
        assert found[5:] == list(range(0, 1000, 64))
    before = notes.nbytes
    sample.observe(Seen(None, q, q, q, replay=(0, 9)), notes)  # type: ignore[arg-type]
    assert notes.nbytes == before
    sample.forget(notes)
    assert notes.nbytes == 0
    with pytest.raises(UnsupportedError, match="queries"):
        sample.queries(notes)


# == in the runtime


@dataclass(frozen=True)
class Marked(RetentionMethod):
    """Keeps tokens by a number in their keys, and gives them biases; without ``anew`` merely moves what there is."""

    anew: bool = True

    merges: ClassVar[bool] = True

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        return view.keys(view.candidates)[..., 0]

    def merge(self, view: LayerView, notes: Notes, scores: Tensor, kept: Tensor) -> Merged | None:
        if not self.anew:
            return None
        k, v = (x[:, view.candidates].gather(1, kept.clamp_min(0)[..., None].expand(-1, -1, x.shape[-1]))
                for x in (view.keys(), view.values()))  # fmt: skip
        return Merged(k, v, v[..., 0], torch.zeros_like(kept, dtype=torch.bool))


def runner_of(recipe: str) -> ModelRunner:
    model = tiny("llama")
    return ModelRunner(model, recipe=Recipe.parse(recipe), kv_memory=4 << 20, prefix_caching=False, check=False)


def read(runner: ModelRunner, seq: int, start: int, count: int) -> Tensor:
    work = SeqWork(seq=seq, tokens=tokens(400)[start : start + count], start=start, salt=b"", sample=True)
    return runner.execute([work])


def biases_by_key(runner: ModelRunner, seq: int) -> list[dict[tuple[float, ...], tuple[float, float]]]:
    """For each layer, by key: a kept token's bias, and the first number of its value."""
    retainer, size = runner.cache.retainer, runner.cache.recipe.block_size
    assert retainer is not None
    kept = retainer.kept(0, seq)
    assert kept is not None
    store, found, begin = runner.cache._pages[0].kept_store, [], 0
    assert kept.bias is not None
    for layer, count in enumerate(kept.counts.sum(1).tolist()):
        k, v = store.decode_pages(kept.flat[begin : begin + count], layer)
        bias = kept.bias[begin * size : (begin + count) * size]
        keys, pairs = k.flatten(0, 1).tolist(), torch.stack((bias, v[..., 0].flatten()), dim=1).tolist()
        found.append({tuple(key): tuple(pair) for key, pair in zip(keys, pairs, strict=True)})
        begin += count
    return found


@pytest.mark.parametrize("base", ["raw,block=8,recent=8", "int8,block=8,recent=8"])
def test_biases_go_with_their_tokens_when_a_later_retention_moves_them(base: str) -> None:
    runner = runner_of(f"{base}+keepkv(keep=0.5)")
    assert runner.cache.retainer is not None
    runner.cache.retainer.method = Marked()
    seq = runner.create()
    read(runner, seq, 0, 100)
    assert runner.cache.retain(seq)
    before = biases_by_key(runner, seq)
    assert all(abs(bias - value) < 1e-5 for layer in before for bias, value in layer.values())
    runner.cache.retainer.method = Marked(anew=False)
    read(runner, seq, 100, 60)
    assert runner.cache.retain(seq)
    after = biases_by_key(runner, seq)
    for old, new in zip(before, after, strict=True):
        assert any(key in old for key in new)
        assert any(key not in old for key in new)
        assert all(bias == old.get(key, (0.0,))[0] for key, (bias, _) in new.items())
    runner.release()


METHODS = ["keepkv(keep=0.4)", "keepkv(keydiff,similarity=0.2,keep=0.3)", "attention_matching(keep=0.4)",
           "attention_matching(latest=0,budget=48)"]  # fmt: skip


@pytest.mark.parametrize("base", ["raw,block=8,recent=8", "int8,block=8,recent=8", "k8v4,block=8,recent=8"])
@pytest.mark.parametrize("method", METHODS)
def test_merged_sequences_fork_go_on_and_end(base: str, method: str) -> None:
    """Forks share the blocks and give the same; books balance after each step; retention runs a second time."""
    runner = runner_of(f"{base}+{method}")
    cache, manager = runner.cache, runner.manager
    idle = cache.bytes_in_use()
    seq = runner.create()
    read(runner, seq, 0, 100)
    assert cache.retain(seq)
    manager.check()
    assert cache.retainer is not None
    child = cache.fork(seq)
    assert list(manager.kept(seq, 0)) == list(manager.kept(child, 0)) != []
    mine, other = cache.retainer.kept(0, seq), cache.retainer.kept(0, child)
    assert mine is other
    assert mine is not None
    assert mine.bias is not None
    one, two = read(runner, seq, 100, 30), read(runner, child, 100, 30)
    assert torch.equal(one, two)
    read(runner, seq, 130, 40)
    cache.free(child)
    assert cache.retain(seq)
    manager.check()
    assert torch.isfinite(read(runner, seq, 170, 1)).all()
    cache.free(seq)
    manager.check()
    assert cache.bytes_in_use() == idle
    runner.release()


def test_bytes_of_biases_are_counted() -> None:
    sizes = {}
    for method in ("snapkv(keep=0.5)", "keepkv(keep=0.5)"):
        runner = runner_of(f"raw,block=8,recent=8+{method}")
        seq = runner.create()
        read(runner, seq, 0, 100)
        assert runner.cache.retain(seq)
        sizes[method] = runner.manager.bytes_in_use()
        assert runner.cache.retainer is not None
        kept = runner.cache.retainer.kept(0, seq)
        runner.release()
    assert kept is not None
    assert kept.bias is not None
    plain, merged = sizes.values()
    assert merged - plain == kept.bias.nbytes == 4 * 8 * kept.flat.numel()


def test_a_matched_prompt_is_nearer_to_the_whole_one_than_a_cut_one() -> None:
    """The tiny model has random weights: nothing in it is local, and what is dropped is missed."""
    logits = {}
    for each in ("raw", "streaming(keep=0.2)", "attention_matching(keep=0.2)"):
        runner = runner_of("raw,block=8,recent=8" + ("" if each == "raw" else f"+{each}"))
        seq = runner.create()
        read(runner, seq, 0, 250)
        if each != "raw":
            assert runner.cache.retain(seq)
        work = SeqWork(seq=seq, tokens=tokens(400)[250:282], start=250, salt=b"", sample=True)
        logits[each] = runner.execute_all(work)
        runner.release()
    raw, cut, merged = logits.values()
    assert float((merged - raw).norm()) < 0.7 * float((cut - raw).norm())


# == refusals


def test_latent_layers_are_refused() -> None:
    geometry = Geometry.from_config(tiny_config("deepseek_v3"))
    for method in ("keepkv(keep=0.25)", "attention_matching(keep=0.25)"):
        assert any("latent" in reason for reason in refusals(Recipe.parse(f"raw+{method}"), geometry))


def test_formats_that_cannot_hold_merged_tokens_are_refused() -> None:
    geometry = Geometry.from_config(tiny("llama").config)
    assert any(
        "scales" in reason for reason in refusals(Recipe.parse("int4,scales=channel+keepkv(keep=0.25)"), geometry)
    )


SENSELESS = [
    "keepkv(similarity=2.0)",
    "keepkv(latest=0)",
    "keepkv(attention_matching)",
    "attention_matching(latest=0,spread=0)",
    "attention_matching(ridge=0.0)",
]


@pytest.mark.parametrize("clause", SENSELESS)
def test_options_that_make_no_sense(clause: str) -> None:
    with pytest.raises(RecipeError):
        build_method(Clause.parse(clause))


def test_what_hangs_on_the_latest_queries_says_so() -> None:
    aware = {text: build_method(Clause.parse(text)).query_aware
             for text in ("keepkv(keydiff)", "attention_matching", "attention_matching(latest=0)")}  # fmt: skip
    assert list(aware.values()) == [True, True, False]
