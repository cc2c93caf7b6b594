"""kvfold: a KV-cache runtime for Transformer inference.

A **recipe** says what becomes of the cache, and one runtime executes it behind two faces::

    from kvfold import Engine, KVCache, SamplingParams, load

    model, tokenizer = load("bundled")
    model.generate(**inputs, past_key_values=KVCache(model, "int4"))  # drop-in cache for transformers

    Engine("bundled", recipe="int4", kv_memory="64MiB").generate(prompts, SamplingParams(max_tokens=32))

Importing this package imports neither torch nor transformers: the names that need them are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvfold.errors import (
    BudgetError,
    CacheFullError,
    KVFoldError,
    ModelError,
    NumericsError,
    RecipeError,
    RequestError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from kvfold.engine import AsyncEngine, Engine, SamplingParams
    from kvfold.engine.loading import load
    from kvfold.geometry import Geometry
    from kvfold.hf import KVCache
    from kvfold.recipe import Recipe

__all__ = [
    "AsyncEngine",
    "BudgetError",
    "CacheFullError",
    "Engine",
    "Geometry",
    "KVCache",
    "KVFoldError",
    "ModelError",
    "NumericsError",
    "Recipe",
    "RecipeError",
    "RequestError",
    "SamplingParams",
    "UnsupportedError",
    "__version__",
    "load",
]

__version__ = "0.1.0"


def _home(name: str) -> str | None:
    """The module in which a name lives that is resolved on first use; None for a name that is not public."""
    match name:
        case "AsyncEngine" | "Engine" | "SamplingParams":
            return "kvfold.engine"
        case "load":
            return "kvfold.engine.loading"
        case "Geometry":
            return "kvfold.geometry"
        case "KVCache":
            return "kvfold.hf"
        case "Recipe":
            return "kvfold.recipe"
    return None


def __getattr__(name: str) -> Any:
    """Resolve a public name on first use (PEP 562), and keep it."""
    home = _home(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, resolved or not."""
    return __all__
