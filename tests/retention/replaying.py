"""Reading a context and repeating it, for the tests of replays and of methods that watch them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.engine.runner import ModelRunner, SeqWork
from kvfold.recipe import Recipe
from kvfold.replay import replay
from tests.calibrations import tokens

INSTRUCTION = tokens(5, seed=77)


def runner_of(model: PreTrainedModel, recipe: str, *, kv_memory: int = 4 << 20, prefixes: bool = False) -> ModelRunner:
    return ModelRunner(model, recipe=Recipe.parse(recipe), kv_memory=kv_memory, prefix_caching=prefixes, check=False)


def read(runner: ModelRunner, text: Sequence[int], *, seq: int | None = None, start: int = 0) -> int:
    """A sequence (a new one) that has read ``text`` from position ``start`` on."""
    seq = runner.create() if seq is None else seq
    runner.execute([SeqWork(seq=seq, tokens=text[start:], start=start, salt=b"", sample=True)])
    return seq


def repeat(runner: ModelRunner, seq: int, text: Sequence[int], *, first: int = 0, chunk: int = 2048) -> None:
    replay(runner._packed, runner.cache, seq, text, INSTRUCTION, first=first, chunk=chunk)


def scores(runner: ModelRunner, seq: int) -> dict[int, Tensor]:
    """What has been noted of the tokens of a sequence, ``[H, columns]`` by layer."""
    assert runner.cache.retainer is not None
    notes = runner.cache.retainer._notes[seq]
    return {layer: note.per_token.clone() for layer, note in notes.items() if note.per_token is not None}


def next_logits(runner: ModelRunner, seq: int, text: Sequence[int], start: int) -> Tensor:
    return torch.cat(
        [
            runner.execute([SeqWork(seq=seq, tokens=[token], start=start + i, salt=b"", sample=True)])
            for i, token in enumerate(text)
        ]
    )
