"""Statistics of attention against brute force on whole matrices of weights, for models of many kinds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvfold.gates import Gates
from kvfold.geometry import Geometry
from kvfold.quality.profile import weights
from kvfold.quality.profile.heads import held_once, observed_positions
from kvfold.quality.profile.results import LEVELS, SHARES, Check, LayerProfile, Retrieval, distance_edges
from kvfold.quality.profile.run import observe
from kvfold.quality.profile.suggest import suggest
from kvfold.quality.profile.weights import streamed, weigh
from kvfold.quality.watch import Attended, watched_forward
from tests.geometry_families import tiny_config

TOKENS, SINKS, RECENT = 90, 3, 10
NAMES = ["llama", "gemma2", "gpt_oss", "deepseek_v3", "llama4", "gemma3n"]  # GQA, soft-cap, sinks, MLA, chunks, shared


def model_of(name: str) -> PreTrainedModel:
    """A tiny random model of a family, whose attention is far from even."""
    torch.manual_seed(0)
    config = tiny_config(name)
    if name == "gemma2":
        config.attn_logit_softcapping = 3.0
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in key:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
            elif key.endswith("sinks"):
                weight.normal_(1.0, 0.5)
    return model


def passage(seed: int) -> list[int]:
    return torch.randint(3, 96, (TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return model_of(request.param)


def matrices(model: PreTrainedModel, tokens: Sequence[int]) -> list[Tensor]:
    """The weights ``[Hq, T, T]`` of every layer, as transformers' eager attention makes them."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        out = model(torch.tensor([list(tokens)]), use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return [weights[0].double() for weights in out]


def by_hand(matrix: Tensor, kv_heads: int) -> dict[str, object]:
    """The statistics of a passage, query by query."""
    at, past = observed_positions(TOKENS).tolist(), TOKENS // 2
    heads = matrix.shape[0]
    edges = [*distance_edges(TOKENS), 10**9]
    distance = [0.0] * (len(edges) - 1)
    found: dict[str, list[float]] = {"sinks": [], "nowhere": [], "local": [], "entropy": []}
    for rows in matrix:
        found["sinks"].append(sum(float(rows[t, :SINKS].sum()) for t in at) / len(at))
        found["nowhere"].append(sum(1 - float(rows[t].sum()) for t in at) / len(at))
        found["local"].append(sum(float(rows[t, max(SINKS, t - RECENT + 1) : t + 1].sum()) for t in at) / len(at))
        shares = [rows[t, : t + 1] / rows[t].sum() for t in at]
        found["entropy"].append(sum(float(-(p * p.clamp_min(1e-300).log()).sum()) for p in shares) / len(at))
        for t in at:
            for k in range(SINKS, t + 1):
                place = next(i for i in range(len(edges)) if edges[i] <= t - k < edges[i + 1])
                distance[place] += float(rows[t, k]) / len(at) / heads
    once, anew = torch.zeros(len(SHARES)), torch.zeros(len(SHARES))
    counts = [math.ceil(share * past - 1e-9) for share in SHARES]
    budgets: list[list[float]] = [[] for _ in LEVELS]
    for mine in matrix.view(kv_heads, -1, TOKENS, TOKENS):
        mass = mine[:, at].sum((0, 1))
        ranked, newer, total = mass[:past].sort(descending=True).values, mass[past:].sum(), mass.sum()
        once += torch.tensor([float((newer + ranked[:n].sum()) / total) for n in counts]) / kv_heads
        for level, row in zip(LEVELS, budgets, strict=True):
            row.append(next(n for n in range(past + 1) if newer + ranked[:n].sum() >= (level - 1e-9) * total) / past)
        for rows in mine:
            for t in at:
                best = rows[t, :past].sort(descending=True).values
                held = [float((rows[t, past:].sum() + best[:n].sum()) / rows[t].sum()) for n in counts]
                anew += torch.tensor(held) / len(at) / heads
    return {**found, "distance": distance, "once": once.tolist(), "anew": anew.tolist(), "budgets": budgets}


