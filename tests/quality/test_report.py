"""The report: what is written, what is said, and that nothing covers anything."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvfold.errors import KVFoldError
from kvfold.quality.report import ReportError, canvas, require_matplotlib, write_report
from kvfold.quality.report.canvas import Sheet, house_style
from kvfold.quality.report.frontier import frontier_drawing
from kvfold.quality.report.labels import Box, place, spread
from kvfold.quality.report.palette import DARK, LIGHT, family_styles, with_variables
from kvfold.quality.report.panels import position_drawings, task_drawings
from kvfold.quality.report.points import frontier, measures, short_names, standing, verdict
from kvfold.quality.report.scales import byte_ticks, bytes_text, divergence_ticks, number_text, score_ticks
from kvfold.quality.results import ErrorMap, Row
from tests.quality.sample_evaluation import sample_evaluation, sample_rows

matplotlib = pytest.importorskip("matplotlib")

HELD = "No rival's point lies on or beyond the frontier of kvfold's points."


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return sample_rows()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report."""
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    assert write_report(sample_evaluation(), folder) == folder / "index.html"
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def row_named(rows: list[Row], name: str) -> Row:
    return next(row for row in rows if row.contestant == name)


def bare(row: Row) -> Row:
    """A row with the text part only."""
    return replace(row, tasks={}, generation=None, errors=None, kl_by_position=[], bits_per_value=None, decode_tok_s=0)


# == what is written


