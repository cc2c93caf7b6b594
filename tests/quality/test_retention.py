"""The retention sweep: methods by name, comparisons in pairs, and whole runs with recipes and rivals that exist."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.retention import __main__ as command
from benchmarks.retention import session
from benchmarks.retention.compare import compare, paired
from benchmarks.retention.methods import KEEPS, METHODS, Method, choose, parse_keeps, with_recipes
from benchmarks.retention.picture import write_sweep
from benchmarks.retention.session import Sweep, SweepPlan, read_evaluation, run_sweep
from benchmarks.retention.table import cells, tally, verdict
from benchmarks.rivals.catalog import parse_rivals

from kvfold.errors import RequestError
from kvfold.quality.results import Evaluation, Row
from kvfold.quality.settings import EvalSettings
from kvfold.quality.statistics import task_score
from tests.quality.sample_evaluation import sample_evaluation, sample_rows


class Truncated(Method):
    """Stands for a method that needs no package: plain truncation for kvpress's side."""

    def theirs(self, keep: float) -> str:
        return f"truncation-{1 - keep:g}"


TRUNCATED = Truncated("window", "{base},recent={keep}", None)
SAME = Truncated("same", "int4", None)


# == names


def test_every_method_has_two_names_at_every_share() -> None:
    names = [name for method in METHODS for keep in KEEPS if (name := method.theirs(keep))]
    assert parse_rivals(",".join(names)) == tuple(names)
    assert len(set(names)) == sum(method.press is not None for method in METHODS) * len(KEEPS)
    ours = [method.ours(keep, "int4") for method in METHODS for keep in KEEPS]
    assert len(set(ours)) == len(ours)
    assert "int4+snapkv(keep=0.0625)" in ours
    assert METHODS[0].theirs(0.125) == "kvpress-random-0.875"


def test_methods_are_chosen_by_patterns_and_given_other_recipes() -> None:
    assert choose("*") == METHODS
    assert [method.name for method in choose("kvzip, adakv*")] == ["adakv", "adakv-expected", "kvzip"]
    assert choose("none") == ()
    known = with_recipes(["snapkv={base}+snap(keep={keep},window=8)", "mine=int2"])
    assert next(m for m in known if m.name == "snapkv").ours(0.5, "raw") == "raw+snap(keep=0.5,window=8)"
    assert next(m for m in known if m.name == "snapkv").press == "snapkv"
    assert (known[-1].ours(0.5, "raw"), known[-1].theirs(0.5)) == ("int2", None)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: choose("snapvk"), "no method is like 'snapvk'"),
        (lambda: choose("kvzip,zip*"), r"no method is like 'zip\*'"),
        (lambda: choose(""), "no method is like ''"),
        (lambda: with_recipes(["snapkv"]), "bad method 'snapkv'"),
        (lambda: with_recipes(["snapkv=raw+x({share})"]), "'share' in braces"),
        (lambda: parse_keeps("0.5,1"), "bad shares"),
        (lambda: parse_keeps("half"), "bad shares"),
        (lambda: parse_keeps(","), "bad shares"),
    ],
)
def test_what_means_nothing_is_refused(call, says: str) -> None:
    with pytest.raises(RequestError, match=says) as refused:
        call()
    assert refused.value.hint


def test_shares() -> None:
    assert parse_keeps("0.5, 0.25,0.5") == (0.5, 0.25)


# == pairs


def test_the_error_is_that_of_the_differences() -> None:
    """By hand: differences 1, 0, 0, 1 in one task and 0, 0, -1, 0 in the other."""
    ours = {"kv": [1, 1, 0, 1], "vt": [1, 0, 0, 1]}
    theirs = {"kv": [0, 1, 0, 0], "vt": [1, 0, 1, 1]}
    difference, error = paired(ours, theirs)
    assert difference == pytest.approx((0.5 - 0.25) / 2)
    assert error == pytest.approx(math.sqrt(1 / 3 / 4 + 0.25 / 4) / 2)
    assert paired(ours, ours) == (0, 0)


def test_samples_that_are_not_the_same_make_no_pairs() -> None:
    with pytest.raises(ValueError, match="not the same"):
        paired({"kv": [1]}, {"vt": [1]})
    with pytest.raises(ValueError, match="shorter"):
        paired({"kv": [1, 0]}, {"kv": [1]})


