"""Pairs to learn from: what a layer's attention is given of a token, and the score that KVzip finds for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfold.cache import PagedCache, SequenceWork
from kvfold.errors import RequestError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.packed import PackedModel
from kvfold.quality.calibrate.passages import calibration_passages, task_passages
from kvfold.recipe import Recipe
from kvfold.replay import replay
from kvfold.retention.method import Notes, RetentionMethod, Seen
from kvfold.retention.methods.kvzip import KVzip
from kvfold.retention.view import LayerView

__all__ = ["TEACHER", "LayerPairs", "collect", "training_passages"]

_HELD_BYTES: Final = 2 << 30
"""Of all hidden states; of longer texts, as many tokens of each passage are drawn as fit."""

TEACHER: Final = "raw+kvzip(keep=1.0)"
"""The recipe whose scores are learned."""

_SCALE_LIMIT: Final = 6e4  # of numbers held in half precision


@dataclass(frozen=True, slots=True)
class LayerPairs:
    """Of one layer: ``hidden [n, E]``, half precision, ``scores [n, H]``, float32, and the ``passage [n]`` of each."""

    hidden: Tensor
    scores: Tensor
    passage: Tensor


def training_passages(
    tokenizer: PreTrainedTokenizerBase, *, text: str | None, tokens: int, length: int, seed: int
) -> list[list[int]]:
    """About ``tokens`` tokens in passages of ``length``, and half of it: those of a calibration. With a ``text``, every
    third is a text to look things up in instead: what is asked for later must be in what is learned from.
    """
    if text is None:
        return calibration_passages(tokenizer, text=None, tokens=tokens, length=length, seed=seed)
    asked = task_passages(tokenizer, count=max(1, tokens // length // 3), length=length, seed=seed)
    return calibration_passages(tokenizer, text=text, tokens=tokens * 2 // 3, length=length, seed=seed) + asked


class _Teacher(RetentionMethod):
    """Watches like KVzip, and keeps what the layers were given of the sequence it watches."""

    wants_hidden: ClassVar[bool] = True
    replays: ClassVar[bool] = True

    def __init__(self) -> None:
        self.inner = KVzip()
        self.hidden: dict[int, Tensor] = {}
        self.scores: dict[int, Tensor] = {}

    def observe(self, seen: Seen, notes: Notes) -> None:
        self.inner.observe(seen, notes)
        if seen.replay is None:
            if seen.hidden is None:
                why = f"the attention of layer {seen.view.layer} is not given its hidden states by name"
                raise UnsupportedError("training a scorer", why=why)
            self.hidden[seen.view.layer] = seen.hidden
        elif notes.per_token is not None:
            self.scores[seen.view.layer] = notes.per_token.T

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        return self.inner.score(view, notes)


def collect(
    model: PreTrainedModel,
    passages: Sequence[Sequence[int]],
    instruction: Sequence[int],
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[int, LayerPairs]:
    """The pairs of each layer without a window, from ``passages`` read and repeated one after the other.

    UnsupportedError if the model cannot be served or has no such layer. ``progress`` is told of every passage.
    """
    if not passages or not all(passages):
        raise RequestError("training on nothing", why="there are no passages, or empty ones")
    geometry = Geometry.from_config(model.config)
    recipe = Recipe.parse(TEACHER)
    cache = PagedCache(geometry, recipe, dtype=model.dtype, device=model.device, prefix_caching=False)
    watched = sum(layer.stores and layer.window is None for layer in geometry.layers)
    share = min(1.0, _HELD_BYTES / (sum(map(len, passages)) * watched * geometry.hidden * 2))
    generator = torch.Generator().manual_seed(seed)
    packed = PackedModel(model)
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    try:
        for number, passage in enumerate(passages, start=1):
            progress(f"passage {number} of {len(passages)}")
            teacher = _watched(packed, cache, passage, instruction)
            drawn = torch.randperm(len(passage), generator=generator)[: max(1, int(share * len(passage)))].sort().values
            for layer, scores in teacher.scores.items():
                # Sinks never are candidates, and would be the largest scores of all.
                drawn_here = drawn[drawn >= recipe.sinks]
                hidden = teacher.hidden[layer].cpu()[drawn_here].clamp(-_SCALE_LIMIT, _SCALE_LIMIT)
                found.setdefault(layer, []).append((hidden.half(), scores.cpu()[drawn_here]))
    finally:
        packed.release()
    return {layer: _joined(parts) for layer, parts in sorted(found.items())}


def _watched(packed: PackedModel, cache: PagedCache, passage: Sequence[int], instruction: Sequence[int]) -> _Teacher:
    """Reads and repeats a passage; the teacher that has watched."""
    teacher = _Teacher()
    if cache.retainer is None:
        raise TypeError("the recipe of the training has a method")
    cache.retainer.method = teacher
    seq = cache.create()
    try:
        step = cache.begin([SequenceWork(seq, len(passage))])
        try:
            ids = torch.tensor(list(passage), device=cache.device)
            positions = torch.arange(len(passage), device=cache.device)
            packed.forward(step, ids, positions, ids.new_empty(0), [len(passage)])
            cache.commit(step)
        except BaseException:
            cache.abandon(step)
            raise
        replay(packed, cache, seq, passage, instruction)
    finally:
        cache.free(seq)
    return teacher


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> LayerPairs:
    counts = torch.tensor([scores.shape[0] for _, scores in parts])
    hidden, scores = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return LayerPairs(hidden.clone(), scores.clone(), torch.arange(len(parts)).repeat_interleave(counts))
