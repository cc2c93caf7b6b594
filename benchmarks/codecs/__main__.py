"""``python -m benchmarks.codecs``: every codec on the same held-out passages, at stated bits."""

from __future__ import annotations

import hashlib
import shlex
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from benchmarks.command import run_app
from rich.console import Console

from kvfold.cli.options import JsonOption, ModelOption, write_json
from kvfold.cli.progress import counted_progress
from kvfold.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.codecs.protocol import Passage
    from benchmarks.codecs.rivals import Codec
    from benchmarks.codecs.table import Result, Row
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.command()
def run(
    model: ModelOption = "bundled",
    windows: Annotated[int, typer.Option(min=1, help="Held-out passages of text, 256 tokens of each scored.")] = 6,
    questions: Annotated[int, typer.Option(min=1, help="Questions of each of the four recall tasks.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate on.")] = 24_576,
    length: Annotated[int, typer.Option(min=64, help="Tokens of a passage of these.")] = 2048,
    only: Annotated[str, typer.Option(metavar="PATTERNS", help="Codecs to measure, as 'OSCAR*;*, 2 bits*'.")] = "*",
    seed: Annotated[int, typer.Option(min=0, help="Which passages, questions and draws.")] = 0,
    json_file: JsonOption = None,
    docs: Annotated[Path | None, typer.Option(metavar="FILE", help="Rewrite the tables in a page.")] = None,
) -> None:
    """Compare codecs on held-out text and recall: the prompt is read exactly and folded, what follows is scored."""
    if docs is not None:
        from benchmarks.codecs.table import check_page

        check_page(docs)
    # From here on it takes seconds to import.
    from benchmarks.codecs.table import show, write_page
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    result = measure(
        model, windows=windows, questions=questions, tokens=tokens, length=length, only=only.split(";"), seed=seed
    )
    write_json(json_file, result.as_json())
    if json_file != "-":
        show(Console(), result)
    if docs is not None:
        write_page(docs, result)


def measure(
    model: str, *, windows: int, questions: int, tokens: int, length: int, only: Sequence[str], seed: int
) -> Result:
    """All rows. RequestError if no codec is meant, UnsupportedError for a model the table cannot be made for."""
    import torch
    from benchmarks.codecs.protocol import build_passages, check_model
    from benchmarks.codecs.table import Result

    from kvfold.engine.loading import load
    from kvfold.quality.environment import hardware, versions

    begin = time.perf_counter()
    loaded, tokenizer = load(model, dtype=torch.float32, device="cpu")
    check_model(loaded)
    codecs = _codecs(loaded, tokenizer, tokens, length, seed)
    chosen = [codec for codec in codecs if any(fnmatchcase(codec.name, pattern.strip()) for pattern in only)]
    if not chosen:
        raise RequestError(f"--only {';'.join(only)}", why="no codec has such a name", hint="see the table without it")
    passages = build_passages(tokenizer, windows=windows, questions=questions, seed=seed)
    rows = _score(loaded, passages, chosen)
    scored = {kind: sum(len(p.tokens) - p.cut for p in passages if p.kind == kind) for kind in ("text", "recall")}
    settings = {
        "windows": windows,
        "answers": len(passages) - windows,
        "text_tokens": scored["text"],
        "recall_tokens": scored["recall"],
        "calibration_tokens": max(1, tokens // length) * length,
        "length": length,
        "only": list(only),
    }
    return Result(
        command=shlex.join(["python", "-m", "benchmarks.codecs", *sys.argv[1:]]),
        model=model,
        model_sha256=_digest(loaded),
        seed=seed,
        settings=settings,
        versions=versions(),
        hardware=hardware(torch.device("cpu")),
        seconds=round(time.perf_counter() - begin, 1),
        rows=rows,
    )


def _codecs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, length: int, seed: int
) -> list[Codec]:
    """Everything there is to measure, calibrated on texts that are not measured on."""
    from benchmarks.codecs.bands import banded
    from benchmarks.codecs.learn import learn
    from benchmarks.codecs.rivals import FAMILIES

    from kvfold.quality.calibrate import calibration_passages

    full, half = (
        learn(model, calibration_passages(tokenizer, text=None, tokens=tokens, length=each, seed=seed), seed)
        for each in (length, length // 2)
    )
    return [codec for family in FAMILIES for codec in family(full)] + list(banded(full, half))


def _score(model: PreTrainedModel, passages: Sequence[Passage], codecs: Sequence[Codec]) -> list[Row]:
    """Codec by codec, after two checks of the protocol itself: nothing changed costs nothing, and noise costs a lot."""
    from benchmarks.codecs.protocol import prompt, score
    from benchmarks.codecs.table import Row

    rows = []
    with counted_progress(len(codecs) + 1) as say:
        say("reading prompts")
        prompted = [prompt(model, passage) for passage in passages]
        _gate(lambda fold: score(model, prompted[:1], fold).text_kl)
        for codec in codecs:
            say(codec.name)
            begin = time.perf_counter()
            found = score(model, prompted, codec.fold)
            spent = round(time.perf_counter() - begin, 2)
            figures = (codec.bits, found.text_kl, found.recall_kl, found.top1)
            rows.append(Row(codec.family, codec.name, *figures, codec.note, spent))
    return rows


def _gate(text_kl: Callable[..., float]) -> None:
    exact = text_kl(lambda _, k, v: (k, v))
    nothing = text_kl(lambda _, k, v: (0 * k, 0 * v))
    if not abs(exact) < 1e-6 < 1e-2 < nothing:
        sys.exit(f"correctness gate: the exact cache costs {exact:.2g} nats, an empty one {nothing:.2g}")


def _digest(model: PreTrainedModel) -> str:
    """SHA-256 of the weights as they were run."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Entry point."""
    run_app(app, "codecs")


if __name__ == "__main__":
    main()
