"""The walk over pages and the merge of its spans, in Triton's language.

A row of codes is read as words of ``UNIT`` bytes. What stands at one place of every word is a *plane*: the codes of
dims that are ``UNIT`` apart. A plane is taken out of the words in registers, two codes at a time, and multiplied as it
is; nothing is interleaved, and the order of dims matters only where queries are read and outputs written.

A code alone in the low bits of a float16 is that number, times ``2**-24``, exactly; the place of a plane within its
byte is one more power of two. Queries are brought below 1, row by row, before they are rounded to float16, and so are,
tile by tile, the products of probability and scale; sums are float32. Raw keys and values of half precision are
multiplied by two halves of their factor, float32 ones in three passes of TF32.

Tokens and dims are the long side of every product and rows of queries the short one, of which a GPU's smallest has 8.

The module can be imported without Triton, but then nothing in it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["join_spans", "walk_pages"]

_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


def jit(function: _Kernel) -> _Kernel:
    """A kernel, or the Python function that it is where there is no Triton."""
    kernel: _Kernel = function if triton is None else triton.jit(function)
    return kernel


@jit
def _plane(words: tl.tensor, PLANE: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Codes of one plane of 16-bit ``words`` as the low bits of float16 numbers; raw numbers as they are."""
    if BITS == 0:
        return words
    else:
        PLACE: tl.constexpr = PLANE * BITS % 8
        SHIFT: tl.constexpr = PLANE * BITS - PLACE
        MASK: tl.constexpr = 0x00010001 * (2**BITS - 1 << PLACE)
        return tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; and.b32 $0, t, {MASK}; }}",
            "=r,r",
            [words.to(tl.int16)],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )


@jit
def _worth(PLANE: tl.constexpr, BITS: tl.constexpr) -> tl.constexpr:
    """What a code of a plane is to be multiplied by, once it is a float16 number."""
    return 1.0 if BITS == 0 else 2.0 ** (24 - PLANE * BITS % 8)


