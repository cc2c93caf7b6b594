"""The same questions to both faces of the engine: `Engine`, and `AsyncEngine` for asyncio.

Run: python examples/two_faces.py
"""

from __future__ import annotations

import asyncio
from pydoc_data.topics import topics  # long texts that come with Python

from kvfold import AsyncEngine, Engine, SamplingParams

FACTS = {"crimson harbor": 5821, "amber falcon": 3047}
TEXT = topics["naming"] + "".join(f"The access code of the {x} is {code}.\n" for x, code in FACTS.items())
CHATS = [[{"role": "user", "content": f"{TEXT}\n\nWhat is the access code of the {x}?"}] for x in FACTS]
PARAMS = SamplingParams(max_tokens=24)


def with_engine() -> list[str]:
    """One call answers all; it returns when they are done."""
    with Engine("bundled", recipe="int4", kv_memory="16MiB") as engine:
        outputs = engine.chat(CHATS, PARAMS)
        for chunk in engine.stream(CHATS[0], PARAMS):
            print(chunk.text_delta, end="", flush=True)
        print(f"\nint4: {engine.stats()['kv_peak_bytes']:,} bytes at most")
    return [output.text for output in outputs]


async def with_async_engine() -> list[str]:
    """Tasks wait for their own requests, which share the steps."""
    async with AsyncEngine("bundled", recipe="int4", kv_memory="16MiB") as engine:
        outputs = await asyncio.gather(*(engine.chat(chat, PARAMS) for chat in CHATS))
        async for chunk in engine.stream(CHATS[0], PARAMS):
            print(chunk.text_delta, end="", flush=True)
        print(f"\nint4: {(await engine.stats())['kv_peak_bytes']:,} bytes at most")
    return [output.text for output in outputs]


def main() -> None:
    """Compare the answers."""
    answers = with_engine()
    print("both say the same:", asyncio.run(with_async_engine()) == answers)
    print(*answers, sep="\n")


if __name__ == "__main__":
    main()
