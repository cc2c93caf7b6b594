"""Bounds of a page's keys, for retrieval: in each channel the least and the greatest number of its tokens.

They lie in the page itself (`kvfold.formats.PageFormat.summary_offset`), so that what copies, shares or frees it does
the same with them. They are those of the keys as they were stored, in the model's basis (rotary phases in), rounded
outward to bfloat16: for every token ``t`` of a page and every query ``q``,
``q . k_t <= sum_d max(q_d * least_d, q_d * greatest_d)`` up to the rounding of float32 sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.codecs.pages import PageStore
from kvfold.codecs.plain import Windows, parts, work_rows
from kvfold.formats import PAGE_ALIGN

__all__ = ["outward", "read_summaries", "summarise"]

_MANTISSA = 0xFFFF  # what bfloat16 cuts off float32


def summarise(store: PageStore, addr: Tensor, layer: int | None = None) -> None:
    """Writes the bounds of pages ``addr [P]``, all of whose tokens are in use. ``layer`` as in `PageStore`; addresses
    of -1 stand for no page.
    """
    fmt = store.fmt
    if not addr.numel() or int(addr.max()) < 0:
        return
    windows = Windows(store.arena, fmt.summary_bytes, step=PAGE_ALIGN, offset=fmt.summary_offset)
    unit = store.heads * (store.layers if layer is None else 1)
    for part in parts(addr.numel(), work_rows(addr.device) // fmt.block_size, unit):
        pages, there = addr[part], addr[part] >= 0
        # Heads take turns: a page that is not there is some other page.
        keys = store.decode_keys(pages.where(there, addr.max()), layer, values=fmt.summary_dims > fmt.k.dim)
        least, greatest = outward(*keys.aminmax(dim=1))
        windows.put(pages[there], torch.stack((least, greatest), dim=1)[there])


def read_summaries(store: PageStore, addr: Tensor) -> Tensor:
    """Bounds of pages ``addr [..., P]``: bfloat16 ``[..., P, 2, D]``, the least and the greatest."""
    fmt = store.fmt
    windows = Windows(store.arena, fmt.summary_bytes, step=PAGE_ALIGN, offset=fmt.summary_offset)
    found = windows.take(addr.reshape(-1)).view(torch.bfloat16)
    return found.view(*addr.shape, 2, fmt.summary_dims)


def outward(least: Tensor, greatest: Tensor) -> tuple[Tensor, Tensor]:
    """float32 bounds as bfloat16 ones, ``least`` rounded down and ``greatest`` up."""
    return _rounded(least, least < 0), _rounded(greatest, greatest > 0)


def _rounded(x: Tensor, away: Tensor) -> Tensor:
    """bfloat16, rounded away from zero where ``away``, else towards it. NaN stays NaN."""
    bits = x.view(torch.int32)
    bits = torch.where(away, bits + _MANTISSA, bits) & ~_MANTISSA
    return bits.view(torch.float32).where(~x.isnan(), x).to(torch.bfloat16)
