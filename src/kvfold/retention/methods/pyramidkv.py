"""PyramidKV (arXiv 2406.02069): lower layers keep more than upper ones.

With ``P`` pages for ``L`` layers, the uppermost gets ``P / (L * beta)`` of them, the lowest ``2 P / L`` minus that, and
those between lie on a line. A lowest layer that would get more than it has gets what it has, and the uppermost the
difference. Layers are counted among those that retention runs on (of one group). Scores, and how the pages of a layer
are dealt to its heads, are those of ``inner``: snapkv, as in the paper, unless another method is named.

The paper's budgets are tokens, its window on top; here they are pages, the same number for each head of a layer, and
what does not go into whole numbers goes to the layers that lose most by it. Frees all but the kept share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvfold.retention.method import Composed, RetentionMethod
from kvfold.retention.methods.snapkv import SnapKV

__all__ = ["PyramidKV"]


@dataclass(frozen=True)
class PyramidKV(Composed):
    """Deals pages to layers along a line whose upper end is a ``beta``-th of the mean."""

    inner: RetentionMethod = field(default_factory=SnapKV)
    beta: float = 20.0

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise ValueError("beta must be at least 1")

    def deal(self, scores: Sequence[Tensor], pages: int, size: int, layers: Sequence[int]) -> Tensor:
        """Pages of the line to layers, then of each layer to its heads as the inner method does."""
        heads = scores[0].shape[0]
        have = [int(((x > -torch.inf).sum(1) // size).min()) for x in scores]
        each = _line(pages // heads, have, self.beta)
        return torch.cat(
            [
                self.inner.deal([x], own * heads, size, [layer])
                for x, own, layer in zip(scores, each, layers, strict=True)
            ]
        )


def _line(pages: int, have: Sequence[int], beta: float) -> list[int]:
    """How many pages a head of each layer gets, ``pages`` in all, of those it has."""
    mean, count = pages / len(have), len(have)
    lowest = min(2 * mean - mean / beta, max(have)) if count > 1 else mean
    step = 2 * (lowest - mean) / max(1, count - 1)
    wanted = [min(lowest - step * i, own) for i, own in enumerate(have)]
    dealt = [int(x) for x in wanted]
    while sum(dealt) < pages and any(got < own for got, own in zip(dealt, have, strict=True)):
        lacking = [want - got if got < own else -torch.inf for want, got, own in zip(wanted, dealt, have, strict=True)]
        dealt[lacking.index(max(lacking))] += 1
    return dealt
