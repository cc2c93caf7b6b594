"""``kvfold train-retention``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from kvfold.cli.options import CorpusOption, JsonOption, ModelOption, OutputOption, write_json
from kvfold.cli.progress import counted_progress
from kvfold.cli.start import start
from kvfold.quality.tasks import read_text

__all__ = ["EXAMPLES", "train_retention_command"]

EXAMPLES = (
    "Examples:  kvfold train-retention -o scorer.safetensors   |   "
    "kvfold train-retention --model ./my-model --text corpus.txt -o my-model/scorer.safetensors   |   "
    "then: kvfold eval --model ./my-model --compress context --recipes 'raw;raw+learned(keep=0.25)'"
)


def train_retention_command(
    output: OutputOption,
    model: ModelOption = "bundled",
    text: CorpusOption = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens to learn from.")] = 131_072,
    length: Annotated[
        int, typer.Option(min=32, help="Tokens of a passage; half of the model's positions at most.")
    ] = 2048,
    width: Annotated[int, typer.Option(min=0, help="Of the layer between; 0: linear maps only.")] = 128,
    seed: Annotated[int, typer.Option(help="Which passages, and the draws.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Train the scorer of the 'learned' retention method: which tokens to keep, read off their hidden states.

    The model repeats passages to itself, as KVzip does, and a small map for each layer learns to predict what it looks
    at.
    """
    wanted = None if text is None else read_text(text)
    with counted_progress() as say:
        start()
        import torch

        from kvfold.engine.loading import load
        from kvfold.geometry import Geometry
        from kvfold.quality.train_retention import check_trainable, train_retention, training_passages
        from kvfold.replay import INSTRUCTION
        from kvfold.report import training_report

        loaded, tokenizer = load(model, dtype=torch.float32)
        check_trainable(loaded)
        geometry = Geometry.from_config(loaded.config)
        length = min(length, geometry.max_positions // 2)
        passages = training_passages(tokenizer, text=wanted, tokens=tokens, length=length, seed=seed)
        instruction = tokenizer.encode(INSTRUCTION, add_special_tokens=False)
        say.steps = len(passages) + sum(layer.stores and layer.window is None for layer in geometry.layers)
        report = train_retention(
            loaded, passages, output, instruction=instruction, width=width, seed=seed, progress=say
        )
    if json_file != "-":
        training_report(Console(), report)
    write_json(json_file, report.as_json())
