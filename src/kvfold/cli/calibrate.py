"""``kvfold calibrate``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from kvfold.cli.options import CorpusOption, JsonOption, ModelOption, OutputOption, write_json
from kvfold.cli.progress import counted_progress
from kvfold.cli.start import start
from kvfold.quality.tasks import read_text

__all__ = ["EXAMPLES", "calibrate_command"]

EXAMPLES = (
    "Examples:  kvfold calibrate -o bundled.safetensors   |   "
    "kvfold calibrate --model ./my-model --text corpus.txt -o my-model/calibration.safetensors   |   "
    "then: kvfold demo --recipes 'int4;int2.5:calibrated(bundled.safetensors)'"
)


def calibrate_command(
    output: OutputOption,
    model: ModelOption = "bundled",
    text: CorpusOption = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate on.")] = 32_768,
    length: Annotated[int, typer.Option(min=16, help="Tokens of a passage: as long as contexts will be.")] = 4096,
    seed: Annotated[int, typer.Option(help="Which passages, and the draws.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Find the bases of calibrated recipes: which directions of keys and values matter, and how finely.

    Keys of other positions lie in other directions, so passages should be as long as the contexts to be served.
    """
    wanted = None if text is None else read_text(text)
    with counted_progress() as say:
        start()
        import torch

        from kvfold.engine.loading import load
        from kvfold.geometry import Geometry
        from kvfold.quality.calibrate import calibrate, calibration_passages
        from kvfold.report import calibration_report

        loaded, tokenizer = load(model, dtype=torch.float32)
        length = min(length, Geometry.from_config(loaded.config).max_positions)
        passages = calibration_passages(tokenizer, text=wanted, tokens=tokens, length=length, seed=seed)
        say.steps = len(passages) + 1
        report = calibrate(loaded, passages, output, seed=seed, progress=say)
    if json_file != "-":
        calibration_report(Console(), report)
    write_json(json_file, report.as_json())
