"""Print text as it is made, token by token.

Run: python examples/stream.py
"""

from __future__ import annotations

from kvfold import Engine, SamplingParams


def main() -> None:
    """Stream one answer; the seed makes it the same every time."""
    params = SamplingParams(max_tokens=48, temperature=0.8, top_p=0.95, seed=7)
    with Engine("bundled", recipe="int4", kv_memory="64MiB") as engine:
        for chunk in engine.stream("A list is a sequence of", params):
            print(chunk.text_delta, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
