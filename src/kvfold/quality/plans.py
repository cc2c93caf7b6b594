"""What a run of ``kvfold eval`` is asked for. No torch, so that it is checked before anything heavy begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvfold.errors import RequestError
from kvfold.quality.settings import EvalSettings

__all__ = ["DTYPES", "EVAL_RECIPES", "QUICK", "QUICK_RECIPES", "Plan", "Run", "check_dtype"]

DTYPES: Final = ("float32", "bfloat16", "float16")
"""Names of the dtypes that a model can be loaded in."""

EVAL_RECIPES: Final = ("raw", "int8", "int4", "int3:calibrated", "int2.5:calibrated", "int2:calibrated", "int2")
QUICK_RECIPES: Final = ("raw", "int8", "int4", "int2:calibrated", "int2")
"""What is measured where nothing else is asked for, as far as the model can be served with it."""
QUICK: Final = EvalSettings(context=1024, samples=4, text_windows=2, generation_passages=2)
"""Under three minutes with the bundled model on two cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What every run is asked for. ``result``: the file the result will go to, beside which the journal lies; None: no
    journal. ``command``: for the record.
    """

    model: str
    settings: EvalSettings
    command: str
    result: Path | None = None
    resume: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Run):
    """A run of recipes. ``dtype``: of weights, computing and raw pages (``float32`` has the least noise); None keeps
    the saved one. ``usual``: the recipes if ``recipes`` is None, those that the model cannot take left out. ``merge``:
    evaluations of equal settings whose rows are wanted too.
    """

    recipes: Sequence[str] | None
    usual: Sequence[str] = EVAL_RECIPES
    dtype: str | None = None
    merge: Sequence[Path] = ()


def check_dtype(name: str) -> str:
    """``name``, if it is one of `DTYPES`; RequestError otherwise."""
    if name not in DTYPES:
        raise RequestError(f"unknown dtype {name!r}", hint="known: " + ", ".join(DTYPES))
    return name
