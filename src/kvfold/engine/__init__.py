"""The engine: requests in, tokens out. Continuous batching over the paged cache."""

from kvfold.engine.async_engine import AsyncEngine
from kvfold.engine.engine import Engine
from kvfold.engine.request import (
    CompletionOutput,
    Logprob,
    RequestOutput,
    SamplingParams,
    StreamChunk,
)

__all__ = [
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StreamChunk",
]
