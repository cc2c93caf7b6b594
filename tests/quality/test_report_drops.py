"""How the report draws recipes that drop tokens, and curves over a shrinking budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvfold.quality.report import write_report
from kvfold.quality.report.canvas import Sheet, house_style
from kvfold.quality.report.curves import Curve, Panel, curve_drawings
from kvfold.quality.report.frontier import frontier_drawing
from kvfold.quality.report.palette import LIGHT, family_styles
from kvfold.quality.report.panels import task_drawings
from kvfold.quality.report.points import drops_tokens, frontier, measures, short_names
from kvfold.quality.report.scales import share_ticks
from kvfold.quality.results import Row
from tests.quality.sample_evaluation import sample_evaluation, sample_rows

pytest.importorskip("matplotlib")

DROPPING = "raw+kvzip(keep=0.25)"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    rows = sample_rows()
    dropping = replace(
        rows[2], contestant=DROPPING, recipe=DROPPING, bits_per_value=None, kv_bytes_per_token=3200.0, errors=None
    )
    return [*rows[:4], dropping, *rows[6:8], *rows[-2:]]


def outlines(sheet: Sheet) -> list[str]:
    """Colours of the markers that are outlines."""
    from matplotlib.lines import Line2D

    marks = [line for line in sheet.figure.findobj(Line2D) if line.get_marker() not in ("None", None, "")]
    return [str(mark.get_markeredgecolor()) for mark in marks if mark.get_markerfacecolor() == LIGHT["paper"]]


def test_only_ours_are_told_apart(rows: list[Row]) -> None:
    assert [row.contestant for row in rows if drops_tokens(row)] == [DROPPING]
    assert rows[-1].bits_per_value is None  # truncation drops too, but all of its family does


def test_a_recipe_that_drops_tokens_is_an_outline_on_the_same_frontier(rows: list[Row]) -> None:
    names, styles = short_names(rows), family_styles(row.family for row in rows)
    measure = measures(rows)[0]
    assert DROPPING in [point.name for point in frontier(measure.points)]
    with house_style():
        drawn = frontier_drawing(measure, names, styles).draw(1120)
        bars = task_drawings(rows, names, styles)[0].draw(360)
        plain = frontier_drawing(measures(rows[:4])[0], names, styles).draw(1120)
    texts = [text.get_text() for text in drawn.figure.texts]
    assert "kvfold, tokens dropped" in texts
    assert outlines(drawn) == [LIGHT["blue"]] * 2  # the point, and its key
    assert outlines(bars) == [LIGHT["blue"]]
    assert outlines(plain) == []
    assert "kvfold, tokens dropped" not in [text.get_text() for text in plain.figure.texts]


def test_the_page_has_no_bits_for_it(rows: list[Row], tmp_path: Path) -> None:
    page = write_report(sample_evaluation(rows), tmp_path).read_text(encoding="utf-8")
    assert f'{DROPPING}</th><td class="none">–</td>' in page


def panel(title: str = "kvzip") -> Panel:
    ours = Curve("kvfold", ((0.0625, 0.2, 0.1, 0.4), (0.5, 0.9, 0.8, 0.95)))
    return Panel(title, (ours, Curve("kvpress", ((0.125, 0.3, 0.3, 0.3),))), 0.97)


def test_curves_are_solid_and_dashed_on_common_scales() -> None:
    styles = family_styles(["kvfold", "kvpress"])
    styles["kvpress"] = replace(styles["kvpress"], dash=(5, 2))
    empty = Panel("nothing", (Curve("kvfold", ()),))
    drawings = curve_drawings("score", [panel(), empty, panel("tova")], styles, across="share", up="score")
    assert [drawing.name for drawing in drawings] == ["score-kvzip", "score-tova"]
    assert drawings[0].alt == "kvzip: score by share. kvfold 0.2 at 0.0625, 0.9 at 0.5; kvpress 0.3 at 0.125."
    with house_style():
        sheet = drawings[0].draw(360)
    lines = {line.get_color(): line for line in sheet.figure.axes[0].get_lines() if line.get_marker() in ("o", "D")}
    assert lines[LIGHT["blue"]].is_dashed() is False
    assert lines[LIGHT["green"]].is_dashed() is True
    x, y = lines[LIGHT["blue"]].get_xydata().T
    assert list(x) == sorted(x)
    assert 0 <= min(y) < max(y) <= 1
    assert curve_drawings("score", [empty], styles, across="share", up="score") == []


@pytest.mark.parametrize(("across", "up"), [("share", "kl"), ("bytes", "score"), ("bytes", "kl")])
def test_every_kind_of_axis(across, up) -> None:
    points = ((512.0, 0.0, 0.0, 0.0), (2048.0, 0.5, 0.5, 0.5)) if across == "bytes" else ((0.5, 0.1, 0.1, 0.1),)
    drawings = curve_drawings(
        "x", [Panel("m", (Curve("kvfold", points),))], family_styles(["kvfold"]), across=across, up=up
    )
    with house_style():
        sheet = drawings[0].draw(368)
    texts = [text.get_text() for text in sheet.figure.texts]
    assert any("bytes" in text if across == "bytes" else "share" in text for text in texts)


@pytest.mark.parametrize("low", [0.0625, 0.07, 0.5, 0.9])
def test_shares_have_a_tick_at_each_halving(low: float) -> None:
    scale = share_ticks(low)
    assert scale.ticks[-1] == (0.0, "1")
    assert all(0 <= scale.part(value) <= 1 for value, _ in scale.ticks)
    assert scale.ticks[0][1] == {0.0625: "0.0625", 0.07: "0.125"}.get(low, "0.5")
