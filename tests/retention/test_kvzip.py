"""KVzip: its scores are those of the model's own attention, and what it keeps is what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.retention.dealing import deal_by_score
from kvfold.retention.methods.kvzip import KVzip
from tests.calibrations import tiny, tokens
from tests.retention.replaying import INSTRUCTION, next_logits, read, repeat, runner_of, scores

TEXT = tokens(150, seed=1)
SINKS = 16  # the sinks' block of recipes with block=16


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny(request.param)


def dense_scores(model: PreTrainedModel, chunk: int) -> dict[int, Tensor]:
    """The same from transformers' own attention weights, a forward over everything for each chunk."""
    found: dict[int, Tensor] = {}
    model.set_attn_implementation("eager")
    for start in range(0, len(TEXT), chunk):
        stop = min(start + chunk, len(TEXT))
        said = [*INSTRUCTION, *TEXT[max(0, start - 8) : stop]]
        with torch.no_grad():
            attentions = model(torch.tensor([[*TEXT, *said]]), output_attentions=True).attentions
        for layer, weights in enumerate(attentions):
            of_replay = weights[0, :, len(TEXT) :]  # [Hq, W, n]
            seen = torch.zeros(of_replay.shape[-1], dtype=torch.bool)
            seen[: min(SINKS, start)] = seen[start:stop] = seen[len(TEXT) :] = True
            part = of_replay * seen
            part = (part / part.sum(-1, keepdim=True))[..., start:stop]
            best = part.unflatten(0, (2, -1)).amax((1, 2))  # two KV heads
            found[layer] = torch.cat((found[layer], best), dim=1) if layer in found else best
    model.set_attn_implementation("sdpa")
    return found


@pytest.mark.parametrize("chunk", [2048, 50])
def test_scores_are_the_largest_weights_of_the_repetition(model: PreTrainedModel, chunk: int) -> None:
    runner = runner_of(model, "raw,block=16,recent=16+kvzip(keep=0.5)")
    seq = read(runner, TEXT)
    repeat(runner, seq, TEXT, chunk=chunk)
    wanted, found = dense_scores(model, chunk), scores(runner, seq)
    full = [1] if model.config.model_type == "gemma3_text" else [0, 1, 2]
    assert sorted(found) == full
    for layer in full:
        torch.testing.assert_close(found[layer], wanted[layer], atol=1e-5, rtol=1e-4)


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for queries in (256, 7):
        monkeypatch.setattr("kvfold.retention.methods.kvzip._QUERIES", queries)
        runner = runner_of(tiny("llama"), "raw,block=16,recent=16+kvzip(keep=0.5)")
        seq = read(runner, TEXT)
        repeat(runner, seq, TEXT)
        found.append(scores(runner, seq))
    for layer, wanted in found[0].items():
        torch.testing.assert_close(found[1][layer], wanted, atol=1e-6, rtol=1e-5)


def test_keeping_all_changes_nothing_and_dropping_frees(model: PreTrainedModel) -> None:
    text, rest = TEXT, tokens(6, seed=2)
    plain = runner_of(model, "raw,block=16,recent=16")
    wanted = next_logits(plain, read(plain, text), rest, len(text))
    errors, held = [], []
    for keep in ("1.0", "0.6", "0.3"):
        runner = runner_of(model, f"raw,block=16,recent=16+kvzip(keep={keep})")
        seq = read(runner, text)
        repeat(runner, seq, text)
        runner.cache.retain(seq)
        runner.manager.check()
        held.append(runner.manager.bytes_in_use())
        errors.append(float((next_logits(runner, seq, rest, len(text)) - wanted).abs().mean()))
    assert errors[0] < 1e-5
    assert 1e-5 < errors[1] < errors[2]
    assert held[0] > held[1] > held[2]