def scored(name: str, scores: list[float], **changes: object) -> Row:
    return replace(sample_rows()[0], contestant=name, tasks={"kv": task_score(scores)}, **changes)


def test_rows_are_compared_method_by_method() -> None:
    method = Method("tova", "{base}+tova(keep={keep})", "tova")
    rows = [
        scored("int4+tova(keep=0.25)", [1.0] * 10 + [0.0] * 10, kl_mean=0.5),
        scored("kvpress-tova-0.75", [0.0] * 20),
        scored("int4+tova(keep=0.5)", [1.0] * 19 + [0.0]),
        scored("kvpress-tova-0.5", [1.0] * 20),
        scored("kvpress-tova-0.9375", [0.0] * 20),
        scored("raw+tova(keep=0.75)", [0.0] * 20),
    ]
    half, quarter, sixteenth = compare(rows, [method], [0.0625, 0.25, 0.5, 0.75], base="int4")
    assert (half.keep, half.level, verdict(half)) == (0.5, True, "level")
    assert half.difference == pytest.approx(-0.05)
    assert (quarter.level, verdict(quarter)) == (False, "better")
    assert quarter.error == pytest.approx(math.sqrt(0.25 * 20 / 19 / 20))
    assert quarter.ours is not None
    assert (quarter.ours.score, quarter.ours.kl) == (0.5, 0.5)
    assert quarter.ours.low == pytest.approx(task_score([1.0, 0.0] * 10).low)
    assert (sixteenth.ours, sixteenth.difference, verdict(sixteenth)) == (None, None, "")
    assert cells(sixteenth)[:6] == ("tova", "0.0625", "–", "0.000", "–", "")
    assert cells(quarter)[4:6] == ("+0.500 ± 0.115", "better")
    assert tally([half, quarter, sixteenth]).startswith("Of 2 comparisons 1 are within chance, in 1 kvfold is better")
    assert "one side alone" in tally([sixteenth])


def test_results_without_scores_of_samples_are_not_compared() -> None:
    old = scored("int4+tova(keep=0.5)", [1.0, 0.0])
    old = replace(old, tasks={"kv": replace(old.tasks["kv"], scores=())})
    (found,) = compare([old, scored("kvpress-tova-0.5", [1.0, 1.0])], choose("tova"), [0.5], base="int4")
    assert found.ours is not None
    assert found.ours.score == 0.5
    assert (found.difference, found.level) == (None, None)


# == whole runs

SETTINGS = EvalSettings(
    tasks=("kv",),
    context=256,
    samples=2,
    text_windows=1,
    scored_tokens=32,
    generation_tokens=0,
    decode_steps=2,
    compress="context",
)


def plan(result: Path, **changes: object) -> SweepPlan:
    asked: dict[str, object] = {
        "model": "bundled",
        "methods": [SAME],
        "known": [SAME],
        "keeps": (0.5, 0.25),
        "base": "raw",
        "side": "both",
        "settings": SETTINGS,
        "command": "test",
        "result": result,
    }
    return SweepPlan(**asked | changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path]:
    file = tmp_path_factory.mktemp("sweep") / "retention.json"
    return run_sweep(plan(file)), file


def test_a_sweep_measures_both_sides_and_leaves_one_file(sweep: tuple[Sweep, Path]) -> None:
    found, file = sweep
    names = [row.contestant for row in found.evaluation.rows]
    assert names == ["raw", "int4", "transformers-full", "truncation-0.5", "truncation-0.75"]
    assert [(each.keep, each.ours is not None, each.theirs is not None) for each in found.comparisons] == [
        (0.5, True, True),
        (0.25, True, True),
    ]
    assert [path.name for path in file.parent.iterdir()] == ["retention.json"]
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["commands"] == ["test"]
    assert data["comparisons"][1]["theirs"]["contestant"] == "truncation-0.75"
    assert read_evaluation(file) == found.evaluation
    assert found.evaluation.settings["compress"] == "context"


