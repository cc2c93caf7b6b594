"""The banded code: every kept dim of a calibrated basis has a static step of one, and a token may stretch all of them.

``x ~ stretch * (code - (2**bits - 1) / 2)``, with the bits of the dim's band. The basis scales each dim so that the
best static step is one (`kvfold.codecs.basis`); ``stretch = 2**(m / 8)``, ``m`` the one byte of meta, is the smallest
that brings every kept dim of the token within a quarter of its band's range beyond it, and is 1 (``m = 0``) for almost
all tokens. It is what keeps texts unlike those of the calibration from being clipped.

The law, per kept element of a finite row: ``|x - decode(encode(x))| <= stretch / 2`` within the band's range, and at
most an eighth of ``stretch * 2**bits`` more beyond it, to the rounding of float32 and of the dtype that is decoded in.
A row with NaN or infinity, or beyond 2**31 steps, decodes to NaN.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kvfold.codecs.packing import pack_codes, unpack_codes
from kvfold.formats import BandFormat

__all__ = ["decode", "encode", "stretch_tables"]

_STEPS_PER_OCTAVE = 8
_ROOM = 1.25  # how far beyond its band a number may lie and be clipped, instead of stretching its token
_NOT_FINITE = 255  # decodes to NaN


def encode(x: Tensor, fmt: BandFormat) -> tuple[Tensor, Tensor]:
    """Rows ``x [..., stored_dim]`` -> codes uint8 ``[..., code_bytes]`` and meta uint8 ``[..., 1]``."""
    rows = x.float()
    half = _halves(fmt, x.device)
    limit, shrink, _ = stretch_tables(x.device)
    # The outermost code stands for everything up to half a step beyond it.
    excess = (rows.abs() / (half + 0.5)).amax(-1, keepdim=True) / _ROOM
    meta = torch.bucketize(excess, limit[:_NOT_FINITE])  # the first that takes it; NaN goes behind them all
    # Adding 1/2 and truncating rounds; the clamp takes off what float32 rounds beyond the last code.
    codes = (rows * shrink[meta] + half).add_(0.5).clamp_min_(0)
    codes = torch.minimum(codes, 2 * half).masked_fill_(meta == _NOT_FINITE, 0).to(torch.uint8)
    parts = codes.split([dims for _, dims in fmt.bands], dim=-1)
    packed = [pack_codes(part, bits) for part, (bits, _) in zip(parts, fmt.bands, strict=True)]
    return torch.cat(packed, dim=-1), meta.to(torch.uint8)


def decode(codes: Tensor, meta: Tensor, fmt: BandFormat, dtype: torch.dtype) -> Tensor:
    """Codes ``[..., code_bytes]`` and meta ``[..., 1]`` -> rows ``[..., stored_dim]`` in ``dtype``, in the basis."""
    out = torch.empty((*codes.shape[:-1], fmt.stored_dim), dtype=dtype, device=codes.device)
    byte = dim = 0
    for bits, dims in fmt.bands:
        width = bits * dims // 8
        unpack_codes(codes[..., byte : byte + width], bits, out[..., dim : dim + dims])
        byte, dim = byte + width, dim + dims
    # Codes less their middle are half-integers below 128: exact in every dtype.
    out -= _halves(fmt, codes.device).to(dtype)
    if bool(meta.any()):
        out *= stretch_tables(codes.device)[2][meta.long()].to(dtype)
    return out


@lru_cache(maxsize=8)
def stretch_tables(device: torch.device) -> Tensor:
    """``[3, 256]`` float32, by the byte of meta: the largest excess it takes, what rows are multiplied by, and what
    decoded ones are. Tables, because logarithms and powers are rounded differently from device to device.
    """
    exact = torch.exp2(torch.arange(256, dtype=torch.float64) / _STEPS_PER_OCTAVE)
    stretch = exact.float()
    limit = torch.where(stretch > exact, stretch.nextafter(torch.zeros(())), stretch)
    shrink = exact.reciprocal().float()
    stretch[_NOT_FINITE] = float("nan")
    return torch.stack((limit, shrink, stretch)).to(device)


@lru_cache(maxsize=64)
def _halves(fmt: BandFormat, device: torch.device) -> Tensor:
    """``[stored_dim]`` float32: the middle of each dim's codes."""
    middles = [(2**bits - 1) / 2 for bits, dims in fmt.bands for _ in range(dims)]
    return torch.tensor(middles, dtype=torch.float32, device=device)