def test_it_loses_less_than_chance() -> None:
    model, rest = tiny("llama", seed=3), tokens(8, seed=2)
    plain = runner_of(model, "raw,block=8,recent=8")
    wanted = next_logits(plain, read(plain, TEXT), rest, len(TEXT)).softmax(-1)
    losses = {}
    for method in ("kvzip", "random"):
        runner = runner_of(model, f"raw,block=8,recent=8+{method}(keep=0.4)")
        seq = read(runner, TEXT)
        if method == "kvzip":
            repeat(runner, seq, TEXT)
        runner.cache.retain(seq)
        found = next_logits(runner, seq, rest, len(TEXT)).log_softmax(-1)
        losses[method] = float((wanted * (wanted.log() - found)).sum(-1).mean())
    assert losses["kvzip"] < losses["random"]


@pytest.mark.parametrize("first", [0, len(TEXT)])
def test_a_second_retention_scores_the_columns_that_are_left(first: int) -> None:
    model, more = tiny("llama"), tokens(90, seed=4)
    runner = runner_of(model, "raw,block=16,recent=16+kvzip(keep=0.4)")
    seq = read(runner, TEXT)
    repeat(runner, seq, TEXT)
    runner.cache.retain(seq)
    text = [*TEXT, *more]
    read(runner, text, seq=seq, start=len(TEXT))
    new = scores(runner, seq)
    assert all(bool(found[:, -len(more) :].isnan().all()) for found in new.values())
    carried = {layer: found[:, : -len(more)] for layer, found in new.items()}
    repeat(runner, seq, text, first=first, chunk=64)
    for layer, found in scores(runner, seq).items():
        assert bool(found.isfinite().all())
        assert bool((found[:, : carried[layer].shape[1]] >= carried[layer].nan_to_num(nan=0.0)).all())
    assert runner.cache.retain(seq)
    runner.manager.check()
    runner.free(seq)
    assert runner.cache.bytes_in_use() == 0


def test_tokens_never_repeated_matter_most() -> None:
    runner = runner_of(tiny("llama"), "raw,block=16,recent=16+kvzip(keep=0.5)")
    seq = read(runner, TEXT)
    repeat(runner, seq, TEXT)
    next_logits(runner, seq, tokens(40, seed=5), len(TEXT))
    retainer = runner.cache.retainer
    assert retainer is not None
    view = retainer._view(0, 0, seq, 190, end=11)
    found = KVzip().score(view, retainer._notes[seq][0])
    assert found.shape == (2, 160)
    assert bool((found[:, -26:] == 1).all())
    assert bool((found[:, :-26] < 1).all())


# == dealing


def test_pages_go_where_the_sums_are_greatest() -> None:
    scores = [
        torch.tensor([[9.0, 1.0, 8.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5, 3.0]]),
        torch.tensor([[5.0, 5.0, 5.0, 5.0, 5.0], [-torch.inf, -torch.inf, -torch.inf, 2.0, 2.0]]),
    ]
    assert deal_by_score(scores, 3, 2).tolist() == [[1, 0], [2, 0]]
    assert deal_by_score(scores, 4, 2).tolist() == [[1, 0], [2, 1]]
    assert deal_by_score(scores, 0, 2).tolist() == [[0, 0], [0, 0]]
    assert deal_by_score(scores, 100, 2).tolist() == [[2, 2], [2, 1]]


def test_dealing_is_as_good_as_the_best_of_all_ways() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = [torch.rand(2, n, generator=generator) for n in (7, 5)]
        sums = [
            [0.0, *x.sort(descending=True).values[: len(x) // 2 * 2].view(-1, 2).sum(1).cumsum(0).tolist()]
            for part in scores
            for x in part
        ]
        counts = deal_by_score(scores, 4, 2).flatten().tolist()
        best = max(
            a + b + c + d
            for i, a in enumerate(sums[0])
            for j, b in enumerate(sums[1])
            for k, c in enumerate(sums[2])
            for m, d in enumerate(sums[3])
            if i + j + k + m <= 4
        )
        assert sum(of[count] for of, count in zip(sums, counts, strict=True)) == pytest.approx(best)
