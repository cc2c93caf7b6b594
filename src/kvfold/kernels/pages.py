"""Decode attention over pages: the call, and the implementation in plain torch that unpacks them first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvfold.formats import PageFormat
from kvfold.kernels.dense import DenseCall
from kvfold.kernels.merge import Piece, merge
from kvfold.kernels.registry import OpRegistry

__all__ = ["HIDDEN", "UNPACK_BYTES", "PagesCall", "unpack_with"]

UNPACK_BYTES = 64 << 20
"""What the unpacking implementation holds of unpacked keys and values at a time; on a CPU an eighth of it, which stays
in the caches until it is used.
"""

HIDDEN = torch.finfo(torch.bfloat16).min
"""The bias of a token that must not be seen: finite in float32 and bfloat16."""


@dataclass(frozen=True, slots=True)
class PagesCall:
    """One decode attention: a query per sequence over its pages.

    ``q [n, Hkv, G, Dk]`` in the basis of the stored keys, float32: the query heads that share a KV head are rows.
    ``arena``: uint8 ``[bytes]``. ``addr [n, Hkv, P]``, int64: byte offsets of pages, to each of which ``shift`` is
    added. ``fmt``: what lies in a page; raw numbers in it are of ``dtype``. ``bias [n, P * S]``, float32, is added to
    the scores; a token with a bias of ``HIDDEN`` is not seen. ``latent``: keys are wide, their prefix is the value.
    ``ragged``: lists may end early, with addresses of -1 (only with one KV head and no ``shift``).
    ``read`` gathers a range of the pages as dense keys and values ``[n, Hkv, pages * S, D]`` of ``dtype``, for whoever
    cannot walk them.

    The result is ``o [n, Hkv, G, Dv]`` in the basis of the stored values, and ``lse [n, Hkv, G]``, both float32.
    """

    q: Tensor
    arena: Tensor
    addr: Tensor
    shift: int
    fmt: PageFormat
    dtype: torch.dtype
    scale: float
    read: Callable[[slice], tuple[Tensor, Tensor]]
    bias: Tensor | None = None
    softcap: float | None = None
    latent: bool = False
    ragged: bool = False

    def bias_of(self, pages: slice) -> Tensor | None:
        """The biases ``[n, pages * S]`` of a range of the pages, those of pages that are not there `HIDDEN`."""
        size = self.fmt.block_size
        bias = None if self.bias is None else self.bias[:, pages.start * size : pages.stop * size]
        if not self.ragged:
            return bias
        gone = (self.addr[:, 0, pages] < 0).repeat_interleave(size, dim=1)
        bias = torch.zeros(gone.shape, device=gone.device) if bias is None else bias
        return bias.masked_fill(gone, HIDDEN)

    def evened(self) -> PagesCall:
        """The same call with lists of one length: pages that are not there are some other page, hidden."""
        if not self.ragged:
            return self
        bias = self.bias_of(slice(0, self.addr.shape[-1]))
        return replace(self, addr=self.addr.where(self.addr >= 0, self.addr.max()), bias=bias, ragged=False)


def unpack_with(registry: OpRegistry) -> Callable[[PagesCall], tuple[Tensor, Tensor]]:
    """The implementation that gathers and unpacks the pages and hands them to ``attend_dense`` of ``registry``.

    It unpacks at most `UNPACK_BYTES` at a time, whatever the context and the batch.
    """

    def unpack(call: PagesCall) -> tuple[Tensor, Tensor]:
        n, heads, pages = call.addr.shape
        page = call.fmt.block_size * (call.fmt.k.dim + call.fmt.v.dim) * call.dtype.itemsize
        most = UNPACK_BYTES // 8 if call.q.device.type == "cpu" else UNPACK_BYTES
        span = max(1, most // (n * heads * page))
        return merge([_unpack_span(call, slice(a, min(a + span, pages)), registry) for a in range(0, pages, span)])

    return unpack


def _unpack_span(call: PagesCall, pages: slice, registry: OpRegistry) -> Piece:
    k, v = call.read(pages)
    bias = call.bias_of(pages)
    if bias is not None:
        bias = bias[:, None, None]
    dense = DenseCall(q=call.q.to(call.dtype), k=k, v=v, scale=call.scale, bias=bias, softcap=call.softcap)
    o, lse = registry.select("attend_dense", dense).run(dense)
    return o.float(), lse
