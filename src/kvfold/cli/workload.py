"""The options that say what is measured: of ``kvfold eval``, and of what is measured beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli.options import check_text

__all__ = [
    "CompressOption",
    "ContextOption",
    "DepthsOption",
    "GenerationTokensOption",
    "GenerationsOption",
    "SamplesOption",
    "ScoredOption",
    "TasksOption",
    "TextOption",
    "WindowsOption",
]

TasksOption = Annotated[str, typer.Option(help="Task names, separated by ','; all, or none.")]
ContextOption = Annotated[int | None, typer.Option(help="Tokens of a text passage and of a task. [2048]")]
SamplesOption = Annotated[int | None, typer.Option(help="Questions of each task. [20]")]
DepthsOption = Annotated[str, typer.Option(help="Where asked facts stand: 0,0.5,1; in turns. At random without.")]
TextOption = Annotated[
    Path | None, typer.Option(callback=check_text, help="A UTF-8 text for perplexity, KL and generation.")
]
WindowsOption = Annotated[int | None, typer.Option(help="Passages of the text. [8]")]
ScoredOption = Annotated[int | None, typer.Option(help="Tokens scored at the end of each passage. [256]")]
GenerationTokensOption = Annotated[int | None, typer.Option(help="Tokens to generate; 0: none. [512]")]
GenerationsOption = Annotated[int | None, typer.Option(help="Prompts to generate from. [4]")]
CompressOption = Annotated[
    str,
    typer.Option(
        metavar="prompt|context",
        help="What is compressed of a task: the whole prompt, question included, or only the context, before the "
        "question is read.",
    ),
]
