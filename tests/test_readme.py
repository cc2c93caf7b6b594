"""The Python blocks of README.md and docs/engine.md run as they stand, one by one, and show right answers and bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.shown import assert_right_answers_and_bytes

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/engine.md")
MOST_LINES = 20


def blocks() -> list[tuple[str, str]]:
    """Each block, with its page and line."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            found.append((f"{page}:{text[: match.start()].count(chr(10)) + 1}", match[1]))
    return found


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in blocks()])
def test_a_block_shows_right_answers_and_bytes(
    code: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(code.splitlines()) <= MOST_LINES
    monkeypatch.chdir(tmp_path)  # a block needs no file of the repository
    exec(compile(code, "block", "exec"), {"__name__": "__main__"})
    assert_right_answers_and_bytes(code, capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
