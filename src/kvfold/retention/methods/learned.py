"""A learned scorer (KVzap, arXiv 2601.07891): what a small map reads from a token's hidden state decides.

``s[h, i] = exp(f(x[i])[h])``, where ``x[i] [E]`` is what a layer's attention is given of token ``i`` and ``f`` the
layer's map (:mod:`kvfold.retention.scorer`), fitted by ``kvfold train-retention`` to the logarithm of KVzip's scores.
Every token is scored once, when it is read or generated: nothing is repeated, no attention is looked at, and it works
just so while decoding. The paper keeps what is above a threshold; here the budget is fixed, and pages are dealt over
all layers and heads of a group by the scores. Frees all but the kept share, other tokens and other numbers of them in
every head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from kvfold.errors import ModelError, UnsupportedError
from kvfold.retention.dealing import deal_by_score
from kvfold.retention.method import Notes, RetentionMethod, Seen
from kvfold.retention.scorer import Scorer
from kvfold.retention.view import LayerView

if TYPE_CHECKING:
    from kvfold.geometry import Geometry

__all__ = ["Learned"]


@dataclass(frozen=True)
class Learned(RetentionMethod):
    """Keeps what the scorer in ``file`` says will matter; without one, that beside the model's weights."""

    file: str = ""

    watches: ClassVar[int | None] = None
    wants_hidden: ClassVar[bool] = True

    def refusals(self, geometry: Geometry) -> list[str]:
        """That there is no scorer, or that it is of another model."""
        if not self.file:
            return ["no scorer.safetensors lies beside its weights: make it (kvfold train-retention) or name one"]
        try:
            return Scorer.load(self.file).refusals(geometry)
        except ModelError as error:
            return [str(error)]

    def observe(self, seen: Seen, notes: Notes) -> None:
        """Scores the new tokens."""
        if seen.replay is not None:
            return
        if seen.hidden is None:
            layer = f"layer {seen.view.layer}"
            raise UnsupportedError(f"retention by {layer}", why="its attention is not given its hidden states by name")
        scores = Scorer.load(self.file, seen.hidden.device).maps[seen.view.layer](seen.hidden).T
        before = seen.view.columns - scores.shape[1]
        known = scores[:, :0] if notes.per_token is None else notes.per_token
        known = torch.nn.functional.pad(known, (0, before - known.shape[1]), value=torch.nan)
        notes.per_token = torch.cat((known, scores), dim=1)

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """What the map says. UnsupportedError for tokens that were taken from another sequence, unseen."""
        if notes.per_token is None or bool(notes.per_token[:, view.candidates].isnan().any()):
            why = "tokens of it were read by another one, so that their hidden states were not seen"
            raise UnsupportedError("scoring a sequence by its hidden states", why=why, hint="turn prefix caching off")
        return notes.per_token[:, view.candidates].exp()

    def deal(self, scores: Sequence[Tensor], pages: int, size: int, layers: Sequence[int]) -> Tensor:
        """By the scores of all heads together."""
        return deal_by_score(scores, pages, size)
