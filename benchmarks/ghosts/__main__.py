"""``python -m benchmarks.ghosts``: dropping tokens, or keeping them at 2 bits, at equal bytes."""

from __future__ import annotations

import shlex
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from benchmarks.command import run_app
from rich.console import Console
from rich.table import Table

from kvfold.cli.options import JsonOption, ModelOption, write_json
from kvfold.cli.progress import counted_progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.ghosts.plans import Coded
    from benchmarks.ghosts.protocol import Ranked
    from transformers import PreTrainedModel

_WORDS = ("int4", "int2", "int3:calibrated", "int2:calibrated")
"""Formats: the first is the one that ghosts are put beside."""

_FIGURES = ("text_kl", "recall_kl", "answer_nll", "answers_right")

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def run(
    model: ModelOption = "bundled",
    windows: Annotated[int, typer.Option(min=1, help="Held-out passages of text, 256 tokens of each scored.")] = 2,
    questions: Annotated[int, typer.Option(min=1, help="Questions of each of the four recall tasks.")] = 2,
    keep: Annotated[str, typer.Option(help="Shares of the candidates that int4 pages keep.")] = "0.25,0.125",
    methods: Annotated[str, typer.Option(help="Which methods rank the tokens.")] = "snapkv,keydiff",
    seed: Annotated[int, typer.Option(min=0, help="Which passages and questions.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Compare int4 pages of the best tokens, the same with ghosts, and more tokens at fewer bits, at equal bytes."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    begin = time.perf_counter()
    shares = [float(share) for share in keep.split(",")]
    rows, about = measure(model, windows, questions, shares, methods.split(","), seed)
    about |= {"seconds": round(time.perf_counter() - begin, 1), "rows": rows}
    write_json(json_file, {"command": shlex.join(["python", "-m", "benchmarks.ghosts", *sys.argv[1:]]), **about})
    if json_file != "-":
        show(rows)


def measure(
    name: str, windows: int, questions: int, shares: Sequence[float], methods: Sequence[str], seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each share, method and plan, and what the run was."""
    import torch
    from benchmarks.codecs.protocol import build_passages, check_model
    from benchmarks.ghosts.plans import Coded
    from benchmarks.ghosts.protocol import rank

    from kvfold.engine.loading import load
    from kvfold.geometry import Geometry
    from kvfold.quality.environment import hardware, versions

    model, tokenizer = load(name, dtype=torch.float32, device="cpu")
    check_model(model)
    geometry = Geometry.from_config(model.config)
    heads = geometry.layers[0].kv_heads
    codes = [Coded(geometry, word, model.name_or_path, heads=heads) for word in _WORDS]
    passages = build_passages(tokenizer, windows=windows, questions=questions, seed=seed)
    with counted_progress(len(passages)) as say:
        ranked = []
        for passage in passages:
            say(f"reading a {passage.kind}")
            ranked.append(rank(model, passage, methods))
    rows = _rows(model, ranked, shares, methods, codes)
    settings = {
        "model": name,
        "windows": windows,
        "answers": len(passages) - windows,
        "seed": seed,
        "keep": list(shares),
    }
    return rows, {"settings": settings, "versions": versions(), "hardware": hardware(torch.device("cpu"))}


def _rows(
    model: PreTrainedModel,
    ranked: Sequence[Ranked],
    shares: Sequence[float],
    methods: Sequence[str],
    codes: Sequence[Coded],
) -> list[dict[str, Any]]:
    from benchmarks.ghosts.plans import plans
    from benchmarks.ghosts.protocol import cost, shuffled

    by_word = {code.word: code for code in codes}
    most = min(each.end - each.first for each in ranked) // codes[0].size
    if not abs(whole := shuffled(model, ranked[0], methods[0])) < 1e-5:
        sys.exit(f"correctness gate: all tokens, exact and in another order, cost {whole:.2g} nats")
    work = [(share, plan) for share in shares for plan in plans(codes, round(share * most), most)]
    rows = []
    with counted_progress(len(work) * len(methods)) as say:
        for method in methods:
            for share, plan in work:
                say(f"{method}: {plan.name}")
                spent = sum(by_word[word].page_bytes * pages for word, pages in plan.parts)
                found = cost(model, ranked, method, plan, by_word)
                figures = {figure: getattr(found, figure) for figure in _FIGURES}
                rows.append({"method": method, "keep": share, "plan": plan.name, "bytes": spent, **figures})
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The rows on a terminal, method by method and share by share."""
    table = Table(title="Equal bytes, by method and share")
    for heading in ("method", "keep", "plan", "KiB", *_FIGURES):
        table.add_column(heading, justify="left" if heading in ("method", "plan") else "right")
    last = None
    for row in rows:
        if last not in (None, (row["method"], row["keep"])):
            table.add_section()
        last = row["method"], row["keep"]
        figures = [f"{row[figure]:.4f}" for figure in _FIGURES]
        table.add_row(row["method"], f"{row['keep']:g}", row["plan"], f"{row['bytes'] / 1024:.0f}", *figures)
    Console(width=140).print(table)


def main() -> None:
    """Entry point."""
    run_app(app, "ghosts")


if __name__ == "__main__":
    main()