def test_statistics_are_those_of_whole_matrices(model: PreTrainedModel) -> None:
    passages = [passage(1), passage(2)]
    found = observe(model, passages, SINKS, RECENT)
    everything = [matrices(model, tokens) for tokens in passages]
    layers = [layer for layer in Geometry.from_config(model.config).layers if layer.kind != "none"]
    assert [layer.layer for layer in found] == [layer.index for layer in layers]
    for place, (layer, shape) in enumerate(zip(found, layers, strict=True)):
        one, two = (by_hand(matrices[place], shape.kv_heads) for matrices in everything)
        got = {
            **{name: getattr(layer, name) for name in ("sinks", "nowhere", "local", "entropy", "distance")},
            "once": layer.held_once,
            "anew": layer.held_anew,
        }
        for name, values in got.items():
            wanted = (torch.tensor(one[name]) + torch.tensor(two[name])) / 2
            assert torch.allclose(torch.tensor(values), wanted.float(), atol=2e-4), (layer.layer, name)
        for n, level in enumerate(LEVELS):
            wanted = (torch.tensor(one["budgets"][n]) + torch.tensor(two["budgets"][n])) / 2  # type: ignore[index]
            # Half a token either way: a sum that meets the level to rounding.
            assert torch.allclose(torch.tensor(layer.budgets[f"{level:g}"]), wanted, atol=1 / TOKENS + 1e-6)
        assert layer.newer == layer.held_anew[0]
        assert sum(layer.distance) + (sum(layer.sinks) + sum(layer.nowhere)) / layer.q_heads == pytest.approx(
            1, abs=1e-5
        )


