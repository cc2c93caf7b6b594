"""``kvfold eval --lm-eval``: the tasks of EleutherAI's harness in place of kvfold's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvfold.cli.options import write_json
from kvfold.cli.progress import counted_progress
from kvfold.cli.start import start
from kvfold.errors import RequestError, UnsupportedError
from kvfold.recipe import Recipe

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
        if self.tasks is not None and not self.names:
            raise RequestError(f"--lm-eval {self.tasks!r}", why="no task is named", hint="gsm8k, for one")
        if self.path is not None and not self.path.is_dir():
            hint = "name a folder with tasks in YAML"
            raise RequestError(f"--lm-eval-path {self.path}", why="no such folder", hint=hint)

    @property
    def names(self) -> list[str]:
        """The tasks, or patterns of tasks."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]


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
    if find_spec("lm_eval") is None:
        hint = "pip install 'kvfold[lm-eval]'"
        raise UnsupportedError("--lm-eval", why="EleutherAI's harness (lm_eval) is not installed", hint=hint)
    chosen = list(dict.fromkeys(["raw", *recipes]))
    with counted_progress(1 + len(chosen)) as say:
        start(map(Recipe.parse, chosen))
        from kvfold.quality.lm_harness import run_lm_eval
        from kvfold.report import lm_eval_report

        outcome = run_lm_eval(
            model,
            chosen,
            harness.names,
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
