"""``kvfold doctor``."""

from __future__ import annotations

import typer
from rich.console import Console

from kvfold.cli.options import JsonOption, write_json
from kvfold.cli.progress import counted_progress
from kvfold.cli.start import start

__all__ = ["EXAMPLES", "doctor"]

EXAMPLES = "Examples:  kvfold doctor   |   KVFOLD_THREADS=1 kvfold doctor   |   kvfold doctor --json -"


def doctor(json_file: JsonOption = None) -> None:
    """Say what kvfold runs on here and why (processor, kernel, threads, memory, GPU), and test the kernels against the
    reference; exit code 1 if one of them fails.
    """
    with counted_progress(1) as say:
        start()
        from kvfold.doctor import examine
        from kvfold.report import doctor_report

        say("looking at the machine, testing the kernels")
        found = examine()
    if json_file != "-":
        doctor_report(Console(), found)
    write_json(json_file, found.as_json())
    if not found.passed:
        raise typer.Exit(1)
