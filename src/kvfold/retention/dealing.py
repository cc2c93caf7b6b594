"""Pages dealt over all heads of a group at once, where they save most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["deal_by_score", "pages_there"]


def pages_there(scores: Sequence[Tensor], size: int) -> Tensor:
    """Whole pages of ``size`` candidates that each head has, int64 ``[L, H]``; ``scores`` as in `deal_by_score`."""
    return torch.stack([(x > -torch.inf).sum(1) // size for x in scores])


def deal_by_score(scores: Sequence[Tensor], pages: int, size: int, floor: int = 0) -> Tensor:
    """Pages of each head, int64 ``[L, H]``, so that the kept tokens' scores are most in sum, over all layers and heads.

    ``scores[l] [H, n]``, minus infinity at padding. A head's best ``size`` tokens are its first page, the next best its
    second, and of all pages the ``pages`` with the greatest sums are kept: the top scores of the group, as far as whole
    pages can have them. Of equal sums the earlier head's counts. Before that every head gets ``floor`` pages, as far as
    it has them and there are enough for all.
    """
    layers, heads = len(scores), scores[0].shape[0]
    ranked = [x.sort(dim=1, descending=True).values for x in scores]
    most = max(x.shape[1] for x in ranked) // size
    sums = scores[0].new_full((layers, heads, most), -torch.inf, dtype=torch.float64)
    for layer, x in enumerate(ranked):
        whole = x.shape[1] // size
        sums[layer, :, :whole] = x[:, : whole * size].double().unflatten(1, (whole, size)).sum(-1)
    first = torch.arange(most, device=sums.device) < floor
    flat = sums.masked_fill(first & (sums > -torch.inf), torch.inf).flatten()
    best = flat.argsort(descending=True, stable=True)[: min(pages, int((flat > -torch.inf).sum()))]
    kept = torch.zeros_like(flat, dtype=torch.int64)
    kept[best] = 1
    return kept.view(layers, heads, most).sum(-1)
