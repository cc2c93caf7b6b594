"""Decode attention over pages: the call, and the implementation in plain torch that unpacks them first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.formats import PageFormat
from kvfold.kernels.dense import DenseCall
from kvfold.kernels.registry import OpRegistry

__all__ = ["HIDDEN", "PagesCall", "unpack_with"]

HIDDEN = torch.finfo(torch.bfloat16).min
"""The bias of a token that must not be seen: finite in float32 and bfloat16."""


@dataclass(frozen=True, slots=True)
class PagesCall:
    """One decode attention: a query per sequence over its pages.

    ``q [n, Hkv, G, Dk]`` in the basis of the stored keys, in the model's dtype: the query heads that share a KV head
    are rows. ``arena``: uint8 ``[bytes]``. ``addr [n, Hkv, P]``, int64: byte offsets of pages, to each of which
    ``shift`` is added. ``fmt``: what lies in a page; raw numbers in it are of ``dtype``. ``bias [n, P * S]``, float32,
    is added to the scores; a token with a bias of ``HIDDEN`` is not seen. ``latent``: keys are wide, their prefix is
    the value. ``read`` gathers the pages as dense keys and values ``[n, Hkv, P * S, D]`` of ``dtype``, for whoever
    cannot walk them.

    The result is ``o [n, Hkv, G, Dv]``, in the dtype of ``q``, in the basis of the stored values, and ``lse
    [n, Hkv, G]``, float32.
    """

    q: Tensor
    arena: Tensor
    addr: Tensor
    shift: int
    fmt: PageFormat
    dtype: torch.dtype
    scale: float
    read: Callable[[], tuple[Tensor, Tensor]]
    bias: Tensor | None = None
    softcap: float | None = None
    latent: bool = False


def unpack_with(registry: OpRegistry) -> Callable[[PagesCall], tuple[Tensor, Tensor]]:
    """The implementation that gathers and unpacks the pages and hands them to ``attend_dense`` of ``registry``."""

    def unpack(call: PagesCall) -> tuple[Tensor, Tensor]:
        k, v = call.read()
        bias = call.bias
        if bias is not None:
            # float16 ends long before HIDDEN, and a mask must stay finite.
            least = torch.finfo(call.q.dtype).min
            bias = (bias.clamp_min(least) if least > HIDDEN else bias).to(call.q.dtype)[:, None, None]
        dense = DenseCall(q=call.q, k=k, v=v, scale=call.scale, bias=bias, softcap=call.softcap)
        result: tuple[Tensor, Tensor] = registry.select("attend_dense", dense).run(dense)
        return result

    return unpack
