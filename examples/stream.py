"""Print an answer as it is made, token by token.

Run: python examples/stream.py
"""

from __future__ import annotations

from pydoc_data.topics import topics

from kvfold import Engine, SamplingParams

CODES = {"crimson harbor": "5821"}
MANUAL = topics["compound"][:8000]  # a long text: Python's own documentation


def main() -> None:
    """Stream the answer to one question on a long text, then print the bytes that it took."""
    with Engine("bundled", recipe="int4", kv_memory="16MiB") as engine:
        for name, code in CODES.items():
            text = f"{MANUAL[:4000]}\nThe access code of the {name} is {code}.\n{MANUAL[4000:]}"
            chat = [{"role": "user", "content": f"{text}\n\nWhat is the access code of the {name}?"}]
            for chunk in engine.stream(chat, SamplingParams(max_tokens=24)):
                print(chunk.text_delta, end="", flush=True)
            print(f"\n{engine.stats()['kv_peak_bytes']:,} bytes at most")


if __name__ == "__main__":
    main()