def test_weights_come_in_blocks_and_never_whole(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = matrices(model, passage(3))
    numbers = {layer.index: n for n, layer in enumerate(Geometry.from_config(model.config).layers)}
    monkeypatch.setattr(weights, "_BLOCK", 1000)
    blocks: list[int] = []

    def attended(seen: Attended) -> None:
        for block in weigh(seen, torch.arange(TOKENS)):
            blocks.append(block.p.numel())
            wanted = whole[numbers[seen.layer]][block.heads][:, block.positions, : block.p.shape[-1]]
            assert torch.allclose(block.p.double(), wanted, atol=2e-4)
            assert torch.allclose(block.nowhere.double(), 1 - wanted.sum(-1), atol=2e-4)

    watched_forward(model, passage(3), attended=attended)
    assert blocks
    assert max(blocks) <= 1000


def test_a_stream_as_long_as_the_text_is_the_models_own_attention(model: PreTrainedModel) -> None:
    seen: list[int] = []

    def attended(attention: Attended) -> None:
        seen.append(attention.layer)
        for sinks, recent in ((0, TOKENS), (TOKENS, 1), (40, TOKENS - 40)):
            found = streamed(attention, sinks, recent)
            assert torch.allclose(found, attention.output.float(), atol=1e-4), (attention.layer, sinks, recent)

    watched_forward(model, passage(4), attended=attended)
    assert seen == [layer.index for layer in Geometry.from_config(model.config).layers if layer.kind != "none"]


def test_a_stream_sees_sinks_and_window_only(model: PreTrainedModel) -> None:
    whole = matrices(model, passage(5))

    def attended(attention: Attended) -> None:
        matrix = whole[attention.layer]
        t = torch.arange(TOKENS)
        kept = (t < SINKS) | (t > t[:, None] - RECENT)
        rest = 1 - matrix.sum(-1, keepdim=True)  # a learned sink logit stays
        left = (matrix * kept).sum(-1, keepdim=True) + rest
        p = matrix * kept / left
        values = attention.v.repeat_interleave(attention.q.shape[1] // attention.v.shape[1], 1).double()
        wanted = torch.einsum("hts,shd->thd", p, values)
        sound = (left > 0.01).squeeze(-1).T  # of less, eager attention in float32 has too few digits
        assert sound.float().mean() > 0.5
        assert torch.allclose(streamed(attention, SINKS, RECENT).double()[sound], wanted[sound], atol=5e-3)

    watched_forward(model, passage(5), attended=attended)


def test_an_output_that_is_given_back_takes_the_place_of_the_layers() -> None:
    model = model_of("llama")
    keep = list(range(TOKENS))
    plain = watched_forward(model, passage(6), keep=keep)
    same = watched_forward(model, passage(6), keep=keep, attended=lambda seen: seen.output.double())
    other = watched_forward(model, passage(6), keep=keep, attended=lambda seen: torch.zeros_like(seen.output))
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, other, atol=0.1)


def test_observed_queries_lie_in_the_second_half() -> None:
    for tokens in (16, 17, 100, 5000):
        at = observed_positions(tokens)
        assert at.min() >= tokens // 2
        assert at.max() == tokens - 1
        assert (at.diff() > 0).all()
        assert at.numel() == min(256, tokens - tokens // 2)


def test_bins_of_distances_cover_a_text() -> None:
    assert distance_edges(2) == (0, 1)
    assert distance_edges(9) == (0, 1, 2, 4, 8)
    assert distance_edges(2048) == (0, *(2**n for n in range(11)))


def test_more_tokens_hold_more_and_all_hold_all() -> None:
    torch.manual_seed(0)
    held = held_once(torch.rand(3, 50).double(), torch.tensor([0.0, 1.0, 100.0]).double())
    assert held.shape == (3, 51)
    assert (held.diff(dim=1) >= 0).all()
    assert (held.diff(dim=1).diff(dim=1) <= 1e-12).all()  # the best ones first
    assert torch.allclose(held[:, -1], torch.ones(3).double())


# == a recipe to try


def layer_of(budget: float, window: int | None = None) -> LayerProfile:
    two = [0.5, 0.5]
    return LayerProfile(
        layer=0, source=0, kind="full" if window is None else "sliding", window=window, q_heads=2, kv_heads=2,
        sinks=two, nowhere=[0.0, 0.0], local=two, entropy=two, distance=two, newer=0.5, held_once=[1.0] * len(SHARES),
        held_anew=[1.0] * len(SHARES), budgets={"0.95": [budget, 0.0], "0.99": [budget, 0.0]},
    )  # fmt: skip


def found_of(*answers: float, kl: float = 0.0) -> Retrieval:
    last = len(answers) - 1
    checks = [Check(n, n / last, answer, 0.1, kl * (n < last)) for n, answer in enumerate(answers)]
    gates = Gates(model_type="llama", sinks=4, recent=64, heads={0: (0.5,) * last})
    return Retrieval(kind="question", texts=1, asked=1, gates=gates, recall={}, change={}, checks=checks)


@pytest.mark.parametrize(
    ("answers", "kl", "keep"),
    [
        ((0.0, 0.99, 1.0, 1.0, 1.0), 0.0, "0.3"),  # within 2 % of all; streaming heads keep 64 tokens of 1,024
        ((0.0, 0.99, 0.9, 1.0, 1.0, 1.0), 0.0, "0.65"),  # from there on, not by luck
        ((1.0, 1.0, 1.0), 0.0, "0.1"),
        ((0.0, 0.0, 0.0, 1.0), 0.0, None),  # too many heads
        ((0.0, 1.0, 1.0), 0.2, None),  # the text suffers
        ((0.3, 0.3, 0.3), 0.0, None),  # it cannot do the task at all
    ],
)
def test_streaming_heads_are_suggested_where_they_cost_nothing(
    answers: tuple[float, ...], kl: float, keep: str | None
) -> None:
    found = suggest("int4,recent=32", [layer_of(1.9)], found_of(*answers, kl=kl), 1024)
    assert found.recipe == "int4,recent=32" + (f"+duo(keep={keep})" if keep else "")
    assert found.why


def test_budgets_come_next_and_plain_last() -> None:
    assert suggest("int8", [layer_of(0.43)], None, 2048).recipe == "int8+adakv(snapkv,keep=0.25)"
    assert suggest("int8", [layer_of(0.0)], None, 2048).recipe == "int8+adakv(snapkv,keep=0.05)"
    both = [layer_of(1.0), layer_of(0.9)]
    assert suggest("int8", both, found_of(0, 0, 1), 2048).recipe == "int8+adakv(snapkv,keep=0.5)"
    assert suggest("int8", [layer_of(1.8)], None, 2048).recipe == "int8"
    assert suggest("int8", [layer_of(0.1, window=99)], None, 2048).recipe == "int8"  # a window drops tokens by itself


def test_breadth_is_the_exponential_of_entropy() -> None:
    assert replace(layer_of(0.1), entropy=[0.0, math.log(7)]).effective == pytest.approx([1.0, 7.0])
