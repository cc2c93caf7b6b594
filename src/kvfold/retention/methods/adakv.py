"""Ada-KV (arXiv 2407.11550): heads whose attention is spread out keep more than those that look at few tokens.

The pages of a layer go where they save most: a head's ``j``-th page is worth the sum of its ``j``-th best ``S`` scores,
and the pages worth most are dealt, over all heads of the layer. That is the paper's top-k over the scores of all heads,
at the grain of a page: with whole pages it keeps the greatest sum of scores, hence the least bound on the error of the
layer's output. A floor saves each head ``alpha`` of an equal share, rounded up to whole pages.

Scores, and how many pages a layer has, are those of ``inner``; what that leaves over because it deals evenly is shared
out among the layers. Frees all but the kept share; heads of one layer have lists of different lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.retention.dealing import deal_by_score
from kvfold.retention.method import Composed

__all__ = ["AdaKV"]


@dataclass(frozen=True)
class AdaKV(Composed):
    """Deals the pages of a layer to its heads by their scores; each keeps ``alpha`` of an equal share."""

    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError("alpha is a share from 0 to 1")

    def deal(self, scores: Sequence[Tensor], pages: int, size: int, layers: Sequence[int]) -> Tensor:
        """Pages by worth."""
        totals = self.inner.deal(scores, pages, size, layers).sum(1).tolist()
        over = (pages - sum(totals)) // len(totals)
        dealt = []
        for x, own in zip(scores, totals, strict=True):
            total, heads = own + over, x.shape[0]
            floor = min(math.ceil(self.alpha * total / heads), total // heads)
            dealt.append(deal_by_score([x], total, size, floor))
        return torch.cat(dealt)
