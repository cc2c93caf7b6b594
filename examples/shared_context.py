"""One context, read and compressed once, and several questions that go on from it."""

from pathlib import Path

from kvfold import Engine, SamplingParams

text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")[:6000]

# `learned` does not look at the questions, so what it keeps of the context serves all of them.
with Engine("bundled", recipe="int4+learned(keep=0.5)", kv_memory="64MiB") as engine:
    context = engine.add_context(text)
    stats = engine.stats()
    print(f"{len(context.tokens)} tokens: {stats['retention_blocks_before']} blocks before,", end=" ")
    print(f"{stats['retention_blocks_after']} after")
    questions = ["\n\nIn short:", "\n\nThe license is"]
    outputs = engine.generate(questions, SamplingParams(max_tokens=16), context=context)
    for question, output in zip(questions, outputs, strict=True):
        print(question.strip(), output.text)
