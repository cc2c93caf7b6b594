"""The examples run as they stand, on the bundled model, without a network, and show right answers and bytes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.shown import assert_right_answers_and_bytes

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_right_answers_and_bytes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr().out
    assert_right_answers_and_bytes(path.read_text(encoding="utf-8"), shown)
    assert "False" not in shown