@jit
def _dims(word: tl.tensor, PLANE: tl.constexpr, BITS: tl.constexpr, ROW: tl.constexpr, UNIT: tl.constexpr) -> tl.tensor:
    """Which dim of a row of ``ROW`` bytes stands in a plane of each word."""
    if BITS == 0:
        return word
    else:
        PER_BYTE: tl.constexpr = 8 // BITS
        return word * UNIT + (PLANE // PER_BYTE + PLANE % PER_BYTE * ROW)


@jit
def _product(a: tl.tensor, b: tl.tensor, sums: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """``sums + a @ b`` in float32: ``b`` is float32 and rounded as codes or raw numbers ``a`` need it."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, sums, input_precision="tf32x3")
    elif BITS:
        return tl.dot(a, b.to(a.dtype), sums)
    else:
        high = b.to(a.dtype)
        return tl.dot(a, (b - high.to(tl.float32)).to(a.dtype), tl.dot(a, high, sums))


@jit
def _meta(arena: tl.tensor, place: tl.tensor, seen: tl.tensor) -> tl.tensor:
    """Scale and zero of the tokens whose meta is the 32-bit word ``place``; nought if not seen."""
    pair = tl.load(arena.to(tl.pointer_type(tl.int32)) + place, mask=seen, other=0)
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@jit
def _queries(
    q: tl.tensor, row: tl.tensor, rows: tl.tensor, word: tl.tensor,
    PLANES: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr, ROW: tl.constexpr, UNIT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Queries by planes ``[words, M]``, brought below 1; what they were divided by; the sums of their dims; and what
    their rounding takes from a product with middle codes.
    """
    most = row * 0.0
    for plane in tl.static_range(PLANES):
        dim = _dims(word, plane, BITS, ROW, UNIT)
        inside = (row[None, :] < rows) & (word[:, None] < ROW // UNIT) & (dim[:, None] < DIM)
        most = tl.maximum(most, tl.max(tl.abs(tl.load(q + row[None, :] * DIM + dim[:, None], inside, 0.0)), 0))
    most = tl.where(most > 0, most, 1.0)
    planes: tl.tuple = ()
    total, lost = row * 0.0, row * 0.0
    for plane in tl.static_range(PLANES):
        dim = _dims(word, plane, BITS, ROW, UNIT)
        inside = (row[None, :] < rows) & (word[:, None] < ROW // UNIT) & (dim[:, None] < DIM)
        part = tl.load(q + row[None, :] * DIM + dim[:, None], inside, 0.0) / most[None, :]
        total += tl.sum(part, 0)
        part *= _worth(plane, BITS) / _worth(0, BITS)
        if BITS:
            rounded = part.to(tl.float16).to(tl.float32)
            lost += tl.sum(part - rounded, 0) * (2.0 ** (BITS - 1) / _worth(plane, BITS))
        planes = planes + (part,)  # noqa: RUF005 - Triton's tuples have no star
    return planes, most, total, lost


@jit
def _scores(  # noqa: PLR0913 - what a kernel is compiled for comes as arguments
    queries: tl.tensor, arena: tl.tensor, page: tl.tensor, slot: tl.tensor, inside: tl.tensor, seen: tl.tensor,
    word: tl.tensor,
    TYPE: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr, ROW: tl.constexpr, CODES: tl.constexpr,
    META: tl.constexpr, UNIT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """``[N, M]``: products of the keys of a tile with the queries."""
    planes, norm, total, lost = queries
    place = tl.multiple_of((page + CODES) // UNIT, 16 // UNIT) + slot * (ROW // UNIT)
    words = tl.load(
        arena.to(tl.pointer_type(TYPE)) + (place[:, None] + word[None, :]),
        mask=inside[:, None] & (word[None, :] < ROW // UNIT),
        other=0,
    )
    s = tl.zeros((slot.shape[0], norm.shape[0]), tl.float32) + lost[None, :]
    for plane in tl.static_range(PLANES):
        s = _product(_plane(words, plane, BITS), planes[plane], s, BITS)
    if BITS:
        scale, zero = _meta(arena, (page + META) // 4 + slot, seen)
        s = s * (scale * _worth(0, BITS))[:, None] + total[None, :] * zero[:, None]
    return s * norm[None, :]


@jit
def _values(  # noqa: PLR0913 - what a kernel is compiled for comes as arguments
    p: tl.tensor, fade: tl.tensor, sums: tl.tensor, unit: tl.tensor, lift: tl.tensor, arena: tl.tensor,
    page: tl.tensor, slot: tl.tensor, inside: tl.tensor, seen: tl.tensor, word: tl.tensor,
    TYPE: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr, ROW: tl.constexpr, CODES: tl.constexpr,
    META: tl.constexpr, UNIT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """After one more tile: the sums of values by planes ``[words, M]``, their unit and the largest one so far, and the
    sums of zeros ``[M]``.
    """
    place = tl.multiple_of((page + CODES) // UNIT, 16 // UNIT) + slot * (ROW // UNIT)
    words = tl.load(
        arena.to(tl.pointer_type(TYPE)) + (place[None, :] + word[:, None]),
        mask=inside[None, :] & (word[:, None] < ROW // UNIT),
        other=0,
    )
    most, top = unit
    shrink = fade
    if BITS:
        scale, zero = _meta(arena, (page + META) // 4 + slot, seen)
        lift = lift * fade + tl.sum(p * zero[:, None], 0)
        # The largest scale of this tile becomes the unit of the sums; bounded from below, so that they stay finite.
        highest = tl.max(scale, 0)
        top = tl.maximum(top, highest)
        highest = tl.maximum(highest, top * 2.0**-24)
        highest = tl.where(highest > 0, highest, 1.0)
        p *= (scale * (1 / highest))[:, None]
        shrink = fade * (most / highest)
        most = highest
    else:
        words = tl.where(seen[None, :], words, 0.0)  # zero times the NaN of unused memory is NaN
    added: tl.tuple = ()
    for plane in tl.static_range(PLANES):
        # A matrix unit cuts off what does not fit beside its sums, which would add up over tiles: they are added here,
        # by a fused operation, since Triton would make one product of a product and a sum.
        part = _product(_plane(words, plane, BITS), p, tl.zeros(sums[plane].shape, tl.float32), BITS)
        added = added + (tl.fma(sums[plane], tl.broadcast_to(shrink[None, :], sums[plane].shape), part),)  # noqa: RUF005
    return added, (most, top), lift


@jit
def _write(  # noqa: PLR0913 - what a kernel is compiled for comes as arguments
    out: tl.tensor, row: tl.tensor, rows: tl.tensor, sums: tl.tensor, most: tl.tensor, lift: tl.tensor, mass: tl.tensor,
    word: tl.tensor,
    PLANES: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr, ROW: tl.constexpr, UNIT: tl.constexpr,
) -> None:  # fmt: skip
    """The means of the values, dims put in order."""
    share = 1.0 / tl.where(mass == 0, 1.0, mass)
    for plane in tl.static_range(PLANES):
        dim = _dims(word, plane, BITS, ROW, UNIT)
        inside = (row[None, :] < rows) & (word[:, None] < ROW // UNIT) & (dim[:, None] < DIM)
        mean = (sums[plane] * (most * _worth(plane, BITS)) + lift[None, :]) * share[None, :]
        tl.store(out + row[None, :] * DIM + dim[:, None], mean, inside)


@jit
def walk_pages(  # noqa: PLR0913 - what a kernel is compiled for comes as arguments
    q: tl.tensor, arena: tl.tensor, addr: tl.tensor, bias: tl.tensor, out: tl.tensor, lse: tl.tensor,
    rows: tl.tensor, heads: tl.tensor, pages: tl.tensor, span: tl.tensor, shift: tl.tensor, scale: tl.tensor,
    softcap: tl.tensor,
    K_TYPE: tl.constexpr, K_BITS: tl.constexpr, K_DIM: tl.constexpr, K_ROW: tl.constexpr, K_CODES: tl.constexpr,
    K_META: tl.constexpr, K_UNIT: tl.constexpr, K_WIDE: tl.constexpr, K_PLANES: tl.constexpr,
    V_TYPE: tl.constexpr, V_BITS: tl.constexpr, V_DIM: tl.constexpr, V_ROW: tl.constexpr, V_CODES: tl.constexpr,
    V_META: tl.constexpr, V_UNIT: tl.constexpr, V_WIDE: tl.constexpr, V_PLANES: tl.constexpr,
    SIZE: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
) -> None:  # fmt: skip
    """A span of ``span`` tokens of one (sequence, head), ``M`` rows of queries, in tiles of ``N`` tokens.

    ``q [units, rows, K_DIM]``, ``out [spans, units, rows, V_DIM]`` and ``lse [spans, units, rows]`` are float32.
    ``*_WIDE``: the words of a row, rounded up to a power of two. ``span`` is a multiple of ``N``.
    """
    part, unit = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2) * M + tl.arange(0, M)
    k_word, v_word = tl.arange(0, K_WIDE), tl.arange(0, V_WIDE)
    queries = _queries(q + unit.to(tl.int64) * rows * K_DIM, row, rows, k_word, K_PLANES, K_BITS, K_DIM, K_ROW, K_UNIT)
    best, mass, lift, measure = row * 0.0 - float("inf"), row * 0.0, row * 0.0, (1.0, 0.0)
    sums: tl.tuple = ()
    for _ in tl.static_range(V_PLANES):
        sums = sums + (tl.zeros((V_WIDE, M), tl.float32),)  # noqa: RUF005
    addr += unit.to(tl.int64) * pages
    bias += (unit // heads).to(tl.int64) * pages * SIZE
    end = tl.minimum((part + 1) * span, pages * SIZE)
    for start in range(part * span, end, N):
        token = start + tl.arange(0, N)
        inside = token < end
        if SIZE % N == 0:  # one page
            page = tl.multiple_of(tl.load(addr + start // SIZE) + shift, 16)
            slot = start % SIZE + tl.arange(0, N)
        else:
            page = tl.multiple_of(tl.load(addr + token // SIZE, mask=inside, other=0) + shift, 16)
            slot = token % SIZE
        seen = inside
        extra = tl.zeros((N,), tl.float32)
        if BIASED:
            extra = tl.load(bias + token, mask=inside, other=float("-inf"))
            seen = extra > -1e30
        s = scale * _scores(
            queries, arena, page, slot, inside, seen, k_word, K_TYPE, K_PLANES, K_BITS, K_ROW, K_CODES, K_META, K_UNIT
        )
        if CAPPED:
            s = softcap - 2 * softcap / (tl.exp(s * (2 / softcap)) + 1)  # softcap * tanh(s / softcap)
        s = tl.where(seen[:, None], (s + extra[:, None]) * 1.4426950408889634, float("-inf"))
        peak = tl.maximum(best, tl.max(s, 0))
        base = tl.where(peak == float("-inf"), 0.0, peak)
        p, fade = tl.exp2(s - base[None, :]), tl.exp2(best - base)
        best, mass = peak, mass * fade + tl.sum(p, 0)
        sums, measure, lift = _values(
            p, fade, sums, measure, lift, arena, page, slot, inside, seen, v_word,
            V_TYPE, V_PLANES, V_BITS, V_ROW, V_CODES, V_META, V_UNIT,
        )  # fmt: skip
    first = (part * tl.num_programs(1) + unit).to(tl.int64) * rows
    _write(out + first * V_DIM, row, rows, sums, measure[0], lift, mass, v_word, V_PLANES, V_BITS, V_DIM, V_ROW, V_UNIT)
    nothing = -3.4028234663852886e38  # finite, so that a merge weighs it with 0 and never makes NaN
    total = tl.where(mass == 0, nothing, (best + tl.log2(mass)) * 0.6931471805599453)
    tl.store(lse + first + row, total, row < rows)


@jit
def join_spans(
    parts: tl.tensor, logs: tl.tensor, out: tl.tensor, lse: tl.tensor, units: tl.tensor, spans: tl.tensor,
    DIM: tl.constexpr, WIDE: tl.constexpr, SPANS: tl.constexpr,
) -> None:  # fmt: skip
    """``WIDE`` dims of a row of ``out [units, DIM]``, and ``lse [units]``, from ``parts [spans, units, DIM]`` and
    ``logs [spans, units]``; spans rounded up to ``SPANS``.
    """
    unit = tl.program_id(0).to(tl.int64)
    span, dim = tl.arange(0, SPANS), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    held = tl.load(logs + span * units + unit, span < spans, float("-inf"))
    inside = (span[:, None] < spans) & (dim[None, :] < DIM)
    rows = tl.load(parts + (span[:, None] * units + unit) * DIM + dim[None, :], inside, 0.0)
    peak = tl.max(held, 0)
    weight = tl.exp(held - peak)
    mass = tl.sum(weight, 0)
    tl.store(out + unit * DIM + dim, tl.sum(rows * (weight / mass)[:, None], 0), dim < DIM)
    tl.store(lse + unit, peak + tl.log(mass))
