"""A whole run of ``kvfold eval``: refuses what cannot work before anything is measured, goes on where an earlier run
was interrupted, and gives the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel

from kvfold.engine.loading import available_recipes, end_tokens, load
from kvfold.errors import RequestError
from kvfold.quality.contestant import Contestant
from kvfold.quality.environment import hardware, versions
from kvfold.quality.evaluate import Progress, check_length, evaluate, settled
from kvfold.quality.journal import Journal, journal_of
from kvfold.quality.recipes import recipe_contestants
from kvfold.quality.results import Evaluation
from kvfold.quality.settings import EvalSettings
from kvfold.quality.workload import Workload, build_workload

__all__ = ["EVAL_RECIPES", "QUICK", "QUICK_RECIPES", "Plan", "Run", "blank", "measure", "run_session"]

EVAL_RECIPES: Final = ("raw", "int8", "int4", "int3:calibrated", "int2.5:calibrated", "int2:calibrated", "int2")
QUICK_RECIPES: Final = ("raw", "int8", "int4", "int2:calibrated", "int2")
"""What is measured where nothing else is asked for, as far as the model can be served with it."""
QUICK: Final = EvalSettings(context=1024, samples=4, text_windows=2, generation_passages=2)
"""Under three minutes with the bundled model on two cores."""


_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def run_session(
    plan: Plan,
    *,
    progress: Progress = lambda what, share: None,
    save: Callable[[Evaluation], None] = lambda evaluation: None,
) -> Evaluation:
    """The evaluation. ``save`` writes it down, after which the journal is no longer needed and goes."""
    dtype = None if plan.dtype is None else _dtype(plan.dtype)
    others = [(file, Evaluation.read(file)) for file in plan.merge]
    model, tokenizer = load(plan.model, dtype=dtype)
    check_length(plan.settings, model)
    recipes = available_recipes(plan.usual, model) if plan.recipes is None else plan.recipes
    contestants = recipe_contestants(model, recipes)
    workload = build_workload(tokenizer, plan.settings, stop=end_tokens(model, tokenizer))
    result = blank(plan, workload, model)
    for file, other in others:
        if differences := result.differences(other):
            hint = "merge only results of the same settings, model and text"
            raise RequestError(f"--merge {file}", why="; ".join(differences), hint=hint)
    return measure(
        plan,
        contestants,
        contestants[0],
        workload,
        result,
        progress=progress,
        save=save,
        others=[other for _, other in others],
    )


def blank(plan: Run, workload: Workload, model: PreTrainedModel, *packages: str) -> Evaluation:
    """An evaluation without rows. ``packages``: others whose versions matter."""
    return Evaluation(
        command=plan.command,
        seed=plan.settings.seed,
        model=Path(plan.model).resolve().name if Path(plan.model).is_dir() else plan.model,
        settings=settled(workload, model),
        versions=versions(*packages),
        hardware=hardware(model.device),
        rows=[],
    )


def measure(
    plan: Run,
    contestants: Sequence[Contestant],
    reference: Contestant,
    workload: Workload,
    result: Evaluation,
    *,
    progress: Progress,
    save: Callable[[Evaluation], None],
    others: Sequence[Evaluation] = (),
) -> Evaluation:
    """``result`` with the contestants' rows and those of ``others``, saved; journalled until then."""
    fingerprint = {
        "contestants": [contestant.name for contestant in contestants],
        "seed": result.seed,
        "model": result.model,
        "settings": result.settings,
        "versions": result.versions,
    }
    journal_file = None if plan.result is None else journal_of(plan.result)
    with Journal(journal_file, fingerprint, resume=plan.resume) as journal:
        rows = evaluate(contestants, reference, workload, journal=journal, progress=progress)
        result = replace(result, rows=rows).merge(others)
        save(result)
        journal.remove()
    return result


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise RequestError(f"unknown dtype {name!r}", hint="known: " + ", ".join(_DTYPES))
    return _DTYPES[name]
