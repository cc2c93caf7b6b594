"""The demo says how fast decoding is where the cache matters: many sequences at once, measured in that run."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from kvfold.bench import demo as speed
from kvfold.bench.demo import MOST_SEQUENCES, demo_speed
from kvfold.bench.shapes import random_model
from kvfold.bench_report import demo_speed_report
from kvfold.quality.demo import DemoRow
from kvfold.quality.tasks import demo_document
from kvfold.report import demo_report
from tests.calibrations import tiny


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("tiny", dtype=torch.bfloat16, max_positions=700)


def told(report: Any, *arguments: Any, **options: Any) -> str:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as said:
        report(console, *arguments, **options)
    return said.get()


def test_the_questions_table_says_nothing_of_speed() -> None:
    document = demo_document(0, 300, lambda text: len(text) // 4)
    row = DemoRow(
        recipe="int4", kv_bytes=1000, compression=3.0, answers_right=1, answers_total=1, kl=0.1, kl_p99=0.2,
        top1_agreement=0.9, positions=100, context_tokens=300, answers=(),
    )  # fmt: skip
    said = told(demo_report, document, [row], answers=False)
    assert "int4" in said
    assert "tok/s" not in said


def test_steps_are_measured_with_many_sequences(model: Any) -> None:
    rows, why_not = demo_speed(model, ["raw", "int4"])
    assert why_not == ""
    assert [row.contestant for row in rows] == ["transformers", "raw", "int4"]
    assert all(row.batch == MOST_SEQUENCES and row.context >= 256 for row in rows)
    assert all(row.seconds > 0 and row.samples >= 1 for row in rows)
    said = told(demo_speed_report, rows, why_not)
    assert f"{MOST_SEQUENCES} sequences of {rows[0].context} tokens" in said
    for row in rows:
        assert f"{row.tok_s:,.0f}" in said
    assert "random keys and values" in said


def test_large_models_take_fewer_sequences(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, *_), _ = demo_speed(model, ["raw"])
    monkeypatch.setattr(speed, "_MOST_BYTES", {"cpu": 3 * first.kv_bytes // first.batch, "cuda": 0})
    (fewer, *_), _ = demo_speed(model, ["raw"])
    assert 1 <= fewer.batch <= 3


def test_a_gate_that_fails_gives_no_figures(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvfold.bench.decode._GATE", -1.0)
    rows, why_not = demo_speed(model, ["raw"])
    assert rows == []
    assert "correctness gate" in why_not
    said = told(demo_speed_report, rows, why_not)
    assert "Speed was not measured" in said
    assert "correctness gate" in said


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_models_with_windows_are_not_timed(family: str) -> None:
    rows, why_not = demo_speed(tiny(family), ["raw", "int4"])
    assert rows == []
    assert "window" in why_not
