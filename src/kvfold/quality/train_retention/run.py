"""The whole training: pairs, a map for each layer, the file, and how well it predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel

from kvfold.errors import RequestError, UnsupportedError
from kvfold.geometry import Geometry
from kvfold.quality.train_retention.collect import TEACHER, collect
from kvfold.quality.train_retention.fit import Fitted, fit_layer
from kvfold.recipe import Recipe
from kvfold.retention.build import refusals
from kvfold.retention.scorer import Scorer

__all__ = ["LEAST_R2", "HeadFit", "LayerFit", "TrainingReport", "check_trainable", "train_retention"]

_HELD_OUT: Final = 8  # every so-manieth passage
_LEAST_PASSAGES: Final = 2

LEAST_R2: Final = 0.1
"""A scorer explains at least so much of the variance of held-out scores; a constant explains 0."""


@dataclass(frozen=True, slots=True)
class HeadFit:
    """How a head is predicted on passages held out: the share of the variance of the logarithms that is explained, and
    Spearman's rank correlation.
    """

    r2: float
    spearman: float


@dataclass(frozen=True, slots=True)
class LayerFit:
    """A layer's map: ``linear``, or ``mlp`` with a layer between."""

    layer: int
    kind: str
    heads: tuple[HeadFit, ...]


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What was learned. ``tokens`` in all passages, ``held_out`` of them in those that only judge; ``bytes`` of the
    file.
    """

    file: str
    tokens: int
    held_out: int
    bytes: int
    layers: tuple[LayerFit, ...]

    @property
    def mean_r2(self) -> float:
        """Mean R² of all heads on the held-out passages; NaN without heads.

        One head that is far off drags it down, as it should: pages are dealt out by comparing the scores of all heads.
        """
        values = [head.r2 for layer in self.layers for head in layer.heads]
        return sum(values) / len(values) if values else math.nan

    @property
    def useful(self) -> bool:
        """Whether a recipe with this scorer can be recommended: `mean_r2` is at least `LEAST_R2`."""
        return self.mean_r2 >= LEAST_R2

    def as_json(self) -> dict[str, object]:
        """Plain data, with the verdict."""
        return asdict(self) | {"mean_r2": self.mean_r2, "useful": self.useful}


def check_trainable(model: PreTrainedModel) -> None:
    """UnsupportedError, in words about the model, if no scorer can be trained for it."""
    geometry = Geometry.from_config(model.config)
    what = f"training a scorer for {geometry.model_type}"
    windows = [layer.window for layer in geometry.layers if layer.stores]
    if all(window is not None for window in windows):
        widest = max((window for window in windows if window is not None), default=0)
        why = f"every layer that keeps a cache attends to its last {widest:,} tokens only; older ones are freed anyway"
        hint = "there is nothing for retention to choose from; to save memory, pack the window: --recipe int4"
        raise UnsupportedError(what, why=why, hint=hint)
    recipe = Recipe.parse(TEACHER)
    if reasons := recipe.supports(geometry) + refusals(recipe, geometry, model):
        raise UnsupportedError(what, reasons)


def train_retention(
    model: PreTrainedModel,
    passages: Sequence[Sequence[int]],
    file: Path,
    *,
    instruction: Sequence[int] = (),
    width: int = 128,
    seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> TrainingReport:
    """Learns from ``model`` repeating ``passages`` (see `collect`) and writes ``file``, whole or not at all.

    Every eighth passage is held out. ``width``: of the layer between; 0: only linear maps. RequestError for fewer than
    two passages, UnsupportedError for a model that cannot be watched. ``progress`` is told of every passage and layer.
    """
    check_trainable(model)
    if len(passages) < _LEAST_PASSAGES:
        hint = "give more --tokens, or a shorter --length"
        raise RequestError(f"training on {len(passages)} passages", why="one of them is held out", hint=hint)
    pairs = collect(model, passages, instruction, seed=seed, progress=progress)
    last = len(passages) - 1
    judges = torch.tensor([number % _HELD_OUT == min(_HELD_OUT - 1, last) for number in range(len(passages))])
    fits: dict[int, Fitted] = {}
    for layer, own in pairs.items():
        progress(f"layer {layer}")
        fits[layer] = fit_layer(own, judges[own.passage], width=width, seed=seed)
    maps = {layer: fitted.map for layer, fitted in fits.items()}
    held_out = sum(len(passage) for passage, judge in zip(passages, judges.tolist(), strict=True) if judge)
    tokens = sum(map(len, passages))
    facts: dict[str, str | int] = {"teacher": "kvzip", "tokens": tokens, "seed": seed}
    Scorer(str(file), Geometry.from_config(model.config).model_type, maps).save(torch.bfloat16, facts)
    return TrainingReport(str(file), tokens, held_out, file.stat().st_size, tuple(map(_layer_fit, fits.items())))


def _layer_fit(item: tuple[int, Fitted]) -> LayerFit:
    layer, fitted = item
    heads = (HeadFit(r2, spearman) for r2, spearman in zip(fitted.r2, fitted.spearman, strict=True))
    return LayerFit(layer, fitted.kind, tuple(heads))
