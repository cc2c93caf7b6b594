"""Serve a batch of questions about one text from one hard budget; the text, which all begin with, is stored once.

Run: python examples/engine_batch.py
"""

from __future__ import annotations

from pydoc_data.topics import topics  # long texts that come with Python

from kvfold import Engine, SamplingParams

FACTS = {"crimson harbor": 5821, "amber falcon": 3047, "silent meadow": 9162}
TEXT = topics["naming"] + "".join(f"The access code of the {x} is {code}.\n" for x, code in FACTS.items())
TEXT += topics["raise"]
CHATS = [[{"role": "user", "content": f"{TEXT}\n\nWhat is the access code of the {x}?"}] for x in FACTS]


def main() -> None:
    """Answer all at once, under two recipes."""
    for recipe in ("raw", "int4"):
        with Engine("bundled", recipe=recipe, kv_memory="64MiB") as engine:
            outputs = engine.chat(CHATS, SamplingParams(max_tokens=24))
            stats = engine.stats()
        tokens = sum(len(output.prompt_token_ids) + len(output.token_ids) for output in outputs)
        print(f"{recipe}: {stats['kv_peak_bytes']:,} bytes at most, for {tokens:,} tokens of {len(outputs)} requests")
        for output in outputs:
            print(f"  {output.text}")


if __name__ == "__main__":
    main()
