"""Pages in plain torch, on any device: the truth that native code is held to, and the way where there is none.

A store sees the arena through overlapping windows: a strided view whose row ``i`` starts ``i`` steps into the arena and
is as long as a region of a page. Gathering regions is then one ``index_select``, and scattering them one
``index_copy_``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.codecs import affine, banded, channels
from kvfold.codecs.rotation import Basis
from kvfold.formats import PAGE_ALIGN, BandFormat, PageFormat, VectorFormat
from kvfold.kernels.cpu.rows import SideCode
from kvfold.kernels.runs import TokenRuns

__all__ = ["PlainPages", "PlainSide", "Windows", "parts", "work_rows"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def work_rows(device: torch.device) -> int:
    """Rows to encode at a time: on a CPU as many as stay in its cache between passes, elsewhere a bound on memory."""
    return 8192 if device.type == "cpu" else 1 << 20


def parts(count: int, size: int, unit: int = 1) -> list[slice]:
    """``0 .. count`` in slices of at most ``size``, in whole ``units`` (of one, if that is more)."""
    size = max(1, size // unit) * unit
    return [slice(start, start + size) for start in range(0, count, size)]


def _unit(*byte_counts: int) -> int:
    """The widest integer (bytes: 8, 4, 2 or 1) that divides all these byte counts."""
    return next(size for size in (8, 4, 2, 1) if all(count % size == 0 for count in byte_counts))


class Windows:
    """All runs of ``span`` bytes that start ``offset`` bytes after a multiple of ``step``, as rows of integers."""

    def __init__(self, arena: Tensor, span: int, *, step: int, offset: int = 0) -> None:
        size = _unit(span, step, offset or 8)
        self.step = step
        self.dtype = _INTEGERS[size]
        words = arena[: arena.numel() // size * size].view(self.dtype)
        count = max(0, (arena.numel() - offset - span) // step + 1)
        start = words.storage_offset() + offset // size
        self.rows = words.as_strided((count, span // size), (step // size, 1), start)

    def take(self, byte: Tensor) -> Tensor:
        """The runs at ``byte [N]`` (multiples of ``step``): integers ``[N, span / itemsize]``, a copy."""
        return self.rows.index_select(0, byte // self.step)

    def put(self, byte: Tensor, values: Tensor) -> None:
        """Write ``values [N, ...]``, rows of ``span`` bytes in any dtype, to the runs at ``byte [N]``."""
        flat = values.flatten(1).contiguous()
        if flat.storage_offset() * flat.itemsize % self.dtype.itemsize:
            flat = flat.clone()
        # Whole words of integers: eight-byte moves are twice as fast here as two-byte ones, and keep every bit.
        self.rows.index_copy_(0, byte // self.step, flat.view(self.dtype))

    def clear(self, byte: Tensor) -> None:
        """Write zeros to the runs at ``byte [N]``."""
        self.rows.index_fill_(0, byte // self.step, 0)


class _Region:
    """One region of every page: ``block_size`` rows of ``row_bytes`` bytes, ``offset`` bytes into the page."""

    def __init__(self, arena: Tensor, offset: int, row_bytes: int, block_size: int) -> None:
        self.row_bytes = row_bytes
        self.pages = Windows(arena, block_size * row_bytes, step=PAGE_ALIGN, offset=offset)
        self.rows = Windows(arena, row_bytes, step=_unit(row_bytes), offset=offset)

    def put_rows(self, addr: Tensor, slot: Tensor, values: Tensor) -> None:
        self.rows.put(torch.add(addr, slot, alpha=self.row_bytes), values)

    def take_rows(self, addr: Tensor, slot: Tensor) -> Tensor:
        return self.rows.take(torch.add(addr, slot, alpha=self.row_bytes))


class PlainSide:
    """The keys or the values of a page format: one region of codes and, when quantized, one of meta.

    Of ``keys``, 2-bit levels stand inside of their range and 4 and 2 bits keep their projection: see `affine`.
    """

    def __init__(
        self,
        arena: Tensor,
        fmt: VectorFormat | BandFormat,
        basis: Basis,
        offsets: tuple[int, int],
        block_size: int,
        *,
        keys: bool = False,
    ) -> None:
        self.fmt = fmt
        self.basis = basis
        self.block_size = block_size
        bits = fmt.bits if keys and isinstance(fmt, VectorFormat) else None
        self.inner = bits == 2
        self.projected = bits in (4, 2)
        self.codes = _Region(arena, offsets[0], fmt.code_bytes, block_size)
        # What belongs to the page as a whole counts as one row.
        rows = block_size if fmt.movable else 1
        self.meta = _Region(arena, offsets[1], fmt.page_meta_bytes(block_size) // rows, rows) if fmt.quantized else None

    def code(self) -> SideCode:
        """The same for the native kernels."""
        stretch = banded.stretch_tables(torch.device("cpu")) if isinstance(self.fmt, BandFormat) else None
        return SideCode(self.fmt, self.basis.turn, self.inner, self.projected, stretch)

    def encode(self, x: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        """Codes and meta of rows or pages."""
        # Rotated in float32: bfloat16 would cost as much error as the rounding to an 8-bit code.
        rows = self.basis.store(x.float(), layer)
        if isinstance(self.fmt, BandFormat):
            return banded.encode(rows, self.fmt)
        if self.fmt.movable:
            return affine.encode(rows, self.fmt, inner=self.inner, projected=self.projected)
        return channels.encode(rows, self.fmt, inner=self.inner)

    def write_rows(self, addr: Tensor, slot: Tensor, x: Tensor, layer: int, heads: int) -> None:
        """Rows ``x [N, dim]`` into slots of pages."""
        if self.meta is None:
            self.codes.put_rows(addr, slot, x)
            return
        for part in parts(addr.numel(), work_rows(x.device), heads):
            codes, meta = self.encode(x[part], layer)
            self.codes.put_rows(addr[part], slot[part], codes)
            self.meta.put_rows(addr[part], slot[part], meta)

    def write_pages(self, addr: Tensor, x: Tensor, layer: int | None, unit: int) -> None:
        """Whole pages ``x [P, S, dim]``; heads (without ``layer`` also layers) begin anew after ``unit`` pages."""
        if self.meta is None:
            self.codes.pages.put(addr, x)
            return
        for part in parts(addr.numel(), work_rows(x.device) // self.block_size, unit):
            codes, meta = self.encode(x[part], layer)
            self.codes.pages.put(addr[part], codes)
            self.meta.pages.put(addr[part], meta)

    def read(self, addr: Tensor, dtype: torch.dtype) -> Tensor:
        """Pages ``addr [..., P]`` -> ``[..., P * block_size, stored dim]`` in ``dtype``, in the stored basis."""
        lead = (*addr.shape[:-1], addr.shape[-1] * self.block_size)
        flat = addr.reshape(-1)
        found = self.codes.pages.take(flat)
        if self.meta is None:
            return found.view(dtype).view(*lead, self.fmt.dim)
        codes = found.view(torch.uint8).view(*lead, self.fmt.code_bytes)
        meta = self.meta.pages.take(flat)
        if isinstance(self.fmt, BandFormat):
            return banded.decode(codes, meta.view(torch.uint8).view(*lead, 1), self.fmt, dtype)
        if not self.fmt.movable:
            pages = codes.view(-1, self.block_size, self.fmt.code_bytes)
            scales = meta.view(torch.bfloat16).view(-1, 2, self.fmt.stored_dim)
            return channels.decode(pages, scales, self.fmt, dtype).view(*lead, self.fmt.dim)
        return affine.decode(codes, meta.view(torch.bfloat16).view(*lead, self.fmt.groups, 2), self.fmt, dtype)

    def decode(self, addr: Tensor, dtype: torch.dtype, layer: int | None) -> Tensor:
        """Pages ``addr [P]`` -> ``[P, block_size, dim]`` in the original basis."""
        # Only a rotated side gains from float32: rotating back in a narrower dtype would round twice.
        stored = self.read(addr, dtype if self.basis.is_identity else torch.float32)
        pages = stored.view(addr.numel(), self.block_size, stored.shape[-1])
        return self.basis.restore(pages, layer).to(dtype)

    def copy_rows(self, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> None:
        """Stored rows from (addresses, slots) to others."""
        for region in (self.codes, self.meta):
            if region is not None:
                region.put_rows(*target, region.take_rows(*source))


class PlainPages:
    """The pages of one format in one arena. Methods are those of `kvfold.codecs.pages.PageStore` and mean the same."""

    def __init__(
        self, arena: Tensor, fmt: PageFormat, dtypes: tuple[torch.dtype, torch.dtype], bases: tuple[Basis, Basis],
        heads: int, layers: int,
    ) -> None:  # fmt: skip
        """``dtypes``: of the model, and of what `read_k` and `read_v` return."""
        self.dtype, self.read_dtype = dtypes
        self.fmt, self.heads, self.layers = fmt, heads, layers
        self.k = PlainSide(arena, fmt.k, bases[0], (fmt.k_codes_offset, fmt.k_meta_offset), fmt.block_size, keys=True)
        self.v = PlainSide(arena, fmt.v, bases[1], (fmt.v_codes_offset, fmt.v_meta_offset), fmt.block_size)

    def write_runs(self, runs: TokenRuns, k: Tensor, v: Tensor, layer: int) -> None:
        """``k [N, Hkv, Dk]`` and ``v [N, Hkv, Dv]`` of a step's tokens into the slots of ``runs``."""
        addr, slot, rows = runs.index
        if rows is not None:
            k, v = k.index_select(0, rows), v.index_select(0, rows)
        addr = addr + layer * runs.layer_bytes
        if self.fmt.movable:
            self.write_rows(addr.reshape(-1), slot.reshape(-1), k.flatten(0, 1), v.flatten(0, 1), layer)
            return
        # [N, Hkv, D] -> [N / S * Hkv, S, D]
        size = self.fmt.block_size
        k, v = (x.unflatten(0, (-1, size)).transpose(1, 2).flatten(0, 1) for x in (k, v))
        self.write_pages(addr[::size].reshape(-1), k, v, layer)

    def write_rows(self, addr: Tensor, slot: Tensor, k: Tensor, v: Tensor, layer: int) -> None:
        """See `PageStore`."""
        self.k.write_rows(addr, slot, k, layer, self.heads)
        self.v.write_rows(addr, slot, v, layer, self.heads)

    def write_pages(self, addr: Tensor, k: Tensor, v: Tensor, layer: int | None) -> None:
        """See `PageStore`."""
        unit = self.heads * (self.layers if layer is None else 1)
        self.k.write_pages(addr, k, layer, unit)
        self.v.write_pages(addr, v, layer, unit)

    def read_k(self, addr: Tensor) -> Tensor:
        """See `PageStore`."""
        return self.k.read(addr, self.read_dtype)

    def read_v(self, addr: Tensor) -> Tensor:
        """See `PageStore`."""
        return self.v.read(addr, self.read_dtype)

    def decode_pages(self, addr: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        """See `PageStore`."""
        return self.k.decode(addr, self.dtype, layer), self.v.decode(addr, self.dtype, layer)

    def decode_keys(self, addr: Tensor, layer: int | None, *, values: bool) -> Tensor:
        """See `PageStore`."""
        # A raw side is read as the numbers it holds.
        decoded = [
            side.decode(addr, torch.float32 if side.fmt.quantized else self.dtype, layer).float()
            for side in ((self.k, self.v) if values else (self.k,))
        ]
        return torch.cat(decoded, dim=-1) if values else decoded[0]

    def copy_rows(self, src_addr: Tensor, src_slot: Tensor, dst_addr: Tensor, dst_slot: Tensor) -> None:
        """See `PageStore`."""
        self.k.copy_rows((src_addr, src_slot), (dst_addr, dst_slot))
        self.v.copy_rows((src_addr, src_slot), (dst_addr, dst_slot))
