"""Writing what a method has made in the place of the tokens it keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.codecs.pages import PageStore
from kvfold.codecs.plain import Windows
from kvfold.formats import PAGE_ALIGN
from kvfold.retention.method import Merged

__all__ = ["write_merged"]


def write_merged(store: PageStore, layer_in_group: int, lists: Tensor, kept: Tensor, merged: Merged) -> None:
    """Encodes the keys and values of ``merged`` for the tokens ``kept [H, m]`` (-1: none) and writes them, page by
    page, to the addresses ``lists [H, P]`` of a layer (-1: none).

    Pages are encoded aside first, for all heads: a calibrated basis wants them side by side.
    """
    heads, pages = lists.shape
    size, page_bytes = store.fmt.block_size, store.fmt.page_bytes
    aside = torch.zeros(heads * pages * page_bytes, dtype=torch.uint8, device=lists.device)
    scratch = PageStore(
        aside, store.fmt, store.dtype, bases=(store.k_basis, store.v_basis), heads=heads, layers=store.layers
    )
    k, v = (
        _paged(x.masked_fill((kept < 0)[..., None], 0.0), pages, size).to(store.dtype) for x in (merged.k, merged.v)
    )
    number = torch.arange(heads * pages, device=lists.device)
    scratch.write_pages(number * page_bytes, k, v, layer_in_group)
    target = lists.T.reshape(-1)
    there = target >= 0
    Windows(store.arena, page_bytes, step=PAGE_ALIGN).put(target[there], aside.view(-1, page_bytes)[there])


def _paged(rows: Tensor, pages: int, size: int) -> Tensor:
    """``[H, m, D]`` as pages ``[P * H, S, D]``, heads fastest, the last ones filled up with zeros."""
    padded: Tensor = torch.nn.functional.pad(rows, (0, 0, 0, pages * size - rows.shape[1]))
    paged: Tensor = padded.unflatten(1, (pages, size))
    return paged.transpose(0, 1).flatten(0, 1)
