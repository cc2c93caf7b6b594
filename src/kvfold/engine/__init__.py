"""The engine: requests in, tokens out. Continuous batching over the paged cache."""

from kvfold.engine.async_engine import AsyncEngine
from kvfold.engine.engine import Engine
from kvfold.engine.request import (
    Chat,
    CompletionOutput,
    Logprob,
    RequestOutput,
    SamplingParams,
    StreamChunk,
)

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
