"""TOVA (arXiv 2401.06104): what the latest query attends to stays, the same tokens in every head of a layer.

``s[h, i] = mean_{h', g} a[h', g, i]``: attention weights of the latest query, averaged over all query heads of the
layer. The paper drops one token at each decode step; here retention runs at its own points, on whole pages, by the
query that is latest then. The latest token need not be exempted: it is among the recent ones.

The query is this request's, so the result is too. Frees all but the kept share. Heads keep the same tokens as long as
nothing deals them different budgets: after ``adakv(tova)`` has, columns of different heads are different tokens, and
their average is only a hint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.retention.method import Notes, RetentionMethod, Seen
from kvfold.retention.view import LayerView

__all__ = ["TOVA"]


@dataclass(frozen=True)
class TOVA(RetentionMethod):
    """Keeps what the latest query looks at."""

    query_aware: ClassVar[bool] = True
    watches: ClassVar[int | None] = 1

    def observe(self, seen: Seen, notes: Notes) -> None:
        """Remembers the latest query."""
        notes.values["query"] = seen.q[-1:].clone()

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """Mean weights of all heads."""
        mass = torch.stack([weights.mean((0, 1)) for weights in view.weights(notes.values["query"])])
        return mass.mean(0)[view.candidates].expand(view.kv_heads, -1)
