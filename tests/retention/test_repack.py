"""Choosing and laying out: the best stay, in whole pages, and every slot of the new blocks is used once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.errors import KVFoldError
from kvfold.retention.repack import chosen, dealt, lay_out

quick = settings(max_examples=200, deadline=None)


@st.composite
def counts(draw) -> np.ndarray:
    layers, heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    flat = draw(st.lists(st.integers(0, 9), min_size=layers * heads, max_size=layers * heads))
    return np.array(flat, np.int64).reshape(layers, heads)


@quick
@given(counts())
def test_every_page_has_a_slot_of_its_own(number):
    layout = lay_out(number)
    per_block = number.size
    assert layout.blocks == -(-int(number.sum()) // per_block)
    there = layout.block >= 0
    assert np.array_equal(there, layout.slot >= 0)
    assert np.array_equal(there.sum(-1), number)
    assert np.array_equal(np.sort(~there, axis=-1), ~there)  # a head's pages come first, without a gap
    places = list(zip(layout.block[there].tolist(), layout.slot[there].tolist(), strict=True))
    assert len(set(places)) == len(places)
    assert all(0 <= block < layout.blocks and 0 <= slot < per_block for block, slot in places)


@quick
@given(counts())
def test_pages_lie_in_their_own_slots_as_far_as_there_are_blocks(number):
    layout = lay_out(number)
    own = np.arange(number.size).reshape(number.shape)
    for layer, head in np.ndindex(*number.shape):
        mine = min(int(number[layer, head]), layout.blocks)
        assert layout.slot[layer, head, :mine].tolist() == [own[layer, head]] * mine
        assert layout.block[layer, head, :mine].tolist() == list(range(mine))


@st.composite
def scored(draw) -> tuple[torch.Tensor, torch.Tensor, int]:
    heads, size = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 4)))
    pages = draw(st.integers(1, 6))
    n = pages * size + draw(st.integers(0, size - 1))
    values = draw(st.lists(st.integers(0, 5), min_size=heads * n, max_size=heads * n))
    few = draw(st.lists(st.integers(0, pages), min_size=heads, max_size=heads))
    return torch.tensor(values, dtype=torch.float32).view(heads, n), torch.tensor(few), size


@quick
@given(scored())
def test_the_best_stay_in_order_and_of_equal_ones_the_later(case):
    scores, number, size = case
    found = chosen(scores, number, size)
    for row, of, few in zip(found.tolist(), scores.tolist(), number.tolist(), strict=True):
        best = sorted(range(len(of)), key=lambda i: (of[i], i), reverse=True)[: few * size]
        assert row == sorted(best) + [-1] * (len(row) - len(best))


@pytest.mark.parametrize("bad", [[[3, 0]], [[2, 2]], [[-1, 1]], [[1], [1]]])
def test_more_than_there_is_cannot_be_dealt(bad):
    scores = [torch.zeros(2, 9)]
    assert torch.equal(dealt(torch.tensor([[2, 1]]), scores, 3, 4), torch.tensor([[2, 1]]))
    with pytest.raises(KVFoldError, match="not there"):
        dealt(torch.tensor(bad), scores, 3, 4)
