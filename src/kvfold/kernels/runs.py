"""Where the new tokens of a step go: runs of them in blocks, for every layer of a group alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RowIndex", "TokenRuns"]


class RowIndex(NamedTuple):
    """Runs taken apart into rows, for whoever scatters row by row: pages of the group's first layer ``addr [N, Hkv]``,
    ``slot [N, Hkv]``, and which ``rows [N]`` of the step's tokens they are (None: all, in order).
    """

    addr: Tensor
    slot: Tensor
    rows: Tensor | None


@dataclass(frozen=True)
class TokenRuns:
    """Runs of tokens, each within one block.

    ``table [n, 4]``, int64 on the CPU: byte offset of the block, number of tokens, slot of the first, place of the
    first among the ``tokens`` of the step. The pages of a block's ``heads`` lie one after the other, ``page_bytes``
    each, and a layer's pages ``layer_bytes`` behind those of the layer before.
    """

    table: Tensor
    tokens: int
    heads: int
    page_bytes: int
    device: torch.device

    @property
    def layer_bytes(self) -> int:
        """Bytes between a layer's page and the next layer's page of the same head."""
        return self.heads * self.page_bytes

    @cached_property
    def index(self) -> RowIndex:
        """The rows one by one, on the device; made once, for all layers."""
        offset, count, slot, first = self.table.unbind(1)
        within = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
        rows = first.repeat_interleave(count) + within
        in_order = torch.equal(rows, torch.arange(self.tokens))
        heads = torch.arange(self.heads) * self.page_bytes
        slots = slot.repeat_interleave(count) + within
        return RowIndex(
            addr=(offset.repeat_interleave(count)[:, None] + heads).to(self.device),
            slot=slots[:, None].expand(-1, self.heads).to(self.device),
            rows=None if in_order else rows.to(self.device),
        )
