"""The reference attention against torch's own, and against plain loops; the registry of operations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfold.errors import KVFoldError, UnsupportedError
from kvfold.kernels.reference import attend, paged_attend, visible
from kvfold.kernels.registry import OpRegistry

quick = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**31)


def tokens(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


@quick
@given(
    seeds,
    st.integers(1, 9),
    st.integers(0, 20),
    st.sampled_from(((1, 1), (2, 1), (2, 3), (3, 2))),
    st.integers(1, 12),
    st.integers(1, 12),
    st.booleans(),
    st.none() | st.integers(1, 12),
    st.none() | st.integers(1, 12),
)
def test_agrees_with_torch(seed, count, past, heads, dim, v_dim, causal, window, chunk):
    kv_heads, group = heads
    total = past + count
    q, k, v = tokens(seed, (count, kv_heads * group, dim), (total, kv_heads, dim), (total, kv_heads, v_dim))
    q_pos, k_pos = torch.arange(past, total), torch.arange(total)
    seen = torch.tensor([[sees(i, j, causal, window, chunk) for j in range(total)] for i in range(past, total)])
    assert torch.equal(visible(q_pos, k_pos, causal=causal, window=window, chunk=chunk), seen)
    # Keys in any order: positions decide.
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    o, lse = attend(
        q,
        k[order],
        v[order],
        q_pos=q_pos,
        k_pos=k_pos[order],
        scale=dim**-0.5,
        causal=causal,
        window=window,
        chunk=chunk,
    )
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], attn_mask=seen, enable_gqa=True
    )
    torch.testing.assert_close(o, wanted[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
    scores = torch.einsum("thd,shd->ths", q, k.repeat_interleave(group, 1)) * dim**-0.5
    wanted_lse = scores.masked_fill(~seen[:, None], -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-5, rtol=1e-5)


def sees(i: int, j: int, causal: bool, window: int | None, chunk: int | None) -> bool:
    if causal and j > i:
        return False
    if window is not None and j <= i - window:
        return False
    return chunk is None or i // chunk == j // chunk


@quick
@given(seeds, st.booleans(), st.booleans(), st.booleans())
def test_softcap_bias_and_sinks_by_hand(seed, capped, biased, sunk):
    q, k, v, bias, sinks = tokens(seed, (2, 4, 6), (5, 2, 6), (5, 2, 3), (5,), (4,))
    softcap = 1.5 if capped else None
    o, lse = attend(
        q,
        k,
        v,
        q_pos=torch.tensor([3, 4]),
        k_pos=torch.arange(5),
        scale=0.7,
        softcap=softcap,
        sinks=sinks if sunk else None,
        bias=bias if biased else None,
    )
    for t in range(2):
        for h in range(4):
            logits = []
            for s in range(t + 4):
                score = 0.7 * float(q[t, h] @ k[s, h // 2])
                score = 1.5 * math.tanh(score / 1.5) if capped else score
                logits.append(score + (float(bias[s]) if biased else 0.0))
            total = sum(math.exp(x) for x in logits) + (math.exp(float(sinks[h])) if sunk else 0.0)
            out = sum(math.exp(x) / total * v[s, h // 2] for s, x in enumerate(logits))
            torch.testing.assert_close(o[t, h], out, atol=1e-5, rtol=1e-5)
            assert math.isclose(float(lse[t, h]), math.log(total), rel_tol=1e-5, abs_tol=1e-5)


@quick
@given(seeds, st.integers(1, 6), st.integers(1, 9))
def test_pieces_merge_by_log_sum_exp(seed, cut, total):
    cut = min(cut, total)
    q, k, v = tokens(seed, (3, 2, 4), (total, 2, 4), (total, 2, 4))
    at = {"q_pos": torch.full((3,), total), "scale": 0.5}
    o, lse = attend(q, k, v, k_pos=torch.arange(total), **at)
    (o_a, lse_a), (o_b, lse_b) = (
        attend(q, k[part], v[part], k_pos=torch.arange(total)[part], **at) for part in (slice(cut), slice(cut, None))
    )
    torch.testing.assert_close(torch.logaddexp(lse_a, lse_b), lse, atol=1e-5, rtol=1e-5)
    merged = o_a * (lse_a - lse).exp()[..., None] + o_b * (lse_b - lse).exp()[..., None]
    torch.testing.assert_close(merged, o, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing():
    q, k, v, sinks = tokens(0, (2, 2, 4), (3, 1, 4), (3, 1, 5), (2,))
    at = {"q_pos": torch.tensor([0, 6]), "k_pos": torch.tensor([4, 5, 6]), "scale": 1.0}
    o, lse = attend(q, k, v, **at)
    assert torch.equal(o[0], torch.zeros(2, 5))
    assert torch.equal(lse[0], torch.full((2,), -math.inf))
    assert bool(o[1].isfinite().all() and lse[1].isfinite().all())
    o, lse = attend(q, k, v, sinks=sinks, **at)
    assert torch.equal(o[0], torch.zeros(2, 5))
    torch.testing.assert_close(lse[0], sinks)


@pytest.mark.parametrize("sunk", [False, True])
def test_no_keys_at_all(sunk):
    q, sinks = tokens(0, (2, 4, 3), (4,))
    none = torch.empty(0, dtype=torch.int64)
    o, lse = attend(
        q,
        torch.empty(0, 2, 3),
        torch.empty(0, 2, 5),
        q_pos=torch.arange(2),
        k_pos=none,
        scale=1.0,
        sinks=sinks if sunk else None,
    )
    assert torch.equal(o, torch.zeros(2, 4, 5))
    assert torch.equal(lse, sinks.expand(2, 4) if sunk else torch.full((2, 4), -math.inf))


@quick
@given(seeds, st.sampled_from((math.nan, math.inf, -math.inf)), st.booleans())
def test_what_is_not_seen_cannot_reach(seed, bad, in_values):
    """A later token's poison reaches the queries that see it, and leaves the others bit for bit alone."""
    q, k, v = tokens(seed, (4, 2, 4), (4, 2, 4), (4, 2, 4))
    at = {"q_pos": torch.arange(4), "k_pos": torch.arange(4), "scale": 0.5}
    clean, clean_lse = attend(q, k, v, **at)
    (v if in_values else k)[2, 0, 1] = bad
    o, lse = attend(q, k, v, **at)
    torch.testing.assert_close(o[:2], clean[:2])
    torch.testing.assert_close(lse[:2], clean_lse[:2])
    if in_values:
        assert bool((~o[2:, 0, 1].isfinite()).all())
    elif math.isnan(bad):
        assert bool(o[2:, 0].isnan().all())
    torch.testing.assert_close(o[:, 1], clean[:, 1])


