"""When retention runs and how much it leaves: arithmetic that books, scheduler and cache share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.formats import sealed_until, sink_blocks
from kvfold.rule import KeepRule

keep_rules = st.builds(
    lambda share, tokens, every, chunk: KeepRule(share, None if share else tokens, every=every, chunk=chunk),
    st.one_of(st.none(), st.floats(0.01, 1)),
    st.integers(1, 4096),
    st.sampled_from([0, 1, 7, 64]),
    st.sampled_from([0, 5, 512]),
)
layouts = st.fixed_dictionaries(
    {"block_size": st.sampled_from([1, 4, 16, 32]), "sinks": st.integers(0, 40), "recent": st.integers(0, 100)}
)


@given(keep_rules, layouts, st.integers(0, 5000), st.integers(1, 64))
def test_kept_pages_are_within_the_budget_and_what_there_is(rule, layout, length, heads):
    pages = rule.pages(length, heads, **layout)
    size, first = layout["block_size"], sink_blocks(layout["sinks"], layout["block_size"])
    candidates = max(0, sealed_until(length, size, layout["sinks"], layout["recent"]) - first)
    assert 0 <= pages <= heads * candidates
    # What is protected may be more than the budget already; beyond that nothing is.
    protected = length - candidates * size
    assert pages == 0 or pages * size / heads + protected <= rule.tokens(length)
    if candidates and pages < heads * candidates:
        assert (pages + 1) * size / heads + protected > rule.tokens(length) or rule.tokens(length) < protected


@given(layouts, st.integers(0, 5000), st.integers(1, 64))
def test_keeping_all_keeps_every_page(layout, length, heads):
    size = layout["block_size"]
    first = sink_blocks(layout["sinks"], size)
    end = sealed_until(length, size, layout["sinks"], layout["recent"])
    assert KeepRule(keep=1.0).pages(length, heads, **layout) == (heads * (end - first) if end * size <= length else 0)


@given(keep_rules, st.integers(0, 3000), st.integers(1, 2000))
def test_points_come_in_order_and_hang_on_the_prompt_alone(rule, length, prompt):
    point = rule.next_point(length, prompt)
    if point is None:
        assert length >= prompt
        assert rule.every == 0
        return
    assert point > length
    if length < prompt:
        assert point == prompt or (rule.chunk and point % rule.chunk == 0 and point < prompt)
    else:
        assert (point - prompt) % rule.every == 0
    # No step may skip one: from anywhere before a point, it is the next or a later one's predecessor.
    for start in range(max(0, point - 3), point):
        assert rule.next_point(start, prompt) <= point


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (KeepRule(keep=0.5), [100]),
        (KeepRule(keep=0.5, chunk=40), [40, 80, 100]),
        (KeepRule(budget=9, every=30), [100, 130, 160, 190]),
        (KeepRule(budget=9, every=50, chunk=64), [64, 100, 150, 200]),
    ],
)
def test_points_of_a_prompt_of_a_hundred_tokens(rule, expected):
    points, length = [], 0
    while (point := rule.next_point(length, 100)) is not None and point <= 200:
        points.append(point)
        length = point
    assert points == expected
