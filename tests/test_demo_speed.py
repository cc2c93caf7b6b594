"""The demo says how fast decoding is where the cache matters: many sequences at once, measured in that run."""

from __future__ import annotations

import io
from dataclasses import fields
from typing import Any

import pytest
from rich.console import Console

from kvfold.quality.demo import DemoRow
from kvfold.quality.tasks import demo_document
from kvfold.report import demo_report


@pytest.mark.xfail(strict=True, reason="issue 11, E.14: the speed of one short sequence stands in the demo's table")
def test_the_questions_table_says_nothing_of_speed() -> None:
    document = demo_document(0, 300, lambda text: len(text) // 4)
    values: dict[str, Any] = {field.name: 1 for field in fields(DemoRow)}
    row = DemoRow(**values | {"recipe": "int4", "answers": (), "idle": ()})
    console = Console(width=80, file=io.StringIO())
    with console.capture() as said:
        demo_report(console, document, [row], answers=False)
    assert "int4" in said.get()
    assert "tok/s" not in said.get()