@quick
@given(
    seeds,
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 4),
    st.none() | st.integers(1, 9),
    st.booleans(),
)
def test_paged_agrees_with_dense(seed, size, columns, kv_heads, skipped, window, biased):
    """Random permuted tables over NaN-poisoned pages, the last page partly filled, early blocks released."""
    generator = torch.Generator().manual_seed(seed)
    length = (skipped + columns) * size - int(torch.randint(0, size, (1,), generator=generator))
    start = skipped * size
    count = length - start
    q, k, v, bias = tokens(seed, (2, kv_heads * 2, 4), (count, kv_heads, 4), (count, kv_heads, 3), (count,))
    pages = kv_heads * columns + 3
    table = torch.randperm(pages, generator=generator)[: kv_heads * columns].view(kv_heads, columns)
    k_pages, v_pages = torch.full((pages, size, 4), math.nan), torch.full((pages, size, 3), math.nan)
    page_bias = torch.full((columns, size), math.nan)
    for token in range(count):
        for head in range(kv_heads):
            k_pages[table[head, token // size], token % size] = k[token, head]
            v_pages[table[head, token // size], token % size] = v[token, head]
        page_bias[token // size, token % size] = bias[token]
    at = {"q_pos": torch.tensor([length - 1, length]), "scale": 0.5, "window": window}
    shuffled = torch.randperm(columns, generator=generator)  # columns need not be in order of position
    o, lse = paged_attend(
        q,
        k_pages,
        v_pages,
        table=table[:, shuffled],
        block_index=skipped + shuffled,
        length=length,
        bias=page_bias[shuffled] if biased else None,
        **at,
    )
    k_pos = torch.arange(start, length)
    wanted, wanted_lse = attend(q, k, v, k_pos=k_pos, bias=bias if biased else None, **at)
    torch.testing.assert_close(o, wanted)
    torch.testing.assert_close(lse, wanted_lse)


# ------------------------------------------------------------------------------------------------------- registry


def only_even(call: int) -> str | None:
    return None if call % 2 == 0 else f"{call} is odd"


def anything(call: int) -> str | None:
    return None


def never(call: int) -> str | None:
    return "has no device"


def registry() -> OpRegistry:
    made = OpRegistry()
    made.register_reference("half", lambda x: x / 2)
    made.register("half", "any", anything, lambda x: x / 2, priority=-1)
    made.register("half", "even", only_even, lambda x: x // 2, priority=5)
    made.register("half", "gone", never, lambda x: x, priority=9)
    return made


def test_the_best_that_can_is_chosen_and_explained():
    made = registry()
    assert made.ops() == ("half",)
    assert [found.name for found in made.implementations("half")] == ["gone", "even", "any"]
    assert made.select("half", 4).name == "even"
    assert made.select("half", 4).run(4) == made.reference("half")(4)
    assert made.select("half", 3).name == "any"
    assert made.explain("half", 4) == [
        ("gone", "has no device"),
        ("even", "chosen"),
        ("any", "'even' has precedence"),
    ]
    assert made.explain("half", 3) == [("gone", "has no device"), ("even", "3 is odd"), ("any", "chosen")]


def test_first_come_first_among_equals():
    made = OpRegistry()
    made.register_reference("op", abs)
    made.register("op", "first", anything, abs)
    made.register("op", "second", anything, abs)
    assert made.select("op", 1).name == "first"


def test_every_reason_is_listed_when_none_can():
    made = OpRegistry()
    made.register_reference("op", abs)
    with pytest.raises(UnsupportedError, match="no implementation"):
        made.select("op", 1)
    made.register("op", "even", only_even, abs)
    made.register("op", "gone", never, abs)
    with pytest.raises(UnsupportedError) as caught:
        made.select("op", 1)
    assert caught.value.reasons == ["even: 1 is odd", "gone: has no device"]


def test_nothing_without_a_reference():
    made = OpRegistry()
    with pytest.raises(KVFoldError, match="no reference"):
        made.register("op", "fast", anything, abs)
    for ask in (made.reference, made.implementations):
        with pytest.raises(KVFoldError, match="unknown operation"):
            ask("op")
    with pytest.raises(KVFoldError, match="unknown operation"):
        made.select("op", 1)
    made.register_reference("op", abs)
    with pytest.raises(KVFoldError, match="it has one"):
        made.register_reference("op", abs)
    made.register("op", "fast", anything, abs)
    with pytest.raises(KVFoldError, match="taken"):
        made.register("op", "fast", anything, abs)


def test_registries_are_separate_objects():
    assert OpRegistry().ops() == ()
    registry()
    assert OpRegistry().ops() == ()
