"""Tables at any width: names whole, no empty column, nothing cut off."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from kvfold.tables import Figures, in_lines

RECIPES = ["raw", "int4", "int2:calibrated", "int4,sinks=4,recent=128+snapkv(keep=0.25,window=32)"]
HEADINGS = ["", "bits", "B/token", "smaller", "KL", "p99", "top-1", "Δppl", "tok/s"]


def printed(table: Figures, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as said:
        table.print(console)
    return said.get()


def table_of(recipes: list[str], headings: list[str] = HEADINGS) -> Figures:
    table = Figures("A table", headings)
    for number, recipe in enumerate(recipes):
        table.add(recipe, *(f"{number}{column}.0123" for column in range(len(headings) - 1)))
    return table


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_names_and_figures_are_whole(width: int) -> None:
    said = printed(table_of(RECIPES), width)
    assert max(map(len, said.splitlines())) <= width
    for recipe in RECIPES:
        if len(recipe) <= width // 2:
            assert recipe in said
    for number in range(len(RECIPES)):
        for column in range(len(HEADINGS) - 1):
            assert f"{number}{column}.0123" in said
    assert "…" not in said
    for heading in HEADINGS:
        assert heading in said


@given(
    recipes=st.lists(st.sampled_from([*RECIPES, "k8v4", "int4+quest(pages=64)"]), min_size=1, max_size=4),
    columns=st.integers(1, 12),
    width=st.integers(30, 160),
)
@settings(max_examples=40, deadline=None)
def test_nothing_is_lost_at_any_width(recipes: list[str], columns: int, width: int) -> None:
    headings = ["", *(f"head{column}" for column in range(columns))]
    said = printed(table_of(recipes, headings), width)
    for number in range(len(recipes)):
        for column in range(columns):
            assert f"{number}{column}.0123" in said
    for heading in headings:
        assert heading in said


@pytest.mark.parametrize("width", [10, 20, 40])
def test_a_long_name_is_broken_between_its_parts_only(width: int) -> None:
    lines = [line.strip() for line in in_lines(RECIPES[-1], width)]
    assert "".join(lines) == RECIPES[-1]
    for line in lines[1:]:
        assert line[0] in "+,"


def test_columns_that_hold_nothing_are_left_out() -> None:
    table = Figures(None, ("", "ms", "vs", "KL"))
    table.add("raw", "1.0", "", "0")
    table.add("int4", "2.0", "", "0.1")
    said = printed(table, 80)
    assert "vs" not in said
    assert "ms" in said


def test_markup_in_a_name_is_text() -> None:
    table = Figures(None, ("", "ms"))
    table.add("[bold]", "[green]1.0[/]")
    assert "[bold]" in printed(table, 80)
    assert "[green]" not in printed(table, 80)
