"""Serve a batch of questions from one hard memory budget; prompts with a common start share its blocks.

Run: python examples/engine_batch.py
"""

from __future__ import annotations

from pydoc_data.topics import topics

from kvfold import Engine, SamplingParams

CODES = {"crimson harbor": "5821", "quiet tower": "3907", "golden bridge": "1468"}
MANUAL = topics["compound"][:8000]  # a long text: Python's own documentation


def main() -> None:
    """Answer all questions at once under two recipes; print the answers, what was shared, and the bytes."""
    facts = "\n".join(f"The access code of the {name} is {code}." for name, code in CODES.items())
    text = f"{MANUAL[:4000]}\n{facts}\n{MANUAL[4000:]}"
    chats = [[{"role": "user", "content": f"{text}\n\nWhat is the access code of the {name}?"}] for name in CODES]
    for recipe in ("raw", "int4"):
        with Engine("bundled", recipe=recipe, kv_memory="16MiB") as engine:
            for output in engine.generate(chats, SamplingParams(max_tokens=24)):
                print(f"{output.text} (ended by {output.finish_reason}, {output.num_cached_tokens} tokens shared)")
            print(f"{recipe}: at most {engine.stats()['kv_peak_bytes']:,} bytes\n")


if __name__ == "__main__":
    main()
