"""What a page can matter at most to some queries, by the bounds it carries of its keys; and the pages that can most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.formats import PageFormat

__all__ = ["BoundsCall", "bound", "choose", "top"]

_AT_ONCE = 1 << 22  # numbers of bounds, widened to float32, that are held at a time


@dataclass(frozen=True, slots=True)
class BoundsCall:
    """Queries of a layer and the pages they might read.

    ``q [n, Hkv, G, D]``, float32, in the model's basis: the query heads that share a KV head are rows. ``addr [n, Hkv,
    P]``, int64: byte offsets of pages in ``arena``, to each of which ``shift`` is added; -1: no page. ``fmt``: how a
    page lies, with a summary. ``bias [n, Hkv, P]``, float32: the greatest bias of a page's tokens. ``read`` gathers the
    bounds of pages ``addr [..., P]`` as bfloat16 ``[..., P, 2, D]``, for whoever cannot read them where they lie.
    ``pages``: how many are wanted, to `choose`.

    The bound of a page is the logit ``softcap(scale * max_g sum_d max(q_gd least_d, q_gd greatest_d)) + bias``: no
    query of the group gives any of its tokens a greater one. A page whose bounds are not finite counts as infinity, so
    that what is broken is read and seen; no page, as minus infinity.
    """

    q: Tensor
    arena: Tensor
    addr: Tensor
    shift: int
    fmt: PageFormat
    scale: float
    read: Callable[[Tensor], Tensor]
    softcap: float | None = None
    bias: Tensor | None = None
    pages: int = 0


def bound(call: BoundsCall) -> Tensor:
    """The bounds ``[n, Hkv, P]``, float32, in plain torch."""
    # max(q least, q greatest) = min(q, 0) least + max(q, 0) greatest: one product over both. Each page is summed up for
    # itself: a matrix product rounds by where a page stands, so that equal pages would not have equal bounds.
    q = torch.cat((call.q.clamp_max(0), call.q.clamp_min(0)), dim=-1)
    n, heads, pages = call.addr.shape
    there = call.addr >= 0
    addr = (call.addr + call.shift).where(there, 0)
    span = max(1, _AT_ONCE // (n * heads * q.shape[-1]))
    parts = []
    for first in range(0, pages, span):
        bounds = call.read(addr[..., first : first + span]).flatten(-2).float()
        parts.append(torch.stack([(bounds * row[..., None, :]).sum(-1) for row in q.unbind(-2)]).amax(0))
    logits = torch.cat(parts, dim=-1) * call.scale if parts else addr.float()
    logits = logits.masked_fill(logits.isnan(), torch.inf)
    if call.softcap is not None:
        logits = torch.tanh(logits / call.softcap) * call.softcap
    if call.bias is not None:
        logits = logits + call.bias
    return logits.masked_fill(~there, -torch.inf)


def choose(call: BoundsCall) -> Tensor:
    """The places ``[n, Hkv, k]``, rising, of the ``call.pages`` pages with the greatest bounds, in plain torch."""
    return top(bound(call), call.pages)


def top(bounds: Tensor, count: int) -> Tensor:
    """Places ``[..., k]``, rising, of the ``count`` greatest ``bounds [..., P]``; -1 behind them where fewer are above
    minus infinity. Of equal ones the first.
    """
    count = min(count, bounds.shape[-1])
    found, order = bounds.sort(dim=-1, descending=True, stable=True)
    order = order[..., :count].masked_fill(found[..., :count] == -torch.inf, bounds.shape[-1])
    order = order.sort(dim=-1).values
    return order.masked_fill(order == bounds.shape[-1], -1)
