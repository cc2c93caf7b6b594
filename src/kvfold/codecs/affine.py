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

With ``inner``, the levels do not reach the ends of the range but stand at the middles of ``2**bits`` equal cells:
nothing is further than half a cell from its level, so the law holds, with a scale that is smaller, at 2 bits by a
quarter. Keys of 2 bits are stored so, to whom that is worth much; values, whose outliers count in a mean, gain nothing,
nor do 4 bits. Encoding again what was so decoded narrows the range each time.

With ``projected``, scale and zero are stretched by ``x.x / x.decode(encode(x))`` of their group and rounded to the
nearest bfloat16: what is decoded then has the projection on ``x`` that ``x`` has itself. An error along a key falls on
all of its scores at once, and attention does not average it away. Keys of 4 and 2 bits are stored so; that is the norm
correction of TurboQuant's implementations, with the codes' own scale. (The bundled model diverges less than half as
much at 4 bits; values gain nothing.) Errors across ``x`` keep the law with the stretched scale; along it they are the
rounding of bfloat16.

Limit: float16 ends at 65504, and a zero or a value rounded past that decodes to infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.codecs.packing import pack_codes, unpack_codes
from kvfold.formats import VectorFormat

_SHRINK = 1.0 - 2.0**-16
_MOST_GAIN = 2.0
# The smallest scale: the smallest normal number, so that 1 / scale is finite. Constant groups get it.
_TINY = 2.0**-126


def encode(x: Tensor, fmt: VectorFormat, *, inner: bool = False, projected: bool = False) -> tuple[Tensor, Tensor]:
    """Rows ``x [..., dim]`` -> codes uint8 ``[..., code_bytes]`` and meta bfloat16 ``[..., groups, 2]`` (scale, zero).

    Computed in float32; ``inner``: see `quantize`; ``projected``: see the module. A group that holds NaN or infinity,
    or whose range overflows float32, decodes to NaN; no other group is touched by it.
    """
    grouped = pad(x.float(), fmt).unflatten(-1, (fmt.groups, fmt.group_width))
    steps, scale, zero = quantize(grouped, -1, fmt.bits, inner=inner)
    if projected:
        scale, zero = _project(grouped, steps, scale, zero)
    meta = torch.empty((*x.shape[:-1], fmt.groups, 2), dtype=torch.bfloat16, device=x.device)
    meta[..., :1] = scale
    meta[..., 1:] = zero
    return pack_codes(steps.flatten(-2), fmt.bits), meta


def _project(x: Tensor, steps: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of the groups ``x [..., width]``, stretched so that ``found . x = x . x`` for what is decoded."""
    found = torch.addcmul(zero, steps.float(), scale)
    gain = x.square().sum(-1, keepdim=True) / found.mul_(x).sum(-1, keepdim=True)
    # Constant zeros, numbers beyond float32 and NaN have no such gain; a far one says that the codes say nothing.
    gain = torch.where((gain > 1 / _MOST_GAIN) & (gain < _MOST_GAIN), gain, 1.0)
    return scale * gain, zero * gain


def pad(rows: Tensor, fmt: VectorFormat) -> Tensor:
    """Rows ``[..., dim]`` with the last dim repeated, ``[..., stored_dim]``."""
    missing = fmt.stored_dim - fmt.dim
    return torch.cat((rows, rows[..., -1:].expand(*rows.shape[:-1], missing)), dim=-1) if missing else rows


def quantize(x: Tensor, dim: int, bits: int, *, inner: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8, one a number) of ``x`` (float32) with a scale and a zero for all numbers along ``dim``: float32
    values of bfloat16 numbers, that axis kept. Where a number is not finite, neither is the scale.

    The levels reach both ends of the range; ``inner`` puts them at the middles of equal cells instead.
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    levels = (1 << bits) - 1
    if inner:
        # Half a cell from the low end, and half a cell to the high one.
        zero = _floor_bfloat16((high - low).mul_(0.5 / (levels + 1)).add_(low))
        share = 1 / (levels + 0.5)
    else:
        zero, share = _floor_bfloat16(low), _SHRINK / levels
    scale = _ceil_bfloat16((high - zero).mul_(share).clamp_min_(_TINY))
    # (x - zero) / scale >= -1/2: adding 1/2 and truncating rounds. What is above the last code is so by the rounding of
    # float32, or is infinite: its bits must not spill into its neighbours'.
    steps = (x - zero).mul_(scale.reciprocal()).add_(0.5).clamp_max_(levels).to(torch.uint8)
    # Zero times the range is zero in a finite group and NaN in any other: seen, not hidden, even where the integer
    # arithmetic of the rounding has carried a NaN over into a number (which NaN a device makes is its own affair).
    return steps, torch.add(scale, high - low, alpha=0), zero


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
