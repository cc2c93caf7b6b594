"""Every method's scores against its formula, written out; what a formula says is heavy stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import kvfold.retention.methods.h2o as h2o_module
from kvfold.clause import Clause
from kvfold.errors import RecipeError
from kvfold.recipe import known_methods
from kvfold.retention.build import build_method
from kvfold.retention.method import Notes
from kvfold.retention.repack import chosen
from kvfold.retention.view import LayerView
from tests.retention.retained_world import RetainedWorld
from tests.retention.views import attention, layer_view, normal, watched
from tests.test_cache import LLAMA

N, H, HQ, D = 40, 2, 4, 16
MIDDLE = slice(8, 32)
KINDS = {
    "plain": {},
    "soft-cap": {"softcap": 2.0},
    "sink logits": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
}
QUERY_AWARE = {"h2o", "tova", "snapkv", "pyramidkv"}


def method(text: str):
    return build_method(Clause.parse(text))


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor, Tensor]:
    """``q [N, Hq, D]``, ``k, v [H, N, D]``."""
    return normal(N, HQ, D), normal(H, N, D, seed=1), normal(H, N, D, seed=2)


def scores_of(text: str, q: Tensor, k: Tensor, v: Tensor, *, counts: list[int] | None = None, **facts) -> Tensor:
    built = method(text)
    notes = watched(built, q, k, v, counts or [N], **facts)
    return built.score(layer_view(k, v, candidates=MIDDLE, **facts), notes)


# == attention that was seen


@pytest.mark.parametrize("facts", KINDS.values(), ids=KINDS)
def test_h2o_takes_the_mean_over_the_queries_that_could_see_a_token(facts, tokens):
    q, k, v = tokens
    wanted = (attention(q, k, **facts).mean(1).sum(1) / torch.arange(N, 0, -1))[:, MIDDLE]
    torch.testing.assert_close(scores_of("h2o", q, k, v, **facts), wanted)


@pytest.mark.parametrize("weights", [1, 100, 2**20])
def test_h2o_finds_the_same_however_the_prompt_is_cut(weights, tokens, monkeypatch):
    monkeypatch.setattr(h2o_module, "_WEIGHTS", weights)
    whole = scores_of("h2o", *tokens)
    for counts in ([13, 27], [20, 1, 1, 18], [1] * N):
        torch.testing.assert_close(scores_of("h2o", *tokens, counts=counts), whole)


@pytest.mark.parametrize("text", ["pyramidkv(h2o,keep=0.5)", "adakv(h2o,keep=0.5)"])
def test_the_sums_move_with_their_tokens(text):
    """Layers and heads with budgets of their own: every number stays with its token, and new ones come behind."""
    world = RetainedWorld(LLAMA, f"raw,block=8,recent=16+{text}")
    seq = world.create()
    world.step([(seq, 120)])
    notes = world.cache.retainer._notes[seq]
    before = [notes[layer].per_token.clone() for layer in range(2)]
    assert world.retain(seq)
    kept = world.cache.retainer.kept(0, seq)
    assert len(set(kept.counts.flatten().tolist())) > 1
    for _ in range(2):
        for layer in range(2):
            found = world.cache.retainer._notes[seq][layer].per_token
            assert found.shape[1] == world.cache.retainer._view(0, layer, seq, world.cache.length(seq)).columns
            for head in range(2):
                where = world.kept_positions(0, layer, head, seq)
                now = found[head, 8 : 8 + where.numel()]
                assert bool((now >= before[layer][head, where]).all())
                if world.cache.length(seq) == 120:
                    assert torch.equal(now, before[layer][head, where])
                    assert torch.equal(found[head, :8], before[layer][head, :8])
        world.step([(seq, 9)])


@pytest.mark.parametrize("facts", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("counts", [[N], [30, 9, 1]])
def test_tova_asks_the_latest_query_of_all_heads(facts, counts, tokens):
    q, k, v = tokens
    wanted = attention(q, k, **facts)[:, :, -1].mean((0, 1))[MIDDLE].expand(H, -1)
    torch.testing.assert_close(scores_of("tova", q, k, v, counts=counts, **facts), wanted)


@pytest.mark.parametrize("facts", KINDS.values(), ids=KINDS)
def test_snapkv_asks_the_window_and_pools(facts, tokens):
    q, k, v = tokens
    mass = attention(q, k, **facts)[:, :, -6:].mean((1, 2))[:, MIDDLE]
    wanted = torch.stack([mass.roll(shift, 1) for shift in (-1, 0, 1)]).sum(0)[:, 1:-1] / 3
    found = scores_of("snapkv(window=6,kernel=3)", q, k, v, counts=[25, 15], **facts)
    torch.testing.assert_close(found[:, 1:-1], wanted)


def test_keydiff_is_minus_the_cosine_to_the_mean_direction(tokens):
    _, k, v = tokens
    mean = torch.stack([k[:, i] / k[:, i].norm(dim=-1, keepdim=True) for i in range(N)], 1).mean(1)
    wanted = -torch.einsum("hnd,hd->hn", k, mean) / k.norm(dim=-1) / mean.norm(dim=-1, keepdim=True)
    found = method("keydiff").score(layer_view(k, v, candidates=MIDDLE), Notes())
    torch.testing.assert_close(found, wanted[:, MIDDLE])


# == what values add to the output


class MixAttention(nn.Module):
    """An attention module with the given output projection."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.layer_idx = 0
        setattr(self, name, layer)


