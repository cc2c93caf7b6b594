"""Serve a batch of prompts from one hard memory budget; prompts with a common start share its blocks.

Run: python examples/engine_batch.py
"""

from __future__ import annotations

from kvfold import Engine, SamplingParams

START = "Notes of the harbour master, kept in a blue book. " * 12
QUESTIONS = ["The first ship was called", "The colour of the book was", "The harbour master wrote"]


def main() -> None:
    """Generate for all prompts at once and print what came of each."""
    with Engine("bundled", recipe="int4", kv_memory="64MiB") as engine:
        outputs = engine.generate([START + question for question in QUESTIONS], SamplingParams(max_tokens=32))
    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"{question} ...{output.text!r} ({len(output.token_ids)} tokens, ended by {output.finish_reason})")


if __name__ == "__main__":
    main()
