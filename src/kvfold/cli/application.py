"""The command as a whole: its verbs, what holds for all of them, and how errors end it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvfold import __version__
from kvfold.cli import bench, calibrate, demo, doctor, evaluate, generate, profile, train_retention
from kvfold.cli.start import log_to_stderr
from kvfold.errors import KVFoldError
from kvfold.telemetry import calm_openmp

__all__ = ["app", "main"]

_EXAMPLES = "Examples:  kvfold demo   |   kvfold generate 'def add(a, b):' --recipe int4   |   kvfold eval --quick"

app = typer.Typer(
    name="kvfold",
    help="A KV-cache runtime for LLM inference: paged, packed, shared; honest bytes beside measured quality.",
    no_args_is_help=True,
    epilog=_EXAMPLES,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(
    help="Speed, as a ratio against a named rival in the same run.", no_args_is_help=True, epilog=bench.EXAMPLES
)
app.command(epilog=demo.EXAMPLES)(demo.demo)
app.command(epilog=generate.EXAMPLES)(generate.generate)
app.command("eval", epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("calibrate", epilog=calibrate.EXAMPLES)(calibrate.calibrate_command)
app.command(epilog=profile.EXAMPLES)(profile.profile)
app.command("train-retention", epilog=train_retention.EXAMPLES)(train_retention.train_retention_command)
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)
app.add_typer(bench_app, name="bench")
bench_app.command("decode", epilog=bench.DECODE_EXAMPLES)(bench.bench_decode_command)
bench_app.command("attention", epilog=bench.ATTENTION_EXAMPLES)(bench.bench_attention_command)


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    log_to_stderr()


def main() -> None:
    """Entry point: our own errors end with exit code 2 and one clear message, Ctrl-C with 130."""
    calm_openmp()
    try:
        app()
    except KVFoldError as error:
        print(f"kvfold: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
