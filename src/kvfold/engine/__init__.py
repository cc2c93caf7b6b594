"""The engine: requests in, tokens out. Continuous batching over the paged cache.

The names are resolved on first use, so that what needs no torch (`request`, `source`) can be imported without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvfold.engine.async_engine import AsyncEngine
    from kvfold.engine.engine import Engine
    from kvfold.engine.request import Chat, CompletionOutput, Logprob, RequestOutput, SamplingParams, StreamChunk

__all__ = [
    "AsyncEngine",
    "Chat",
    "CompletionOutput",
    "Engine",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StreamChunk",
]

_HOMES = {"AsyncEngine": "async_engine", "Engine": "engine"}


def __getattr__(name: str) -> Any:
    """Resolve a public name on first use (PEP 562), and keep it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'request')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, resolved or not."""
    return __all__
