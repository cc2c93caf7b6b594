"""A whole run: rivals on the workload of ``kvfold eval``, and our recipes beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.rivals.catalog import PACKAGES, REFERENCE, check_installed, make_rival

from kvfold.engine.loading import end_tokens, load
from kvfold.quality.environment import hardware, versions
from kvfold.quality.evaluate import Progress, check_length, evaluate, settled
from kvfold.quality.journal import Journal, journal_of
from kvfold.quality.results import Evaluation
from kvfold.quality.session import Plan, run_session
from kvfold.quality.settings import EvalSettings
from kvfold.quality.workload import build_workload

__all__ = ["RivalPlan", "run_rivals", "run_table"]

Save = Callable[[Evaluation], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalPlan:
    """What is asked for; the fields mean what they mean in `kvfold.quality.session.Plan`."""

    model: str
    rivals: Sequence[str]
    settings: EvalSettings
    command: str
    result: Path | None = None
    resume: bool = True


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
    result = Evaluation(
        command=plan.command,
        seed=plan.settings.seed,
        model=Path(plan.model).resolve().name if Path(plan.model).is_dir() else plan.model,
        settings=settled(workload, model),
        versions=versions(*sorted({packages[0] for packages in PACKAGES.values()})),
        hardware=hardware(model.device),
        rows=[],
    )
    if plan.resume and (finished := _finished(plan, result)) is not None:
        return finished
    fingerprint = {
        "rivals": list(plan.rivals),
        "seed": result.seed,
        "model": result.model,
        "settings": result.settings,
        "versions": result.versions,
    }
    journal_file = None if plan.result is None else journal_of(plan.result)
    with Journal(journal_file, fingerprint, resume=plan.resume) as journal:
        rows = evaluate(contestants, reference, workload, journal=journal, progress=progress)
        result = replace(result, rows=rows)
        save(result)
        journal.remove()
    return result


def run_table(
    plan: RivalPlan,
    recipes: Sequence[str],
    table: Path,
    rivals: Evaluation,
    *,
    progress: Progress = lambda what, share: None,
    save: Save = lambda evaluation: None,
) -> Evaluation:
    """Our recipes' rows with the rivals' behind them; ``rivals`` lies in ``plan.result`` by now."""
    ours = Plan(
        model=plan.model,
        recipes=recipes,
        settings=plan.settings,
        command=plan.command,
        result=table,
        resume=plan.resume,
        merge=[] if plan.result is None else [plan.result],
    )

    def whole(evaluation: Evaluation) -> Evaluation:
        return replace(evaluation, versions=rivals.versions | evaluation.versions)

    return whole(run_session(ours, progress=progress, save=lambda evaluation: save(whole(evaluation))))


def _finished(plan: RivalPlan, wanted: Evaluation) -> Evaluation | None:
    """The result of an earlier run of this plan, if it is there."""
    if plan.result is None or not plan.result.is_file() or journal_of(plan.result).exists():
        return None
    found = Evaluation.read(plan.result)
    same = not found.differences(wanted) and found.versions == wanted.versions
    return found if same and [row.contestant for row in found.rows] == list(plan.rivals) else None
