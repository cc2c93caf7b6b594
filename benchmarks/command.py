"""Running a benchmark that is a typer application."""

from __future__ import annotations

import sys

import typer

from kvfold.errors import KVFoldError

__all__ = ["run_app"]


def run_app(app: typer.Typer, name: str, interrupted: str = "nothing was written") -> None:
    """Runs ``python -m benchmarks.NAME``: errors end with exit code 2 and one clear message, Ctrl-C with 130."""
    try:
        app(prog_name=f"python -m benchmarks.{name}")
    except KVFoldError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {interrupted}", file=sys.stderr)
        raise SystemExit(130) from None
