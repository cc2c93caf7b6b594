"""One context, read and compressed once, and several questions that go on from it.

Run: python examples/shared_context.py
"""

from __future__ import annotations

from pydoc_data.topics import topics

from kvfold import Engine, SamplingParams

CODES = {"crimson harbor": "5821", "quiet tower": "3907", "golden bridge": "1468"}
MANUAL = topics["compound"][:8000]  # a long text: Python's own documentation


def main() -> None:
    """Keep a quarter of a text's tokens, chosen before any question is known, and answer every question from them."""
    facts = "\n".join(f"The access code of the {name} is {code}." for name, code in CODES.items())
    # A chat of the bundled model, cut where the question begins: its template renders whole chats only.
    start = f"<|bos|><|user|>\n{MANUAL[:4000]}\n{facts}\n{MANUAL[4000:]}"
    questions = [f"\n\nWhat is the access code of the {name}?\n<|assistant|>\n" for name in CODES]
    # `learned` does not look at the questions, so what it keeps of the context serves all of them.
    with Engine("bundled", recipe="int4+learned(keep=0.25)", kv_memory="16MiB") as engine:
        context = engine.add_context(start)
        stats = engine.stats()
        print(f"{len(context.tokens)} tokens: {stats['retention_bytes_before']:,} bytes before,", end=" ")
        print(f"{stats['retention_bytes_after']:,} bytes after")
        for output in engine.generate(questions, SamplingParams(max_tokens=24), context=context):
            print(output.text)


if __name__ == "__main__":
    main()
