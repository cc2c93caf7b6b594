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
    # The outermost code stands for everything up to half a step beyond it.
    octaves = _octaves((rows.abs() / (half + 0.5)).amax(-1, keepdim=True) / _ROOM)
    finite = octaves < _NOT_FINITE  # false for NaN too
    meta = torch.where(finite, octaves, float(_NOT_FINITE)).clamp_min_(0)
    # Adding 1/2 and truncating rounds; the clamp takes off what float32 rounds beyond the last code.
    codes = (rows * torch.exp2(-meta / _STEPS_PER_OCTAVE) + half).add_(0.5).clamp_min_(0)
    codes = torch.minimum(codes, 2 * half).masked_fill_(~finite, 0).to(torch.uint8)
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
        stretch = torch.exp2(meta.float() / _STEPS_PER_OCTAVE).masked_fill_(meta == _NOT_FINITE, float("nan"))
        out *= stretch.to(dtype)
    return out


def _octaves(excess: Tensor) -> Tensor:
    """The stretches that take numbers this far beyond their band and its room."""
    return (excess.log2() * _STEPS_PER_OCTAVE).ceil()


@lru_cache(maxsize=1)
def stretch_tables() -> Tensor:
    """``[3, 256]`` float32, by the byte of meta: the largest excess that needs no more, what codes are multiplied by,
    and what decoded ones are. For native code, which then decides as `encode` does, to the bit.
    """
    meta = torch.arange(256, dtype=torch.float32)
    # The largest float for which the logarithm, as torch rounds it, gives no more: it is near the power of two.
    near = torch.exp2(meta / _STEPS_PER_OCTAVE).view(torch.int32)[:, None] + torch.arange(-64, 65, dtype=torch.int32)
    near = near.view(torch.float32)
    limit = torch.where(_octaves(near) <= meta[:, None], near, 0.0).amax(-1)
    stretch = torch.exp2(meta / _STEPS_PER_OCTAVE)
    stretch[_NOT_FINITE] = float("nan")
    return torch.stack((limit, torch.exp2(-meta / _STEPS_PER_OCTAVE), stretch))


@lru_cache(maxsize=64)
def _halves(fmt: BandFormat, device: torch.device) -> Tensor:
    """``[stored_dim]`` float32: the middle of each dim's codes."""
    middles = [(2**bits - 1) / 2 for bits, dims in fmt.bands for _ in range(dims)]
    return torch.tensor(middles, dtype=torch.float32, device=device)