def test_sides_that_ran_apart_are_put_together(sweep: tuple[Sweep, Path], tmp_path: Path) -> None:
    """Also from a plain result of the rivals, without measuring anything again."""
    whole, _ = sweep
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    run_sweep(plan(ours, side="ours", command="one"))
    rivals = replace(whole.evaluation, command="two", rows=whole.evaluation.rows[2:])
    theirs.write_text(json.dumps(rivals.as_json()), encoding="utf-8")

    def nothing(what: str, share: float) -> None:
        raise AssertionError(what)

    merged = run_sweep(plan(tmp_path / "all.json", methods=[], merge=[ours, theirs]), progress=nothing)
    assert [row.contestant for row in merged.evaluation.rows] == [row.contestant for row in whole.evaluation.rows]
    assert merged.commands == ["one", "two"]
    assert [each.difference for each in merged.comparisons] == [each.difference for each in whole.comparisons]


def test_an_interrupted_sweep_goes_on(sweep: tuple[Sweep, Path], tmp_path: Path) -> None:
    file, begun = tmp_path / "retention.json", list[str]()

    def interrupt(what: str, share: float) -> None:
        begun.append(what)
        if what.startswith("int4"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(plan(file), progress=interrupt)
    assert not file.exists()
    rest: list[str] = []
    found = run_sweep(plan(file), progress=lambda what, share: rest.append(what))
    assert rest[0] == begun[-1]
    assert not set(rest) & set(begun[:-1])
    assert [each.difference for each in found.comparisons] == [each.difference for each in sweep[0].comparisons]


def test_results_of_other_settings_are_refused_before_anything_runs(
    sweep: tuple[Sweep, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, file = sweep
    other = tmp_path / "other.json"
    changed = whole.evaluation.settings | {"samples": 3}
    other.write_text(json.dumps(replace(whole.evaluation, settings=changed).as_json()), encoding="utf-8")
    monkeypatch.setattr(session, "run_rivals", lambda *_, **__: pytest.fail("was run"))
    with pytest.raises(RequestError, match="samples"):
        run_sweep(plan(tmp_path / "all.json", merge=[file, other]))
    with pytest.raises(RequestError, match="unknown side"):
        plan(tmp_path / "all.json", side="mine")
    with pytest.raises(RequestError, match="nothing to do"):
        plan(tmp_path / "all.json", methods=[])


def test_the_command_line(sweep: tuple[Sweep, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    file = tmp_path / "retention.json"
    arguments = ["--methods", "none", "--merge", str(sweep[1]), "--json", str(file), "--recipe", "tova=int4"]
    monkeypatch.setattr(sys, "argv", ["retention", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0
    assert "tova" in capsys.readouterr().out
    assert len(json.loads(file.read_text(encoding="utf-8"))["comparisons"]) == len(KEEPS)
    monkeypatch.setattr(sys, "argv", ["retention", "--methods", "tova", "--json", str(file), "--recipe", "tova=int5x"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "int5x" in capsys.readouterr().err


# == the page


def test_the_page_shows_each_method_with_both_sides(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shares = {0.5: "0.5", 0.25: "0.75"}
    rows = [scored("raw", [1.0] * 20)]
    for keep, ratio in shares.items():
        rows.append(scored(f"raw+tova(keep={keep})", [1.0] * 18 + [0.0] * 2, kl_mean=0.1, kv_bytes_per_token=900.0))
        rows.append(scored(f"kvpress-tova-{ratio}", [0.0] * 20, kl_mean=0.2, kv_bytes_per_token=1000.0))
    rows.append(scored("kvpress-kvzip-0.5", [1.0] * 20, kl_mean=0.0))
    evaluation: Evaluation = replace(sample_evaluation(rows), settings={"context": 2048, "samples": 20})
    sweep = Sweep(commands=["one", "two"], evaluation=evaluation, comparisons=compare(rows, METHODS, KEEPS))
    page = write_sweep(sweep, tmp_path).read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.html",
        *("kl-bytes.png", "kl-share.png", "score-bytes.png", "score-share.png"),
    ]
    assert page.count("<svg") == 8  # two methods, four ways to look
    assert "tova: score by share. kvfold 0.9 at 0.25, 0.9 at 0.5; kvpress 0 at 0.25, 0 at 0.5." in page
    assert "kvzip: KL by bytes. kvpress" in page
    assert "<pre>one</pre><pre>two</pre>" in page
    again = write_sweep(sweep, tmp_path / "again").read_text(encoding="utf-8")
    assert again == page
