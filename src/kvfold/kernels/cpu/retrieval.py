"""Bounds of pages and the choice among them on a CPU, natively: read where they lie, one call a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.errors import UnsupportedError
from kvfold.kernels import cpu
from kvfold.kernels.bounds import BoundsCall
from kvfold.kernels.cpu.threads import thread_count

__all__ = ["bound", "choose", "refuses"]


def refuses(call: BoundsCall) -> str | None:
    """Why the native code cannot take a call; None if it can."""
    if call.q.device.type != "cpu":
        return f"needs tensors on the CPU, got {call.q.device.type}"
    return cpu.available()


def bound(call: BoundsCall, variant: int = 0) -> Tensor:
    """The bounds ``[n, Hkv, P]``, float32. ``variant`` counts in `kvfold.kernels.cpu.variants`."""
    out = torch.empty(call.addr.shape, dtype=torch.float32)
    _run(call, out, None, 0, variant)
    return out


def choose(call: BoundsCall, variant: int = 0) -> Tensor:
    """Places ``[n, Hkv, k]`` of the ``call.pages`` greatest bounds, rising; -1 behind them where there are fewer."""
    n, heads, pages = call.addr.shape
    count = min(call.pages, pages)
    out = torch.empty((n, heads, count), dtype=torch.int64)
    _run(call, None, out, count, variant)
    return out


def _run(call: BoundsCall, bounds: Tensor | None, chosen: Tensor | None, count: int, variant: int) -> None:
    reason = refuses(call)
    if reason is not None:
        raise UnsupportedError("native bounds of pages", [reason])
    native = cpu.extension()
    n, heads, rows, dims = call.q.shape
    addr, q, bias = call.addr.contiguous(), call.q.float().contiguous(), call.bias
    if addr.shape[:2] != (n, heads) or addr.dtype != torch.int64 or dims != call.fmt.summary_dims:
        raise ValueError(f"queries {tuple(q.shape)} and {addr.dtype} addresses {tuple(addr.shape)} do not fit")
    if bias is not None:
        bias = bias.float().contiguous()
        if bias.shape != addr.shape:
            raise ValueError(f"biases {tuple(bias.shape)} do not fit addresses {tuple(addr.shape)}")
    native.bound_pages(
        q.data_ptr(), call.arena.data_ptr(), call.arena.numel(), addr.data_ptr(), call.shift, call.fmt.summary_offset,
        0 if bias is None else bias.data_ptr(), 0 if bounds is None else bounds.data_ptr(),
        0 if chosen is None else chosen.data_ptr(), count, n, heads, rows, dims, addr.shape[-1],
        call.scale, call.softcap or 0.0, thread_count(), variant,
    )  # fmt: skip
