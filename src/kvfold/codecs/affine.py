"""The affine code: per token and per group of dims, ``x ~ zero + scale * code``.

Layout of a row of ``D'`` = ``fmt.stored_dim`` dims: ``8 / bits`` dims share a byte, and dim ``j`` shares it with dims
``j + D'/2`` (4 bits) or ``j + D'/4, j + 2D'/4, j + 3D'/4`` (2 bits), from low to high bits. Unpacking therefore
writes whole contiguous planes and never interleaves. Dims past ``fmt.dim`` are padding: they repeat the last real
dim, so they never widen a range.

The law, per element of a finite row, with ``scale`` the stored scale of its group:
``|x - decode(encode(x))| <= scale / 2`` (`error_bound`; to float32 rounding, 2**-12 of it) plus half a unit in the last
place of the decoded value in the dtype it is decoded in. It holds because ``zero`` is rounded down and ``scale`` up to
bfloat16, so that nothing is clipped. (A scale within a factor of 1 + 2**-16 above a bfloat16 number counts as that
number: the top code then stands for 2**-16 * 255 < 1/2 of a step more, so the law is untouched.)

Encoding what was decoded in float32 never widens a group: its zero does not fall, its scale does not rise (as long as
zero is below 2**16 scales; beyond, float32 itself rounds). At 4 and 2 bits, in groups where code 0 is in use, codes and
meta come back the same; at 8 bits the bfloat16 scale may leave up to two of the 256 codes unused, and the second
encoding may then pick a finer scale.

Limit: float16 ends at 65504, and a zero or a value rounded past that decodes to infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.codecs.packing import pack_codes, unpack_codes
from kvfold.formats import VectorFormat

_SHRINK = 1.0 - 2.0**-16
# The smallest scale: the smallest normal number, so that 1 / scale is finite. Constant groups get it.
_TINY = 2.0**-126


def encode(x: Tensor, fmt: VectorFormat) -> tuple[Tensor, Tensor]:
    """Rows ``x [..., dim]`` -> codes uint8 ``[..., code_bytes]`` and meta bfloat16 ``[..., groups, 2]`` (scale, zero).

    Computed in float32. A group that holds NaN or infinity, or whose range overflows float32, decodes to NaN; no other
    group is touched by it.
    """
    rows = x.float()
    if fmt.stored_dim > fmt.dim:
        rows = torch.cat((rows, rows[..., -1:].expand(*rows.shape[:-1], fmt.stored_dim - fmt.dim)), dim=-1)
    grouped = rows.unflatten(-1, (fmt.groups, fmt.group_width))
    low = grouped.amin(-1, keepdim=True)
    high = grouped.amax(-1, keepdim=True)
    levels = (1 << fmt.bits) - 1
    zero = _floor_bfloat16(low)
    scale = _ceil_bfloat16((high - zero).mul_(_SHRINK / levels).clamp_min_(_TINY))
    # zero <= x, and (x - zero) / scale <= levels + 1/2: adding 1/2 and truncating rounds, and needs no clamp.
    steps = (grouped - zero).mul_(scale.reciprocal()).add_(0.5).to(torch.uint8)
    meta = torch.empty((*x.shape[:-1], fmt.groups, 2), dtype=torch.bfloat16, device=x.device)
    # Zero times the range is zero in a finite group and NaN in any other: seen, not hidden, even where the integer
    # arithmetic of the rounding has carried a NaN over into a number (which NaN a device makes is its own affair).
    meta[..., :1] = torch.add(scale, high - low, alpha=0)
    meta[..., 1:] = zero
    return pack_codes(steps.flatten(-2), fmt.bits), meta


def decode(codes: Tensor, meta: Tensor, fmt: VectorFormat, dtype: torch.dtype) -> Tensor:
    """Codes ``[..., code_bytes]`` and meta ``[..., groups, 2]`` -> rows ``[..., dim]`` in ``dtype``, still rotated."""
    out = torch.empty((*codes.shape[:-1], fmt.dim), dtype=dtype, device=codes.device)
    unpack_into(codes, meta, fmt, out)
    return out


def unpack_into(codes: Tensor, meta: Tensor, fmt: VectorFormat, out: Tensor) -> None:
    """`decode` into ``out [..., dim]`` (bfloat16, float16 or float32), rounded once to its dtype."""
    unpack_codes(codes, fmt.bits, out)
    if out.device.type == "cpu" and out.is_contiguous() and fmt.stored_dim == fmt.dim and out.numel():
        _scale_rows(out.view(-1, fmt.group_width), meta.reshape(-1, 2))
        return
    for group in range(fmt.groups):
        part = out[..., group * fmt.group_width : (group + 1) * fmt.group_width]
        scale, zero = meta[..., group, :1].float(), meta[..., group, 1:].float()
        torch.addcmul(zero, part, scale, out=part)  # float32 inside, rounded once


def _scale_rows(rows: Tensor, meta: Tensor) -> None:
    """``rows [R, width] = rows * scale + zero`` in place, with ``meta [R, 2]``: one pass, one rounding.

    This is what batch normalisation does at inference with rows as channels of mean 0 and variance 1. On a CPU it is
    PyTorch's only such kernel that is vectorised: a product and a sum that broadcast take twice the time and, in
    bfloat16, round twice; addcmul takes five times as long.
    """
    scale, zero = meta.t().contiguous().float().unbind(0)  # strided channels would fall off the vectorised path
    mean, variance = torch.zeros_like(scale), torch.ones_like(scale)
    channels = rows.unsqueeze(0)
    unused = rows.new_empty(0, dtype=torch.float32)
    torch.ops.aten.native_batch_norm.out(
        channels, scale, zero, mean, variance, False, 0.0, 0.0, out=channels, save_mean=unused, save_invstd=unused
    )


def error_bound(meta: Tensor, fmt: VectorFormat) -> Tensor:
    """``[..., dim]`` float32: half a step of each element's group, the bound of the code itself."""
    return (meta[..., 0].float() * 0.5).repeat_interleave(fmt.group_width, dim=-1)[..., : fmt.dim]


def _floor_bfloat16(x: Tensor) -> Tensor:
    """float32 rounded down to a bfloat16 number (kept as float32). Bit arithmetic: negative grows in magnitude."""
    bits = x.view(torch.int32)
    return ((bits + ((bits >> 31) & 0xFFFF)) & -0x10000).view(torch.float32)


def _ceil_bfloat16(x: Tensor) -> Tensor:
    """Positive float32 rounded up to a bfloat16 number (kept as float32)."""
    return ((x.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