def test_the_page_and_its_pictures_are_there(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    frontiers = ["frontier-generation.png", "frontier-kl.png", "frontier-tasks.png"]
    assert names == ["errors.png", *frontiers, "index.html", "positions.png", "tasks.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


def test_the_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?://|<link|<script|@import|\bsrc=|url\((?!#|data:)", text)
    assert not re.search(r'href="(?!#)', text)


def test_ids_are_unique_and_all_references_lead_somewhere(page: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_figures_take_their_colours_from_the_page(page: str) -> None:
    drawn = page[page.index("<svg") :]
    assert "var(--ink)" in drawn
    assert "var(--blue)" in drawn
    assert not [tone for tone, value in LIGHT.items() if value in drawn]


def test_the_same_evaluation_gives_the_same_bytes(tmp_path: Path) -> None:
    some = [row for row in sample_rows() if row.contestant in ("raw", "int4", "transformers-hqq-4bit")]
    one, two = (write_report(sample_evaluation(some), tmp_path / name).parent for name in ("one", "two"))
    for path in one.iterdir():
        assert (two / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_run_is_told_in_full(page: str) -> None:
    for said in ("kvfold eval --model bundled", "int2,rotation=calibrated", "2.13.0", "2 cores, AVX2", "<td>2048</td>"):
        assert said in page, said
    assert page.count("<svg") == 2 * (1 + 2 + 4) + 9 + 6  # two widths of frontiers and positions; tasks; scale and maps


def test_names_are_data_and_no_markup(tmp_path: Path, rows: list[Row]) -> None:
    named = [replace(rows[2], contestant='<b>$x_y$&"q"'), replace(rows[0], contestant="漢字"), *rows[6:8]]
    page = write_report(sample_evaluation(named), tmp_path).read_text(encoding="utf-8")
    assert "&lt;b&gt;$x_y$&amp;" in page
    assert "<b>$x" not in page
    assert "漢字" in page


def test_settings_of_matplotlib_are_left_alone(tmp_path: Path, rows: list[Row]) -> None:
    with matplotlib.rc_context({"font.size": 31, "svg.hashsalt": "mine"}):
        before = dict(matplotlib.rcParams)
        write_report(sample_evaluation([bare(rows[0])]), tmp_path)
        assert dict(matplotlib.rcParams) == before


def test_importing_the_report_draws_in_nothing_heavy() -> None:
    code = (
        "import sys, kvfold.quality.report\n"
        "assert not {'matplotlib', 'numpy', 'torch', 'PIL'} & set(sys.modules), 'heavy'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("count", [1, 2, 6, 18])
def test_rows_may_lack_parts(count: int, rows: list[Row], tmp_path: Path) -> None:
    page = write_report(sample_evaluation([bare(row) for row in rows[:count]]), tmp_path).read_text(encoding="utf-8")
    assert "The frontier" in page
    assert "Task by task" not in page
    assert "Where the error sits" not in page
    assert [path.name for path in tmp_path.glob("*.png")] == ["frontier-kl.png"]


def test_numbers_that_are_none_are_left_out_and_named(rows: list[Row], tmp_path: Path) -> None:
    odd = replace(
        rows[2],
        kl_mean=math.nan,
        ppl_delta=math.inf,
        kl_by_position=[(0, math.nan), (16, 0.0), (32, 0.1)],
        errors=ErrorMap(k=[[math.nan, 0.1], [0.2]], v=[[0.0], []]),
    )
    page = write_report(sample_evaluation([rows[0], odd, rows[7]]), tmp_path).read_text(encoding="utf-8")
    assert "Not compared, without a value: int4." in page
    assert ">nan<" not in page
    assert ">inf<" not in page


def test_rivals_alone_and_many_layers_can_be_drawn(rows: list[Row], tmp_path: Path) -> None:
    grid = [[0.01 * (layer + head + 1) for head in range(16)] for layer in range(64)]
    deep = replace(rows[7], errors=ErrorMap(k=grid, v=grid))
    page = write_report(sample_evaluation([bare(rows[6]), deep]), tmp_path).read_text(encoding="utf-8")
    assert "No kvfold recipe to compare with." in page
    assert "data:image/png;base64," in page  # so many cells are one picture


# == what goes wrong


def test_no_rows_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="no row was measured"):
        write_report(sample_evaluation([]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_is_one_error(tmp_path: Path, rows: list[Row]) -> None:
    (tmp_path / "out").write_text("here first")
    with pytest.raises(ReportError, match="cannot be written") as raised:
        write_report(sample_evaluation([bare(rows[0])]), tmp_path / "out")
    assert raised.value.hint
    assert (tmp_path / "out").read_text() == "here first"


def test_a_write_that_fails_leaves_no_half_file(
    tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index.html").write_text("old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ReportError, match="No space left"):
        write_report(sample_evaluation([bare(rows[0])]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_text() == "old"


def test_without_matplotlib_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(canvas, "find_spec", lambda name: None)
    with pytest.raises(KVFoldError, match="matplotlib is not installed") as raised:
        require_matplotlib()
    assert raised.value.hint == "pip install 'kvfold[eval]'"
    with pytest.raises(ReportError):
        write_report(sample_evaluation(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# == what is said


def test_the_verdict_is_good_when_it_may_be(rows: list[Row], page: str) -> None:
    told = {measure.key: verdict(measure) for measure in measures(rows)}
    assert told["kl"] == (True, HELD)
    assert told["generation"] == (True, HELD)
    assert HELD in page.replace("&#x27;", "'")


def test_a_rival_that_beats_a_point_is_named(rows: list[Row]) -> None:
    better = replace(row_named(rows, "transformers-hqq-4bit"), kl_mean=1e-3, kv_bytes_per_token=3000.0)
    held, text = verdict(measures([*rows[:6], better])[0])
    assert held is False
    assert text == "Above and left of kvfold's points: transformers-hqq-4bit (beats k4v2, int4)."


def test_a_rival_beyond_the_line_is_named_though_it_beats_nobody(rows: list[Row]) -> None:
    smaller = replace(row_named(rows, "truncation-0.75"), kv_bytes_per_token=1000.0)
    equal = replace(row_named(rows, "truncation-0.50"), kv_bytes_per_token=12288.0, kl_mean=0.0)
    measure = measures([*rows[:6], smaller, equal])[0]
    assert verdict(measure) == (
        False,
        "On or beyond the frontier, though no kvfold point is beaten: truncation-0.75, truncation-0.50.",
    )
    kinds = [standing(point, measure.points).kind for point in measure.points[6:]]
    assert kinds == ["between", "same"]


def test_a_rival_inside_the_frontier_may_still_beat_one(rows: list[Row]) -> None:
    int2 = row_named(rows, "int2")
    inside = replace(row_named(rows, "transformers-hqq-2bit"), kl_mean=0.1, kv_bytes_per_token=int2.kv_bytes_per_token)
    held, text = verdict(measures([*rows[:6], inside])[0])
    assert held is True
    assert text == f"{HELD} Inside it, transformers-hqq-2bit beats int2."


def test_nobody_to_compare_with_is_no_victory(rows: list[Row], tmp_path: Path) -> None:
    assert verdict(measures(rows[:6])[0])[0] is None
    assert verdict(measures(rows[6:])[0])[0] is None
    page = write_report(sample_evaluation([bare(row) for row in rows[:3]]), tmp_path).read_text(encoding="utf-8")
    assert "No rival to compare with." in page
    assert "lies on or beyond" not in page


def test_contestants_without_a_measure_are_named_in_its_verdict(rows: list[Row]) -> None:
    generation = next(m for m in measures([*rows[:7], bare(rows[7])]) if m.key == "generation")
    assert verdict(generation) == (True, f"{HELD} Not compared, without a value: transformers-hqq-4bit.")


def test_the_frontier_is_what_no_other_of_ours_beats(rows: list[Row]) -> None:
    front = frontier(measures(rows)[0].points)
    assert [point.name for point in front] == ["int2,rotation=calibrated", "k4v2", "int4", "int8", "raw"]
    twice = frontier(measures([rows[2], replace(rows[2], contestant="again")])[0].points)
    assert [point.name for point in twice] == ["int4"]


def test_the_mean_score_is_taken_over_the_tasks_that_all_have(rows: list[Row]) -> None:
    fewer = replace(rows[7], tasks={task: score for task, score in rows[7].tasks.items() if task in ("kv", "vt")})
    measure = measures([rows[0], fewer])[-1]
    assert measure.axis == "mean score of 2 tasks"
    assert measure.points[0].value == pytest.approx((rows[0].tasks["kv"].score + rows[0].tasks["vt"].score) / 2)
    assert measure.points[0].low < measure.points[0].value < measure.points[0].high


def test_the_best_of_a_column_is_marked_and_raw_is_not_a_contender(page: str) -> None:
    assert re.search(r'class="ours front">int8</th>.*?<td class="best">2\.4·10⁻⁵</td>', page)
    raw = re.search(r'class="ours front">raw</th>(.*?)</tr>', page)
    assert raw
    assert "best" not in raw[1]


def test_short_names_are_short_and_unique(rows: list[Row]) -> None:
    long = [replace(rows[2], contestant=f"int4,rotation=calibrated,group={group},sinks=8") for group in (32, 64)]
    names = short_names([*rows, *long, replace(rows[7], contestant="hqq-4bit")])
    assert len(set(names.values())) == len(names)
    assert max(map(len, names.values())) <= 29
    assert names["transformers-hqq-4bit"] == "hqq-4bit"
    assert names["truncation-0.75"] == "truncation-0.75"


# == how it looks


def texts_of(sheet: Sheet) -> list[tuple[str, Box]]:
    """Every text of a figure with the box it takes, in pixels from the lower left."""
    from matplotlib.text import Text

    sheet.figure.draw_without_rendering()
    found = []
    for text in sheet.figure.findobj(Text):
        if text.get_text() and text.get_visible():
            extent = text.get_window_extent()
            found.append((text.get_text(), Box(extent.x0, extent.y0, extent.x1, extent.y1)))
    return found


@pytest.mark.parametrize("width", [368, 556, 1120])
def test_no_text_covers_another_or_leaves_the_figure(width: float, rows: list[Row]) -> None:
    names, styles = short_names(rows), family_styles(row.family for row in rows)
    drawings = [frontier_drawing(measure, names, styles) for measure in measures(rows)]
    drawings += [*position_drawings(rows, names, styles), *task_drawings(rows, names, styles)[:1]]
    for drawing in drawings:
        with house_style():
            sheet = drawing.draw(width)
        texts = texts_of(sheet)
        assert len(texts) > 5
        for index, (text, box) in enumerate(texts):
            assert box.x0 >= -4, (drawing.name, text)
            assert box.x1 <= width + 4, (drawing.name, text)
            for other, taken in texts[:index]:
                assert box.overlap(taken) < 12, (drawing.name, text, other)


@pytest.mark.parametrize("seed", range(4))
def test_labels_stand_clear_of_each_other_and_of_all_points(seed: int) -> None:
    chance = random.Random(seed)
    points = [(chance.uniform(20, 480), chance.uniform(20, 380)) for _ in range(18)]
    points[5] = points[6] = points[7]
    sizes = [(chance.uniform(30, 120), 14.0) for _ in points]
    bounds = Box(0, 0, 500, 400)
    boxes = [label.box for label in place(points, sizes, bounds, radius=6)]
    for index, box in enumerate(boxes):
        assert bounds.x0 <= box.x0 <= box.x1 <= bounds.x1
        assert bounds.y0 <= box.y0 <= box.y1 <= bounds.y1
        assert not any(box.overlap(other) for other in boxes[:index])
        assert not any(box.overlap(Box(x - 4, y - 4, x + 4, y + 4)) for x, y in points)


def test_a_lone_label_stands_to_the_right() -> None:
    (label,) = place([(50, 50)], [(40, 12)], Box(0, 0, 200, 100), radius=5)
    assert label.leader is None
    assert label.box.x0 > 50
    assert (label.box.y0 + label.box.y1) / 2 == pytest.approx(50)


def test_labels_keep_off_lines() -> None:
    line = (0.0, 50.0, 200.0, 50.0)
    (label,) = place([(50, 50)], [(40, 12)], Box(0, 0, 200, 100), radius=5, lines=[line])
    assert label.box.length_inside(line) == 0


def test_spread_keeps_order_distance_and_bounds() -> None:
    assert spread([10, 50, 90], 15, 0, 100) == [10, 50, 90]
    assert spread([50, 50], 10, 0, 100) == [45, 55]
    assert spread([52, 50, 99, 98], 10, 0, 100) == pytest.approx([56, 46, 100, 90])
    tight = spread([1, 1, 1, 1], 50, 0, 90)
    assert tight == pytest.approx([0, 30, 60, 90])


@pytest.mark.parametrize(("low", "high", "most"), [(2396, 12288, 15), (2396, 12288, 4), (500, 500, 3), (10, 1e9, 6)])
def test_byte_ticks_are_round_few_and_inside(low: float, high: float, most: int) -> None:
    scale = byte_ticks(low, high, most=most)
    assert 1 <= len(scale.ticks) <= most
    assert all(0 <= scale.part(value) <= 1 for value, _ in scale.ticks)
    assert 0 < scale.part(math.log2(low)) <= scale.part(math.log2(high)) < 1


@pytest.mark.parametrize("values", [[0.0], [0.3], [0.0, 0.02, 0.021], [0.0, 1e-5, 2.0], [1e-6, 1e-12]])
def test_divergences_have_ticks_and_zero_a_lane(values: list[float]) -> None:
    scale = divergence_ticks(values)
    assert scale.ticks
    assert all(0 <= scale.part(value) <= 1 for value, _ in scale.ticks)
    assert ("0" in [text for _, text in scale.ticks]) == (min(values) < 1e-8)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.97, 1.0), (0.5, 0.5), (0.1, 0.7)])
def test_scores_have_ticks_up_to_one(low: float, high: float) -> None:
    scale = score_ticks(low, high)
    assert scale.ticks
    assert all(-1e-9 <= value <= 1 + 1e-9 and 0 <= scale.part(value) <= 1 for value, _ in scale.ticks)


def test_numbers_as_people_write_them() -> None:
    assert [number_text(value) for value in (0.0, 0.0123, 2.4e-5, 12.6, math.nan)] == [
        "0",
        "0.012",
        "2.4·10⁻⁵",
        "13",
        "–",
    ]
    assert [bytes_text(value) for value in (768, 1536, 12288, 3 * 2**20)] == ["768 B", "1.5 KiB", "12 KiB", "3 MiB"]


def contrast(one: str, two: str) -> float:
    """Contrast of two colours as the web's rules reckon it, 1 to 21."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("tones", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_have_contrast_on_every_ground(tones: dict[str, str]) -> None:
    grounds = ("paper", "panel", "tint")
    lines = ("edge", "rule", "ghost")
    for tone in tones.keys() - set(grounds) - set(lines):
        for ground in grounds:
            assert contrast(tones[tone], tones[ground]) >= 4.5, (tone, ground)


def test_tones_are_distinct_and_come_in_pairs() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)
    assert with_variables(f"fill: {LIGHT['blue']}") == "fill: var(--blue)"


def test_families_keep_their_marks_and_differ_in_shape() -> None:
    styles = family_styles(["zebra", "truncation", "kvfold", "apple"])
    assert list(styles) == ["kvfold", "truncation", "apple", "zebra"]
    assert styles["kvfold"] == family_styles(["kvfold"])["kvfold"]
    assert len({style.marker for style in styles.values()}) == len(styles)
