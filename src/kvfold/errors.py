"""Every error kvfold raises on purpose.

One base class, so that a caller can catch all of it, and one shape: *what* went wrong, *why*, and a *hint* that says
what to do next. Nothing here imports anything else of the package.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "BudgetError",
    "CacheFullError",
    "KVFoldError",
    "ModelError",
    "NumericsError",
    "RecipeError",
    "RequestError",
    "UnsupportedError",
]


class KVFoldError(Exception):
    """Base of all errors: ``str(error)`` reads ``what: why`` and, on a second line, ``hint: ...``."""

    def __init__(self, what: str, *, why: str = "", hint: str = "") -> None:
        """``what`` failed, in one clause; ``why``, the cause; ``hint``, the next thing to try."""
        super().__init__(what)
        self.what = what
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.what}: {self.why}" if self.why else self.what
        return f"{text}\nhint: {self.hint}" if self.hint else text


class RecipeError(KVFoldError, ValueError):
    """A recipe text or field that is not legal."""


class UnsupportedError(KVFoldError):
    """A composition (model, recipe, operation) that kvfold refuses; ``reasons`` lists every cause."""

    def __init__(self, what: str, reasons: Iterable[str] = (), *, why: str = "", hint: str = "") -> None:
        """``reasons``: all the causes. When no ``why`` is given, it is made of them."""
        self.reasons: list[str] = list(reasons) or ([why] if why else [])
        super().__init__(what, why=why or "; ".join(self.reasons), hint=hint)


class ModelError(KVFoldError):
    """A model that is missing, cannot be loaded, or does not say what is needed about itself."""


class BudgetError(KVFoldError):
    """A memory budget too small for a single block, or a size text that cannot be read."""


class CacheFullError(KVFoldError):
    """No block is left in the budget. The cache is as it was before the call."""


class RequestError(KVFoldError, ValueError):
    """A request that can never be served: bad sampling parameters, prompt too long for the model or the pool."""


class NumericsError(KVFoldError):
    """NaN or infinity where a finite number is needed."""
