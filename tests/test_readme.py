"""README's Python blocks run as they stand and print what stands below them; its promise about `raw` holds."""

from __future__ import annotations

import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from kvfold import KVCache, load

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
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
