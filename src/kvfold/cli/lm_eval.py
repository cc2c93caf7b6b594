"""``kvfold eval --lm-eval``: the tasks of EleutherAI's harness in place of kvfold's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvfold.cli.options import counted_progress, write_json
from kvfold.errors import RequestError

__all__ = [
    "Harness",
    "LimitOption",
    "LmEvalChatOption",
    "LmEvalOption",
    "LmEvalPathOption",
    "LmEvalShotsOption",
    "run_harness",
]

LmEvalOption = Annotated[
    str | None,
    typer.Option("--lm-eval", metavar="NAMES", help="Tasks of EleutherAI's harness instead: gsm8k,..."),
]
LmEvalPathOption = Annotated[Path | None, typer.Option(metavar="DIR", help="With --lm-eval: tasks of your own.")]
LmEvalChatOption = Annotated[bool, typer.Option("--lm-eval-chat", help="With --lm-eval: the model's chat template.")]
LmEvalShotsOption = Annotated[int | None, typer.Option(min=0, help="With --lm-eval: examples in each prompt.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="With --lm-eval: documents of each task.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """What the harness is to run: ``tasks`` separated by commas, and how. Without tasks, nothing else may be set."""

    tasks: str | None
    path: Path | None = None
    chat: bool = False
    shots: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.tasks is None and (self.path, self.chat, self.shots, self.limit) != (None, False, None, None):
            raise RequestError("an option of --lm-eval without it", hint="name the harness' tasks: --lm-eval gsm8k")


def run_harness(
    harness: Harness,
    model: str,
    recipes: Sequence[str],
    *,
    dtype: str | None = None,
    seed: int = 0,
    json_file: str | None = None,
    report: Path | None = None,
) -> None:
    """Runs, prints one table, and writes the result; the recipe ``raw`` comes first, as the yardstick. There is no
    ``report`` of these tasks.
    """
    if report is not None:
        raise RequestError("--report with --lm-eval", why="the page shows kvfold's own tasks", hint="use --json FILE")
    from kvfold.quality.lm_harness import run_lm_eval
    from kvfold.report import lm_eval_report

    chosen = list(dict.fromkeys(["raw", *recipes]))
    with counted_progress(1 + len(chosen)) as say:
        outcome = run_lm_eval(
            model,
            chosen,
            [name.strip() for name in (harness.tasks or "").split(",") if name.strip()],
            limit=harness.limit,
            num_fewshot=harness.shots,
            include_path=harness.path,
            chat=harness.chat,
            seed=seed,
            model_args={"dtype": dtype},
            say=say,
        )
    if json_file != "-":
        lm_eval_report(Console(), outcome)
    write_json(json_file, outcome)
