"""A whole run of ``kvfold eval``: refuses what cannot work before anything is measured, goes on where an earlier run
was interrupted, and gives the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kvfold.engine.loading import available_recipes, end_tokens, load
from kvfold.errors import RequestError
from kvfold.quality.contestant import Contestant
from kvfold.quality.environment import hardware, versions
from kvfold.quality.evaluate import Progress, check_length, evaluate, settled
from kvfold.quality.journal import Journal, journal_of
from kvfold.quality.plans import Plan, Run, check_dtype
from kvfold.quality.recipes import recipe_contestants
from kvfold.quality.results import Evaluation
from kvfold.quality.workload import Workload, build_workload

__all__ = ["blank", "measure", "run_session"]


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
    dtype: torch.dtype = getattr(torch, check_dtype(name))
    return dtype
