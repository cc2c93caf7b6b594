"""The Python blocks of README.md and docs/engine.md run as they stand, one by one, and show right answers and bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

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


def results(name: str) -> Any:
    """A file of `benchmarks/results`."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def cells(label: str, page: str) -> list[str]:
    """The cells behind ``label`` of a table's row."""
    found = re.search(rf"^\| {re.escape(label)} \| (.*) \|$", page, flags=re.MULTILINE)
    assert found, label
    return [cell.strip() for cell in found[1].split("|")]


def test_the_demo_table_says_what_the_results_say() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = {row["recipe"]: row for row in results("demo")}
    shown = [rows[name] for name in ("raw", "int8", "int4", "int2:calibrated", "int2")]
    assert cells("cache, everything counted", page) == [f"{row['kv_bytes'] / 2**20:.2f} MiB" for row in shown]
    assert cells("smaller", page) == [f"{row['compression']:.2f}x" for row in shown]
    assert cells("mean KL, nats", page) == [f"{row['kl']:.4f}" for row in shown]
    assert cells("same most likely token", page) == [f"{row['top1_agreement']:.1%}" for row in shown]


def test_the_frontier_is_what_the_page_says() -> None:
    rows = {row["contestant"]: (row["kv_bytes_per_token"], row["kl_mean"]) for row in results("quality")["rows"]}
    frontier = {
        name: size
        for name, (size, loss) in rows.items()
        if not any(other[0] <= size and other[1] <= loss and other != (size, loss) for other in rows.values())
    }
    assert {name for name, size in frontier.items() if size > 970} == {"raw", "int8", "transformers-hqq-8bit"}
    assert all("calibrated" in name for name, size in frontier.items() if size < 970)
    assert "Up to 967 bytes a token, the frontier" in (ROOT / "README.md").read_text(encoding="utf-8")
