"""``python -m benchmarks.merging``: methods that merge beside methods that drop, over the share kept, on one model.

A context is read and retention runs; what follows is then run over what is left, and compared with ``raw``: held-out
text, and questions that come after retention, so that no method has seen them (``--asked``: before). Bytes are those of
all blocks and tables, biases included, right after retention.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from benchmarks.codecs.protocol import Passage, build_passages, check_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.cli.options import JsonOption, ModelOption, write_json
from kvfold.cli.progress import counted_progress
from kvfold.engine.loading import load
from kvfold.engine.runner import ModelRunner, SeqWork
from kvfold.quality.contestant import SCORED_TOKENS
from kvfold.quality.environment import hardware, versions
from kvfold.quality.metrics import divergence, surprise
from kvfold.recipe import Recipe

QUESTION = 48
"""Tokens before an answer in which its question stands."""

METHODS = "streaming;snapkv;keydiff;keepkv;keepkv(keydiff);attention_matching"
FIGURES = ("text_kl", "answer_nll", "answers_right", "bytes")

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def run(
    model: ModelOption = "bundled",
    base: Annotated[str, typer.Option(help="The recipe that methods are added to.")] = "raw,block=16,recent=32",
    methods: Annotated[str, typer.Option(help="Retention clauses, separated by ';'.")] = METHODS,
    keep: Annotated[str, typer.Option(help="Shares that are kept.")] = "0.25,0.125,0.0625",
    windows: Annotated[int, typer.Option(min=1, help="Passages of text, 256 tokens of each scored.")] = 3,
    questions: Annotated[int, typer.Option(min=1, help="Questions of each of the four recall tasks.")] = 3,
    asked: Annotated[bool, typer.Option("--asked", help="Retention runs behind the question, not before.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Which passages and questions.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Measure retention methods over the share kept, in the runtime."""
    loaded, tokenizer = load(model, dtype=torch.float32, device="cpu")
    check_model(loaded)
    passages = build_passages(tokenizer, windows=windows, questions=questions, seed=seed)
    recipes = {(m, float(k)): f"{base}+{_with(m, k)}" for k in keep.split(",") for m in methods.split(";")}
    rows = []
    with counted_progress(len(recipes) + 1) as say:
        say("raw")
        exact, _ = _logits(loaded, "raw", passages, asked=asked)
        for (method, share), recipe in recipes.items():
            say(recipe)
            found, held = _logits(loaded, recipe, passages, asked=asked)
            rows.append({"method": method, "keep": share, **_figures(passages, exact, found), "bytes": held})
    about = {"model": model, "base": base, "windows": windows, "answers": len(passages) - windows, "asked": asked}
    command = shlex.join(["python", "-m", "benchmarks.merging", *sys.argv[1:]])
    made_by = {"versions": versions(), "hardware": hardware(torch.device("cpu"))}
    write_json(json_file, {"command": command, "settings": about | {"seed": seed}, **made_by, "rows": rows})
    if json_file != "-":
        _show(rows)


def _with(method: str, keep: str) -> str:
    return f"{method[:-1]},keep={keep})" if method.endswith(")") else f"{method}(keep={keep})"


def _logits(
    model: PreTrainedModel, text: str, passages: Sequence[Passage], *, asked: bool
) -> tuple[list[Tensor], float]:
    """The logits of each passage's scored tokens, and the mean bytes held of passages of text after retention."""
    recipe = Recipe.of(text, model.name_or_path)
    runner = ModelRunner(model, recipe=recipe, kv_memory=64 << 20, prefix_caching=False, check=False)
    found, held = [], []
    try:
        for passage in passages:
            cut = passage.cut - (QUESTION if passage.kind == "recall" and not asked else 0)
            seq = runner.create()
            runner.execute([SeqWork(seq=seq, tokens=passage.tokens[:cut], start=0, salt=b"", sample=True)])
            if recipe.rule is not None:
                runner.cache.retain(seq)
            if passage.kind == "text":
                held.append(runner.manager.bytes_in_use())
            parts = [
                runner.execute_all(
                    SeqWork(seq=seq, tokens=passage.tokens[a : a + SCORED_TOKENS], start=a, salt=b"", sample=True)
                )
                for a in range(cut, len(passage.tokens), SCORED_TOKENS)
            ]
            found.append(torch.cat(parts)[passage.cut - cut :])
            runner.free(seq)
    finally:
        runner.release()
    return found, sum(held) / len(held)


def _figures(passages: Sequence[Passage], exact: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    """Mean KL divergence from the exact cache on text; of answers, the mean negative log-likelihood in nats, and the
    share of which every token is the most likely one.
    """
    kl, nll, right = [], [], []
    for passage, p, q in zip(passages, exact, found, strict=True):
        answer = passage.tokens[passage.cut + 1 :]
        if passage.kind == "text":
            kl.append(divergence(p, q)[0])
        else:
            nll.append(surprise(q, answer))
            right.append(float(q[: len(answer)].argmax(-1).tolist() == list(answer)))
    return {
        "text_kl": float(torch.cat(kl).mean()),
        "answer_nll": float(torch.cat(nll).mean()),
        "answers_right": sum(right) / len(right),
    }


def _show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="Methods over the share kept")
    for heading in ("method", "keep", *FIGURES):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        figures = [f"{row[figure]:.0f}" if figure == "bytes" else f"{row[figure]:.3f}" for figure in FIGURES]
        table.add_row(row["method"], f"{row['keep']:g}", *figures)
    Console(width=110).print(table)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.merging")
