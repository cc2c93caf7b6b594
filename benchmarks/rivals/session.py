"""A whole run: rivals on the workload of ``kvfold eval``, and our recipes beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rivals.catalog import PACKAGES, REFERENCE, check_installed, make_rival

from kvfold.engine.loading import end_tokens, load
from kvfold.quality.evaluate import Progress, check_length
from kvfold.quality.journal import journal_of
from kvfold.quality.plans import Plan, Run
from kvfold.quality.results import Evaluation
from kvfold.quality.session import blank, measure, run_session
from kvfold.quality.workload import build_workload

__all__ = ["RivalPlan", "run_rivals", "run_table"]

Save = Callable[[Evaluation], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalPlan(Run):
    """A run of rivals, by their names."""

    rivals: Sequence[str]


def run_rivals(
    plan: RivalPlan, *, progress: Progress = lambda what, share: None, save: Save = lambda evaluation: None
) -> Evaluation:
    """The rivals' rows, each beside the full cache of transformers; ``save`` writes them down.

    A result that is there already, of the same run and whole, is taken as it is (unless ``plan.resume`` says no).
    """
    check_installed(plan.rivals)
    model, tokenizer = load(plan.model)
    check_length(plan.settings, model)
    reference = make_rival(REFERENCE, model)
    contestants = [reference if name == REFERENCE else make_rival(name, model) for name in plan.rivals]
    workload = build_workload(tokenizer, plan.settings, stop=end_tokens(model, tokenizer))
    result = blank(plan, workload, model, *sorted({packages[0] for packages in PACKAGES.values()}))
    if plan.resume and (finished := _finished(plan, result)) is not None:
        return finished
    return measure(plan, contestants, reference, workload, result, progress=progress, save=save)


def run_table(
    plan: RivalPlan,
    recipes: Sequence[str],
    table: Path,
    *,
    progress: Progress = lambda what, share: None,
    save: Save = lambda evaluation: None,
) -> Evaluation:
    """Our recipes' rows with the rivals' behind them, which lie in ``plan.result`` by now."""
    ours = Plan(
        model=plan.model,
        recipes=recipes,
        settings=plan.settings,
        command=plan.command,
        result=table,
        resume=plan.resume,
        merge=[] if plan.result is None else [plan.result],
    )
    return run_session(ours, progress=progress, save=save)


def _finished(plan: RivalPlan, wanted: Evaluation) -> Evaluation | None:
    """The result of an earlier run of this plan, if it is there."""
    if plan.result is None or not plan.result.is_file() or journal_of(plan.result).exists():
        return None
    found = Evaluation.read(plan.result)
    same = not found.differences(wanted) and found.versions == wanted.versions
    return found if same and [row.contestant for row in found.rows] == list(plan.rivals) else None
