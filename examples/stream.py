"""Print an answer as it is made, token by token.

Run: python examples/stream.py
"""

from __future__ import annotations

from pydoc_data.topics import topics  # long texts that come with Python

from kvfold import Engine, SamplingParams

TEXT = topics["naming"] + "The access code of the crimson harbor is 5821.\n" + topics["raise"]
CHAT = [{"role": "user", "content": TEXT + "\n\nWhat is the access code of the crimson harbor?"}]


def main() -> None:
    """Stream one answer; what came with the last chunk is the whole output."""
    with Engine("bundled", recipe="int4", kv_memory="64MiB") as engine:
        for chunk in engine.stream(CHAT, SamplingParams(max_tokens=24)):
            print(chunk.text_delta, end="", flush=True)
            if chunk.final is not None:
                print(f"\nended by {chunk.finish_reason} after {len(chunk.final.token_ids)} tokens")
        print(f"int4: {engine.stats()['kv_peak_bytes']:,} bytes at most")


if __name__ == "__main__":
    main()
