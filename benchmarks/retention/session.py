"""A sweep: kvpress's rows and ours, each side resumable by itself, and the rows of other results beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.retention.compare import Comparison, compare
from benchmarks.retention.methods import Method
from benchmarks.rivals.catalog import REFERENCE
from benchmarks.rivals.session import RivalPlan, run_rivals

from kvfold.cli.options import write_json
from kvfold.errors import RequestError
from kvfold.quality.evaluate import Progress
from kvfold.quality.plans import Plan
from kvfold.quality.results import Evaluation
from kvfold.quality.session import run_session
from kvfold.quality.settings import EvalSettings

__all__ = ["SIDES", "Sweep", "SweepPlan", "read_evaluation", "run_sweep"]

SIDES: Final = ("both", "ours", "theirs")
_FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """``methods`` are run at ``keeps`` on the ``side`` of `SIDES` that is asked for, ours over ``base``. ``known``: the
    methods whose rows are compared, those from ``merge`` (files) too. ``result``: the file the result will go to; each
    side's own result lies beside it until then.
    """

    model: str
    methods: Sequence[Method]
    known: Sequence[Method]
    keeps: Sequence[float]
    base: str
    side: str
    settings: EvalSettings
    command: str
    result: Path
    merge: Sequence[Path] = ()
    resume: bool = True

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise RequestError(f"unknown side {self.side!r}", hint="known: " + ", ".join(SIDES))
        if not self.methods and not self.merge:
            raise RequestError("nothing to do", why="no method and no result is named", hint="--methods, or --merge")

    @property
    def recipes(self) -> list[str]:
        """Ours, in order."""
        wanted = self.methods if self.side != "theirs" else ()
        return [method.ours(keep, self.base) for method in wanted for keep in self.keeps]

    @property
    def rivals(self) -> list[str]:
        """Theirs, in order."""
        wanted = self.methods if self.side != "ours" else ()
        return [name for method in wanted for keep in self.keeps if (name := method.theirs(keep)) is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All rows, and what they say method by method. ``commands``: those that made the rows."""

    commands: list[str]
    evaluation: Evaluation
    comparisons: list[Comparison]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "kvfold_retention": _FORMAT,
            "commands": self.commands,
            "comparisons": [comparison.as_json() for comparison in self.comparisons],
            "evaluation": self.evaluation.as_json(),
        }


def run_sweep(plan: SweepPlan, *, progress: Progress = lambda what, share: None) -> Sweep:
    """Measures what the plan names and writes the whole to ``plan.result``; a run that is given again goes on where it
    stopped. Results to be merged are refused if they are of other settings, before anything is measured if they differ
    among themselves.
    """
    merged = [read_evaluation(file) for file in plan.merge]
    commands = dict.fromkeys(command for file in plan.merge for command in _commands(file))
    if merged:
        merged[0].merge(merged[1:])
    parts = []
    if plan.rivals:
        parts.append(_theirs(plan, progress))
    if plan.recipes:
        parts.append(_ours(plan, progress))
    evaluation, *others = [*reversed(parts), *merged]
    evaluation = evaluation.merge(others)
    sweep = Sweep(
        commands=list({**({plan.command: None} if parts else {}), **commands}),
        evaluation=replace(evaluation, command=plan.command),
        comparisons=compare(evaluation.rows, plan.known, plan.keeps, plan.base),
    )
    write_json(str(plan.result), sweep.as_json())
    for name in ("theirs", "ours"):
        _part(plan, name).unlink(missing_ok=True)
    return sweep


def read_evaluation(file: Path) -> Evaluation:
    """The rows in a result of this benchmark, of ``kvfold eval`` or of ``benchmarks.rivals``."""
    data = _data(file)
    return Evaluation.read(file) if data is None else Evaluation.from_json(data["evaluation"])


def _commands(file: Path) -> list[str]:
    data = _data(file)
    return [Evaluation.read(file).command] if data is None else list(data["commands"])


def _data(file: Path) -> dict[str, Any] | None:
    """What this benchmark wrote; None for a file of someone else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # said better by whoever reads it as an evaluation
    return data if isinstance(data, dict) and data.get("kvfold_retention") == _FORMAT else None


def _part(plan: SweepPlan, side: str) -> Path:
    return plan.result.with_name(f"{plan.result.name}.{side}.json")


def _saver(file: Path) -> Callable[[Evaluation], None]:
    return lambda found: write_json(str(file), found.as_json())


def _theirs(plan: SweepPlan, progress: Progress) -> Evaluation:
    """kvpress's rows, beside the full cache of transformers; taken as they are if they are there."""
    file = _part(plan, "theirs")
    rivals = RivalPlan(
        model=plan.model,
        rivals=[REFERENCE, *plan.rivals],
        settings=plan.settings,
        command=plan.command,
        result=file,
        resume=plan.resume,
    )
    return run_rivals(rivals, progress=progress, save=_saver(file))


def _ours(plan: SweepPlan, progress: Progress) -> Evaluation:
    """Our rows, beside ``raw``."""
    file = _part(plan, "ours")
    recipes = Plan(
        model=plan.model,
        recipes=plan.recipes,
        settings=plan.settings,
        command=plan.command,
        result=file,
        resume=plan.resume,
    )
    return run_session(recipes, progress=progress, save=_saver(file))
