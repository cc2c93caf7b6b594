"""Writes the documents of the two local tasks, from kvfold's own recall generators: ``python make_data.py``."""

from __future__ import annotations

import json
import random
from pathlib import Path

from kvfold import load
from kvfold.quality.tasks import make_sample

HERE = Path(__file__).parent
TOKENS, DOCUMENTS, CHOICES = 700, 6, 4


def main() -> None:
    """Six key-value lists of 700 tokens of the bundled tokenizer for each task; the choices are values of the list."""
    _, tokenizer = load("bundled")

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    lookups, choices = [], []
    for seed in range(2 * DOCUMENTS):
        sample = make_sample("kv", seed, TOKENS, count)
        if seed < DOCUMENTS:
            lookups.append({"prompt": sample.prompt, "answer": sample.answer})
            continue
        rng = random.Random(seed)
        name, value = sample.answer.split(": ")
        others = [line.split(": ")[1] for line in sample.context.splitlines() if not line.endswith(f": {value}")]
        options = [value, *rng.sample(others, CHOICES - 1)]
        rng.shuffle(options)
        choices.append(
            {"prompt": sample.prompt, "choices": [f"{name}: {one}" for one in options], "label": options.index(value)}
        )
    for name, rows in (("lookup", lookups), ("choice", choices)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
