"""KeyDiff (arXiv 2504.15364): keys unlike the others stay.

``s[h, i] = -cos(k[h, i], mean_j k[h, j] / |k[h, j]|)`` with the keys ``[H, columns, D]`` as they are attended (rotary
phases in) and the mean over all columns. No query is needed. Frees all but the kept share, other tokens in every head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.retention.method import Notes, RetentionMethod
from kvfold.retention.view import LayerView

__all__ = ["KeyDiff"]


@dataclass(frozen=True)
class KeyDiff(RetentionMethod):
    """Keeps the keys that are least like the mean key."""

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """Minus the cosine between a key and the mean of all keys' directions."""
        shown = view.shown[..., None]
        directions = torch.nn.functional.normalize(view.keys(), dim=-1)
        anchor = (directions * shown).sum(1, keepdim=True) / shown.sum(1, keepdim=True)
        return -torch.nn.functional.cosine_similarity(directions[:, view.candidates], anchor, dim=-1)
