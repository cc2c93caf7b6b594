"""SnapKV (arXiv 2404.14469): what the latest queries attend to stays.

``a[h, g, w, i]``: attention weights of the latest ``W`` queries (``window``), by KV head ``h`` and the query heads
``g`` of its group; ``s[h, i] = pool_i mean_{g, w} a[h, g, w, i]`` with a mean pool over ``kernel`` neighbours. The
queries see the question that is asked, so the result is the request's own. Frees all but the kept share, other tokens
in every head. Weights are those over all that is still there, and queries those whose own tokens are there: fewer than
``W`` if retention runs again soon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvfold.retention.method import Notes, RetentionMethod, Seen
from kvfold.retention.view import LayerView

__all__ = ["SnapKV"]


@dataclass(frozen=True)
class SnapKV(RetentionMethod):
    """Keeps what the latest ``window`` queries look at, pooled over ``kernel`` neighbours."""

    window: int = 64
    kernel: int = 5

    query_aware: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError("window must be positive, and kernel positive and odd")

    @property
    def watches(self) -> int | None:  # type: ignore[override]
        """The window."""
        return self.window

    def observe(self, seen: Seen, notes: Notes) -> None:
        """Remembers the latest queries."""
        before = notes.values.get("queries", seen.q[:0])
        notes.values["queries"] = torch.cat((before, seen.q[-self.window :]))[-self.window :].clone()

    def score(self, view: LayerView, notes: Notes) -> Tensor:
        """Mean weights, pooled."""
        queries = notes.values["queries"][-max(1, view.latest) :]
        mass = torch.stack([weights.mean((0, 1)) for weights in view.weights(queries)])[:, view.candidates]
        return torch.nn.functional.avg_pool1d(mass, self.kernel, stride=1, padding=self.kernel // 2)
