"""The affine code by channels: per page and dim, ``x ~ zero + scale * code``, over all tokens of the page.

Keys have channels that are large or far from zero in every token; a scale of their own keeps them from widening the
others. The codes of a token are laid out as in `kvfold.codecs.affine`, but mean something in their own page alone: such
pages are written whole and cannot be taken apart.

The law is that of the affine code, with the scale of the element's channel (`error_bound`). A channel of a page that
holds NaN or infinity decodes to NaN; no other channel is touched by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.codecs.affine import pad, quantize
from kvfold.codecs.packing import pack_codes, unpack_codes
from kvfold.formats import VectorFormat

__all__ = ["decode", "encode", "error_bound"]


def encode(x: Tensor, fmt: VectorFormat, *, inner: bool = False) -> tuple[Tensor, Tensor]:
    """Pages ``x [..., S, dim]`` -> codes uint8 ``[..., S, code_bytes]`` and meta bfloat16 ``[..., 2, stored_dim]``: a
    row of scales and a row of zeros.

    Computed in float32. ``inner``: see `quantize`.
    """
    steps, scale, zero = quantize(pad(x.float(), fmt), -2, fmt.bits, inner=inner)
    return pack_codes(steps, fmt.bits), torch.cat((scale, zero), dim=-2).bfloat16()


def decode(codes: Tensor, meta: Tensor, fmt: VectorFormat, dtype: torch.dtype) -> Tensor:
    """Codes ``[..., S, code_bytes]`` and meta ``[..., 2, stored_dim]`` -> pages ``[..., S, dim]`` in ``dtype``, still
    rotated.
    """
    out = torch.empty((*codes.shape[:-1], fmt.dim), dtype=torch.float32, device=codes.device)
    unpack_codes(codes, fmt.bits, out)
    scale, zero = meta[..., : fmt.dim].float().split(1, dim=-2)
    # In float32 and rounded once; in bfloat16 the sum would take twice the time.
    return torch.addcmul(zero, out, scale, out=out).to(dtype)


def error_bound(meta: Tensor, fmt: VectorFormat) -> Tensor:
    """``[..., 1, dim]`` float32: half a step of each channel."""
    return meta[..., :1, : fmt.dim].float() * 0.5
