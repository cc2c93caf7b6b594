"""The sampler against straightforward references: distributions, filters, penalties, seeds, NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvfold.engine.request import SamplingParams
from kvfold.engine.sampling import RowSampler, _draw, sample


def warped(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Probabilities [B, V] by transformers' own chain."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k > 0:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        chain.append(MinPLogitsWarper(min_p))
    return chain(torch.zeros(len(logits), 1, dtype=torch.long), logits).softmax(-1)


def by_inversion(logits: torch.Tensor, params: SamplingParams, grid: int = 4000) -> torch.Tensor:
    """Probabilities [V] of one row, measured by drawing with an even grid of uniform numbers."""
    uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    heat = torch.full((grid,), params.temperature)
    rows = logits[None].repeat(grid, 1)
    tokens = _draw(rows, rows.amax(-1), heat, uniform, RowSampler(params).filters)
    return torch.bincount(tokens, minlength=len(logits)).double() / grid


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 1.0, 0.0),
        (5, 1.0, 0.0),
        (0, 0.8, 0.0),
        (0, 1.0, 0.1),
        (20, 0.7, 0.0),
        (20, 0.9, 0.05),
        (0, 0.9, 0.2),
        (1, 0.5, 0.5),
    ],
)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("vocab", [7, 64, 1000])
def test_filters_agree_with_transformers(
    top_k: int, top_p: float, min_p: float, temperature: float, vocab: int
) -> None:
    logits = 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = by_inversion(logits, params)
    wanted = warped(logits[None], temperature, top_k, top_p, min_p)[0].double()
    assert (found - wanted).abs().max() <= 2 / 4000
    # Never a token that the filters exclude.
    assert found[wanted == 0].sum() == 0


def test_a_nucleus_wider_than_the_first_look_is_found() -> None:
    logits = torch.zeros(2500)  # all equal: top_p=0.9 keeps nine tenths of the vocabulary, looked at three times
    found = by_inversion(logits, SamplingParams(temperature=1.0, top_p=0.9), grid=2500)
    assert abs(int((found > 0).sum()) - 2250) <= 5


def test_drawing_with_a_seed_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -math.inf]])
    row = RowSampler(SamplingParams(temperature=1.0), seed=3)
    counts = torch.zeros(4)
    for _ in range(3000):
        counts[sample(logits, [row]).tokens[0]] += 1
    assert torch.allclose(counts / 3000, logits[0].softmax(-1), atol=0.03)
    assert counts[3] == 0


def test_greedy_is_the_likeliest_and_leaves_the_logits_alone() -> None:
    logits = torch.randn(16, 50)
    before = logits.clone()
    rows = [
        RowSampler(SamplingParams(temperature=0.9 * (i % 2), repetition_penalty=1.5), prompt=[1]) for i in range(16)
    ]
    sample(logits, rows)
    assert torch.equal(logits, before)
    assert sample(logits, [RowSampler(SamplingParams())] * 16).tokens == logits.argmax(-1).tolist()


row_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 3, 40]),
    top_p=st.sampled_from([0.5, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    logprobs=st.sampled_from([None, 0, 2]),
)


@settings(max_examples=25, deadline=None)
@given(
    own=row_params,
    neighbours=st.lists(row_params, max_size=5),
    place=st.integers(0, 5),
    seed=st.integers(0, 2**40),
    vocab=st.sampled_from([30, 64, 601, 4096, 9001]),
)
def test_a_row_does_not_depend_on_its_neighbours(
    own: SamplingParams, neighbours: list[SamplingParams], place: int, seed: int, vocab: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    place = min(place, len(neighbours))
    alone, among = RowSampler(own, prompt=[1, 2], seed=seed), RowSampler(own, prompt=[1, 2], seed=seed)
    rows = [RowSampler(params, prompt=[5], seed=i) for i, params in enumerate(neighbours)]
    rows.insert(place, among)
    for _ in range(4):
        # Rounded: equal logits are what bfloat16 models give.
        logits = (2 * torch.randn(len(rows), vocab, generator=generator)).bfloat16().float()
        one, many = sample(logits[place : place + 1].clone(), [alone]), sample(logits, rows)
        assert one.tokens[0] == many.tokens[place]
        assert one.logprobs.get(0) == many.logprobs.get(place)
        alone.accept(one.tokens[0])
        for row, token in zip(rows, many.tokens, strict=True):
            row.accept(token)


def reference_penalties(
    logits: torch.Tensor, prompt: list[int], output: list[int], params: SamplingParams
) -> torch.Tensor:
    """The definitions, token by token."""
    out = logits.clone()
    for token in set(prompt) | set(output):
        value = out[token]
        out[token] = value * params.repetition_penalty if value < 0 else value / params.repetition_penalty
    for token in set(output):
        out[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    return out


def test_penalties_are_what_they_say() -> None:
    params = SamplingParams(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.7)
    prompt, output = [0, 1, 1, 2], []
    row = RowSampler(params, prompt=prompt)
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        logits = torch.randn(90, generator=generator)
        wanted = reference_penalties(logits, prompt, output, params)
        assert sample(logits[None], [row]).tokens == [int(wanted.argmax())], step
        token = (7 * step) % 90
        output.append(token)
        row.accept(token)


def test_end_tokens_are_barred_until_min_tokens() -> None:
    logits = torch.tensor([[0.0, 5.0, 3.0]])
    row = RowSampler(SamplingParams(min_tokens=2), end_ids=[1])
    assert not row.plain
    for wanted in (2, 2, 1):
        token = sample(logits, [row]).tokens[0]
        assert token == wanted
        row.accept(token)
    assert row.plain


def test_a_fork_goes_on_alone() -> None:
    params = SamplingParams(temperature=1.0, frequency_penalty=1.0, min_tokens=2)
    row = RowSampler(params, prompt=[1], end_ids=[0], seed=1)
    row.accept(3)
    twin = row.fork(seed=2)
    twin.accept(4)
    logits = torch.zeros(1, 6)
    barred = logits[0].clone()
    row.penalise(barred)
    assert barred.tolist() == [-math.inf, 0, 0, -1, 0, 0]
    counted = logits[0].clone()
    twin.penalise(counted)
    assert counted.tolist() == [0, 0, 0, -1, -1, 0]
    draws = [[sampler.uniform() for _ in range(4)] for sampler in (row, twin, RowSampler(params, seed=2))]
    assert draws[0] != draws[1]
    assert draws[1] == draws[2]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_named_and_the_others_go_on(poison: float, temperature: float) -> None:
    logits = torch.randn(4, 30)
    wanted = logits.argmax(-1).tolist()
    logits[2, 11] = poison
    rows = [RowSampler(SamplingParams(temperature=temperature, top_k=1, logprobs=1)) for _ in range(4)]
    found = sample(logits, rows)
    assert found.bad == [2]
    assert [found.tokens[i] for i in (0, 1, 3)] == [wanted[i] for i in (0, 1, 3)]
    assert sorted(found.logprobs) == [0, 1, 3]


def test_minus_infinity_is_a_token_that_cannot_be_and_no_error() -> None:
    logits = torch.tensor([[1.0, -math.inf], [-math.inf, -math.inf]])
    assert sample(logits, [RowSampler(SamplingParams())] * 2).bad == [1]


def test_logprobs_are_the_models_own() -> None:
    logits = torch.randn(2, 40)
    rows = [
        RowSampler(SamplingParams(temperature=2.0, logprobs=3, repetition_penalty=2.0), prompt=[1], seed=5),
        RowSampler(SamplingParams(logprobs=0)),
    ]
    found = sample(logits, rows)
    exact = logits.log_softmax(-1)
    for i, row in enumerate(rows):
        chosen, *top = found.logprobs[i]
        assert chosen.token == found.tokens[i]
        assert chosen.logprob == pytest.approx(float(exact[i, chosen.token]))
        assert chosen.rank == int((exact[i] > exact[i, chosen.token]).sum()) + 1
        order = exact[i].argsort(descending=True).tolist()[: row.params.logprobs or 0]
        assert [entry.token for entry in top] == [token for token in order if token != chosen.token]


def test_a_temperature_close_to_zero_does_not_overflow() -> None:
    logits = 1000 * torch.randn(1, 50)
    for temperature in (1e-300, 1e-5, 1e-3):
        row = RowSampler(SamplingParams(temperature=temperature), seed=1)
        assert sample(logits, [row]).tokens == logits.argmax(-1).tolist()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_of_equal_logits_the_first_come_first(data: st.DataObject) -> None:
    """Few levels, so that most logits are equal, also those at the border of top-k, top-p and logprobs."""
    vocab = data.draw(st.integers(2, 700))
    levels = torch.tensor(data.draw(st.sampled_from([[0.0], [0.0, 1.0], [-math.inf, 0.0, 0.5]])))
    places = torch.randint(
        0, len(levels), (vocab,), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    places[data.draw(st.integers(0, vocab - 1))] = len(levels) - 1
    row = levels[places]
    order = row.sort(descending=True, stable=True).indices.tolist()
    count = data.draw(st.integers(1, vocab))
    report = sample(row[None], [RowSampler(SamplingParams(temperature=0.0, logprobs=count))]).logprobs[0]
    assert [entry.token for entry in report] == order[:count]

    grid = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    rows, heat = row[None].repeat(50, 1), torch.ones(50)
    drawn = _draw(rows, rows.amax(-1), heat, grid, (count, 1.0, 0.0)).tolist()
    assert set(drawn) <= set(order[:count])
    if count < vocab:  # all tokens are drawn from as they stand in the vocabulary
        assert [order.index(token) for token in drawn] == sorted(order.index(token) for token in drawn)
    share = data.draw(st.floats(0.05, 0.95))
    drawn = _draw(rows, rows.amax(-1), heat, grid, (0, share, 0.0)).tolist()
    assert [order.index(token) for token in drawn] == sorted(order.index(token) for token in drawn)
    mass = row.softmax(-1)[order].double().cumsum(0)
    nucleus = int((mass < share - 1e-3).sum()) + 2
    assert set(drawn) <= set(order[:nucleus])


def test_logprobs_of_equal_logits_do_not_depend_on_the_neighbours() -> None:
    row = torch.zeros(500)
    alone = sample(row[None], [RowSampler(SamplingParams(temperature=0.0, logprobs=3))]).logprobs[0]
    for other in (5, 20, 100):
        rows = [RowSampler(SamplingParams(temperature=0.0, logprobs=n)) for n in (3, other)]
        assert sample(row.repeat(2, 1), rows).logprobs[0] == alone