def two_stages(scores: Tensor, sizes: Tensor, budget: int) -> set[int]:
    """What CriticalKV keeps of one head's candidates."""
    first = scores.topk(budget // 2).indices
    rest = ((scores + 1e-4) * sizes).index_fill(0, first, -1.0)
    return {*first.tolist(), *rest.topk(budget - budget // 2).indices.tolist()}


@pytest.mark.parametrize("budget", range(2, 25, 2))
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_criticalkv_chooses_in_two_stages_at_every_budget(kind, budget, tokens):
    q, k, v = tokens
    v = v * normal(H, N, 1, seed=5).exp()
    projection = nn.Linear(HQ * D, 24, bias=True) if kind == "linear" else Conv1D(24, HQ * D)
    module = MixAttention("o_proj" if kind == "linear" else "c_proj", projection.requires_grad_(False))
    found = scores_of("criticalkv(h2o)", q, k, v, module=module)
    base = scores_of("h2o", q, k, v)
    assert torch.equal(found.sort(1).values, base.sort(1).values)  # the same numbers, in another order
    for head in range(H):
        sizes = torch.zeros(MIDDLE.stop - MIDDLE.start)
        for member in (2 * head, 2 * head + 1):
            alone = torch.zeros(sizes.numel(), HQ, D)
            alone[:, member] = v[head, MIDDLE]
            sizes += (projection(alone.flatten(1)) - projection(torch.zeros(1, HQ * D))).abs().sum(1) / 2
        assert set(found[head].topk(budget).indices.tolist()) == two_stages(base[head], sizes, budget)


def test_criticalkv_takes_scores_below_zero_from_the_lowest(tokens):
    q, k, v = tokens
    module = MixAttention("dense", nn.Linear(HQ * D, 8, bias=False).requires_grad_(False))
    found = scores_of("criticalkv(keydiff)", q, k, v, module=module)
    base = scores_of("keydiff", q, k, v)
    assert float(base.min()) < 0
    assert torch.equal(found.amax(1), base.amax(1))
    assert torch.equal(found.argmax(1), base.argmax(1))
    assert bool((found.argmin(1) == base.argmin(1)).all())


def test_criticalkv_expands_latents():
    rank, rope, dims = 12, 4, 8
    module = MixAttention("o_proj", nn.Linear(HQ * dims, 20, bias=False).requires_grad_(False))
    module.kv_b_proj = nn.Linear(rank, HQ * (6 + dims), bias=False).requires_grad_(False)
    module.config = type("Config", (), {"num_attention_heads": HQ})()
    q, k = normal(N, HQ, rank + rope), normal(1, N, rank + rope, seed=1)
    found = scores_of("criticalkv(h2o)", q, k, k[..., :rank], module=module, latent=True)
    base = scores_of("h2o", q, k, k[..., :rank], latent=True)
    values = module.kv_b_proj(k[0, MIDDLE, :rank]).unflatten(-1, (HQ, -1))[..., 6:]
    sizes = torch.zeros(values.shape[0])
    for head in range(HQ):
        alone = torch.zeros_like(values)
        alone[:, head] = values[:, head]
        sizes += module.o_proj(alone.flatten(1)).abs().sum(1) / HQ
    assert set(found[0].topk(12).indices.tolist()) == two_stages(base[0], sizes, 12)


def test_criticalkv_refuses_attention_without_an_output_projection():
    strange, usual = MixAttention("mix", nn.Linear(4, 4)), MixAttention("out_proj", nn.Linear(4, 4))
    built = method("criticalkv(random)")
    assert built.model_refusals(nn.ModuleList([usual])) == []
    reasons = method("adakv(criticalkv(random))").model_refusals(nn.ModuleList([usual, strange]))
    assert reasons == ["MixAttention has no output projection that criticalkv knows"]


# == all of them


def kept(built, view: LayerView, notes: Notes, pages: int = 1) -> Tensor:
    scores = built.score(view, notes)
    counts = torch.full((H,), pages)
    return chosen(scores, counts, 4) + view.candidates.start


@pytest.mark.parametrize(
    "text", ["h2o", "tova", "snapkv(kernel=1)", "adakv(h2o)", "pyramidkv(tova)", "criticalkv(snapkv(kernel=1))"]
)
def test_a_token_that_all_look_at_stays(text, tokens):
    q, k, v = tokens
    heavy = 19
    k[:, heavy] = q.mean((0, 1)) * 40
    q = q + q.mean((0, 1)) * 8
    module = MixAttention("o_proj", nn.Linear(HQ * D, 8, bias=False).requires_grad_(False))
    built = method(text)
    notes = watched(built, q, k, v, [N], module=module)
    found = kept(built, layer_view(k, v, candidates=MIDDLE, module=module), notes)
    assert bool((found == heavy).any(1).all())


def test_an_odd_key_stays(tokens):
    _, k, v = tokens
    k[:, :, 0] += 9.0
    k[:, 19, 0] = -9.0
    assert bool((kept(method("keydiff"), layer_view(k, v, candidates=MIDDLE), Notes()) == 19).any(1).all())


@pytest.mark.parametrize("text", ["h2o", "tova", "snapkv", "keydiff", "criticalkv(h2o)"])
def test_padding_is_not_looked_at(text, tokens):
    """Columns that are no tokens change nothing, whatever lies there."""
    q, k, v = tokens
    module = MixAttention("o_proj", nn.Linear(HQ * D, 8, bias=False).requires_grad_(False))
    shown = torch.ones(H, N, dtype=torch.bool)
    shown[0, 12:16] = False
    found = []
    for filler in (0.0, 1e4):
        k[0, 12:16], v[0, 12:16] = filler, filler
        built = method(text)
        notes = watched(built, q, torch.where(shown[..., None], k, 0.0), v, [N], module=module)
        view = layer_view(k, v, candidates=MIDDLE, module=module, shown=shown)
        found.append(built.score(view, notes)[shown[:, MIDDLE]])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("word", known_methods("retention"))
def test_whether_a_result_may_be_shared_is_told(word):
    if word in ("adakv", "criticalkv"):
        assert not method(f"{word}(keydiff)").query_aware
        assert method(f"{word}(snapkv)").query_aware
        assert method(f"{word}(snapkv)").watches == 64
    elif word not in ("kvzip", "learned", "keepkv", "attention_matching"):
        assert method(word).query_aware == (word in QUERY_AWARE)
    assert not method("pyramidkv(keydiff)").query_aware


def test_methods_nest():
    built = method("adakv(criticalkv(snapkv(window=8)),alpha=0.5)")
    assert (built.alpha, built.inner.inner.window, built.watches, built.query_aware) == (0.5, 8, 8, True)
    assert method("pyramidkv").inner == method("snapkv")
    assert method("pyramidkv(keydiff)").inner == method("keydiff")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("adakv", "builds on another method"),
        ("criticalkv(alpha=1)", "builds on another method"),
        ("adakv(snapkv,alpha=2)", "share from 0 to 1"),
        ("pyramidkv(beta=0)", "at least 1"),
        ("h2o(snapkv)", "nothing but options"),
        ("expected_attention(ahead=0)", "positive"),
        ("expected_attention(ahead=0.5)", "whole number"),
    ],
)
def test_what_makes_no_sense_is_refused(text, why):
    with pytest.raises(RecipeError, match=why):
        method(text)
