"""The examples run as they stand, on the bundled model, without a network, and print right answers and bytes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ANSWER = re.compile(r"The access code of the ([a-z ]+) is (\d{4})\.")
EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_right_answers_and_bytes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    printed, source = capsys.readouterr().out, path.read_text(encoding="utf-8")
    answers = ANSWER.findall(printed)
    assert answers
    for name, code in answers:
        assert f'"{name}": "{code}"' in source
    assert re.search(r"\d bytes", printed)
