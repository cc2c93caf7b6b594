"""Codes of less than a byte, packed by halves or quarters: unpacking writes whole contiguous planes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_codes", "unpack_codes"]


def pack_codes(steps: Tensor, bits: int) -> Tensor:
    """One code a byte ``[..., n]`` -> ``[..., n * bits / 8]``, by halves or quarters."""
    planes = steps.chunk(8 // bits, dim=-1)
    packed = planes[0]
    for index, plane in enumerate(planes[1:], start=1):
        # A sum instead of shift and or: the same bits in one vectorised pass.
        packed = torch.add(packed, plane, alpha=1 << (index * bits))
    return packed


def unpack_codes(codes: Tensor, bits: int, out: Tensor) -> None:
    """The bare codes, as numbers 0 .. 2**bits - 1, into ``out [..., dim]`` (as many of them as it has room for)."""
    plane = codes.shape[-1]
    planes = 8 // bits
    for index in range(planes):
        start = index * plane
        width = min(plane, out.shape[-1] - start)
        if width <= 0:
            return
        values = codes >> (index * bits) if index else codes
        if index < planes - 1:
            values = values & ((1 << bits) - 1)
        out[..., start : start + width] = values[..., :width]
