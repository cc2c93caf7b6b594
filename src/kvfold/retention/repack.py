"""From scores to pages: which tokens each head keeps, and where in the new blocks they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvfold.errors import KVFoldError
from kvfold.retention.dealing import pages_there

__all__ = ["Layout", "chosen", "dealt", "lay_out"]


def dealt(counts: Tensor, scores: Sequence[Tensor], pages: int, size: int) -> Tensor:
    """``counts [L, H]`` of pages as a method dealt them; KVFoldError if it dealt more than there are."""
    have = pages_there(scores, size)
    if counts.shape != have.shape or int(counts.sum()) > pages or bool((counts < 0).any() | (counts > have).any()):
        raise KVFoldError("retention dealt pages that are not there", why=f"{counts.tolist()} of {pages} in all")
    return counts


def chosen(scores: Tensor, counts: Tensor, size: int) -> Tensor:
    """The best candidates of each head, rising: ``[H, m]`` of ``scores [H, n]``, whole pages by ``counts [H]``, -1
    where a head has fewer than the one with most. Of equal scores the later candidates stay.
    """
    most = int(counts.max()) * size
    # Sorted, not top-k: equal scores (a constant scorer, padding) must fall the same way on every device.
    order = scores.flip(1).argsort(dim=1, descending=True, stable=True)[:, :most]
    order = scores.shape[1] - 1 - order
    short = torch.arange(most, device=scores.device) >= (counts * size)[:, None]
    kept = order.masked_fill(short, scores.shape[1]).sort(dim=1).values
    return kept.masked_fill(kept == scores.shape[1], -1)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the pages of all heads lie: ``block [L, H, P]`` (number among the new blocks) and ``slot [L, H, P]`` (page
    within the block), int64; -1 beyond a head's own pages. ``blocks``: how many are needed.
    """

    block: np.ndarray
    slot: np.ndarray
    blocks: int


def lay_out(counts: np.ndarray) -> Layout:
    """A place for ``counts [L, H]`` pages in as few blocks as possible; a block has a page slot for every (layer,
    head).

    A head's pages lie in its own slots, one block after the other, as everywhere else; what goes beyond the last block
    lies in slots that heads with fewer pages leave free.
    """
    per_block, most = counts.size, int(counts.max(initial=0))
    blocks = -(-int(counts.sum()) // per_block)
    flat = counts.reshape(-1)
    number = np.arange(most)
    block = np.broadcast_to(number, (per_block, most)).copy()
    slot = np.broadcast_to(np.arange(per_block)[:, None], (per_block, most)).copy()
    over = (number >= blocks) & (number < flat[:, None])
    free = np.argwhere(np.arange(blocks) >= flat[:, None])[: int(over.sum())]  # (slot, block)
    block[over], slot[over] = free[:, 1], free[:, 0]
    gone = number >= flat[:, None]
    block[gone] = slot[gone] = -1
    shape = (*counts.shape, most)
    return Layout(block.reshape(shape), slot.reshape(shape), blocks)
