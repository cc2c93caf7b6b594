"""Pages that retention has filled: every layer and KV head has a list of its own, for its tokens are its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.attention.pieces import PagePiece
from kvfold.codecs.pages import PageStore

__all__ = ["KeptPages", "joined"]


@dataclass(frozen=True, slots=True)
class KeptPages:
    """What is left of some blocks of one sequence, in a group of ``L`` layers and ``H`` KV heads.

    ``counts [L, H]``, int64: pages of each head, all of them full. ``flat [total]``, int64: their byte addresses, head
    by head. ``bias [total * S]``, float32, in the same order, is added to the scores; None: no token has one.
    """

    counts: Tensor
    flat: Tensor
    bias: Tensor | None = None

    @property
    def pages(self) -> int:
        """Pages of the longest list."""
        return int(self.counts.max()) if self.counts.numel() else 0

    @property
    def shown(self) -> Tensor:
        """bool ``[L, H, P]``: which pages of padded lists there are."""
        return torch.arange(self.pages, device=self.flat.device) < self.counts[..., None]

    def lists(self) -> Tensor:
        """Page addresses ``[L, H, P]``; -1 behind the last of a list."""
        lists = self.flat.new_full((*self.counts.shape, self.pages), -1)
        lists[self.shown] = self.flat
        return lists

    def biases(self, size: int) -> Tensor | None:
        """Biases ``[L, H, P * size]`` of pages of ``size`` tokens; 0 behind the last of a list."""
        if self.bias is None:
            return None
        biases = self.bias.new_zeros((*self.counts.shape, self.pages, size))
        biases[self.shown] = self.bias.unflatten(0, (-1, size))
        return biases.flatten(2)


def joined(store: PageStore, kept: Sequence[KeptPages], rows: Tensor | None) -> PagePiece:
    """A piece of the pages of several sequences, whose queries are ``rows``; shorter lists end early, with -1."""
    widest, size = max(each.pages for each in kept), store.fmt.block_size
    pad = torch.nn.functional.pad
    addr = torch.stack([pad(each.lists(), (0, widest - each.pages), value=-1) for each in kept], dim=1)
    bias = None
    if any(each.bias is not None for each in kept):
        bias = addr.new_zeros((*addr.shape[:3], widest * size), dtype=torch.float32)
        for i, each in enumerate(kept):
            if (own := each.biases(size)) is not None:
                bias[:, i, :, : own.shape[-1]] = own
    ragged = bool((addr < 0).any())
    return PagePiece(store, addr, 0, bias, rows, layered=True, ragged=ragged)
