"""README's Python blocks run as they stand and print what stands below them, its promise about `raw` holds, and the
commands of all pages exist, with their options.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import typer

from kvfold import KVCache, load
from kvfold.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "src/kvfold/bundled/README.md"]
README = PAGES[0].read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", README, re.DOTALL)
BYTES = re.compile(r"[\d,]+(?= bytes)")
FACT = re.compile(r"The access code of the [a-z ]+ is \d{4}\.")


@pytest.mark.parametrize("number", range(3))
def test_a_block_prints_right_answers_and_bytes(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = BLOCKS[number]
    assert len(code.splitlines()) <= 16
    exec(compile(code, f"README.md, block {number}", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    # Another version of Python has a slightly longer or shorter documentation.
    assert BYTES.sub("N", printed) == BYTES.sub("N", shown)
    found, wanted = ([int(size.replace(",", "")) for size in BYTES.findall(text)] for text in (printed, shown))
    assert len(found) >= 2
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=0.1)
    assert max(found) > 2.5 * min(found)
    answers = FACT.findall(printed)
    assert answers
    assert all(answer in code for answer in answers)


def test_there_are_no_other_blocks() -> None:
    assert len(BLOCKS) == 3


def test_raw_gives_the_tokens_of_transformers_in_float32() -> None:
    """In bfloat16 both round, and not alike: the logits are close, but at a near-tie the tokens may differ."""
    model, tokenizer = load("bundled")
    prompts = ["The password of the north gate is", topics["compound"][:3000]]
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt")
            stock, ours = (generate(model, inputs, cache) for cache in (None, KVCache(model, "raw")))
            gap = float((stock.logits[0] - ours.logits[0]).abs().max() / stock.logits[0].std())
            if dtype == torch.float32:
                assert torch.equal(stock.sequences, ours.sequences)
                assert gap < 1e-4
            else:
                assert gap < 0.1


def generate(model: Any, inputs: Any, cache: KVCache | None) -> Any:
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 16, "do_sample": False}
    return model.generate(**inputs, past_key_values=cache, pad_token_id=0, **options)


def commands(page: Path) -> list[str]:
    """The `kvfold` commands in the fenced blocks of a page, without what stands behind them."""
    blocks = re.findall(r"^```(.*?)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    shown = "".join(text for language, text in blocks if language in ("", "sh"))
    found = (re.match(r"(?:[A-Z_]+=\S+ )*kvfold (.*)", line) for line in shown.replace("\\\n", " ").splitlines())
    return [re.split(r" {3,}", each[1])[0] for each in found if each]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_documented_commands_exist_with_their_options(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        command: Any = typer.main.get_command(app)
        words = shlex.split(line)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context(line, words)


def test_commands_are_found() -> None:
    assert len(commands(PAGES[0])) > 8
