"""One context, read and compressed once, and several questions that go on from it.

Run: python examples/shared_context.py
"""

from __future__ import annotations

from pydoc_data.topics import topics  # long texts that come with Python

from kvfold import Engine, SamplingParams

FACTS = {"crimson harbor": 5821, "amber falcon": 3047}
TEXT = topics["naming"] + "".join(f"The access code of the {x} is {code}.\n" for x, code in FACTS.items())


def main() -> None:
    """The chat template is written around a mark: before it stands the context, behind it the end of each question."""
    # `learned` does not look at the questions, so what it keeps of the context serves all of them.
    with Engine("bundled", recipe="int4+learned(keep=0.25)", kv_memory="64MiB") as engine:
        chat = [{"role": "user", "content": TEXT + "<ask>"}]
        written = engine.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        start, end = written.split("<ask>")
        context = engine.add_context(engine.tokenizer.encode(start, add_special_tokens=False))
        stats = engine.stats()
        print(f"context: {stats['kv_in_use_bytes']:,} bytes for {len(context.tokens):,} tokens,", end=" ")
        print(f"{stats['retention_blocks_before']} blocks before retention, {stats['retention_blocks_after']} after")
        questions = [f"\n\nWhat is the access code of the {x}?{end}" for x in FACTS]
        for output in engine.generate(questions, SamplingParams(max_tokens=24), context=context):
            print(output.text)


if __name__ == "__main__":
    main()
