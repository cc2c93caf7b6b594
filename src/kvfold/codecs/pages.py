"""Pages in the arena: writing rows and whole pages, reading them for attention, moving them.

Every address is an int64 byte offset of a page in the arena, a multiple of 64. A store sees the arena through
overlapping windows: a strided view whose row ``i`` starts ``i`` steps into the arena and is as long as a region of a
page. Gathering regions is then one ``index_select``, and scattering them one ``index_copy_``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.codecs import affine, banded, channels
from kvfold.codecs.rotation import Basis, Rotation
from kvfold.formats import PAGE_ALIGN, BandFormat, PageFormat, VectorFormat

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _work_rows(device: torch.device) -> int:
    """Rows to encode at a time: on a CPU as many as stay in its cache between passes, elsewhere a bound on memory."""
    return 8192 if device.type == "cpu" else 1 << 20


def _parts(count: int, size: int, unit: int = 1) -> list[slice]:
    """``0 .. count`` in slices of at most ``size``, in whole ``units`` (of one, if that is more)."""
    size = max(1, size // unit) * unit
    return [slice(start, start + size) for start in range(0, count, size)]


def _unit(*byte_counts: int) -> int:
    """The widest integer (bytes: 8, 4, 2 or 1) that divides all these byte counts."""
    return next(size for size in (8, 4, 2, 1) if all(count % size == 0 for count in byte_counts))


class _Windows:
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
        self.pages = _Windows(arena, block_size * row_bytes, step=PAGE_ALIGN, offset=offset)
        self.rows = _Windows(arena, row_bytes, step=_unit(row_bytes), offset=offset)

    def put_rows(self, addr: Tensor, slot: Tensor, values: Tensor) -> None:
        self.rows.put(torch.add(addr, slot, alpha=self.row_bytes), values)

    def take_rows(self, addr: Tensor, slot: Tensor) -> Tensor:
        return self.rows.take(torch.add(addr, slot, alpha=self.row_bytes))


class _Side:
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

    def encode(self, x: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        # Rotated in float32: bfloat16 would cost as much error as the rounding to an 8-bit code.
        rows = self.basis.store(x.float(), layer)
        if isinstance(self.fmt, BandFormat):
            return banded.encode(rows, self.fmt)
        if self.fmt.movable:
            return affine.encode(rows, self.fmt, inner=self.inner, projected=self.projected)
        return channels.encode(rows, self.fmt, inner=self.inner)

    def write_rows(self, addr: Tensor, slot: Tensor, x: Tensor, layer: int, heads: int) -> None:
        if self.meta is None:
            self.codes.put_rows(addr, slot, x)
            return
        for part in _parts(addr.numel(), _work_rows(x.device), heads):
            codes, meta = self.encode(x[part], layer)
            self.codes.put_rows(addr[part], slot[part], codes)
            self.meta.put_rows(addr[part], slot[part], meta)

    def write_pages(self, addr: Tensor, x: Tensor, layer: int | None, unit: int) -> None:
        if self.meta is None:
            self.codes.pages.put(addr, x)
            return
        for part in _parts(addr.numel(), _work_rows(x.device) // self.block_size, unit):
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
        for region in (self.codes, self.meta):
            if region is not None:
                region.put_rows(*target, region.take_rows(*source))


class PageStore:
    """Pages of one format in one arena.

    ``arena``: uint8 ``[bytes]``, contiguous, its memory aligned to 16 bytes. ``dtype``: the model's dtype, of raw
    regions and of what is read (float32 for calibrated pages). ``k_basis`` and ``v_basis`` take queries into the basis
    of the stored keys and outputs out of the basis of the stored values; by default those of the formats' rotations,
    which a `BandFormat` has not. ``heads``, ``layers``: KV heads of a layer, and layers, of a block.

    ``layer`` in the methods: the layer all pages belong to, heads fastest; None: whole blocks, by block, layer, head.
    """

    def __init__(
        self,
        arena: Tensor,
        fmt: PageFormat,
        dtype: torch.dtype,
        *,
        bases: tuple[Basis, Basis] | None = None,
        heads: int = 1,
        layers: int = 1,
    ) -> None:
        for side in (fmt.k, fmt.v):
            if isinstance(side, VectorFormat) and not side.quantized and side.bits != 8 * dtype.itemsize:
                raise ValueError(f"a raw format of {side.bits} bits cannot hold {dtype}")
        self.fmt = fmt
        self.dtype = dtype
        # In a calibrated basis a few dims hold most of a score: rounding queries there would show.
        self.read_dtype = torch.float32 if isinstance(fmt.k, BandFormat) else dtype
        self.heads = heads
        self.layers = layers
        self.k_basis, self.v_basis = bases or (_rotation(fmt.k), _rotation(fmt.v))
        self.rebind(arena)

    def rebind(self, arena: Tensor) -> None:
        """Look at another arena: the owner has moved the pages to a larger one, at the same addresses."""
        if arena.dtype != torch.uint8 or arena.dim() != 1 or not arena.is_contiguous() or arena.storage_offset() % 16:
            raise ValueError("an arena is a contiguous one-dimensional uint8 tensor aligned to 16 bytes")
        fmt = self.fmt
        self.arena = arena
        self._k = _Side(arena, fmt.k, self.k_basis, (fmt.k_codes_offset, fmt.k_meta_offset), fmt.block_size, keys=True)
        self._v = _Side(arena, fmt.v, self.v_basis, (fmt.v_codes_offset, fmt.v_meta_offset), fmt.block_size)

    def write_rows(self, addr: Tensor, slot: Tensor, k: Tensor, v: Tensor, layer: int = 0) -> None:
        """Store tokens of a layer: ``k [N, Dk]``, ``v [N, Dv]``, heads fastest, into slot ``slot [N]`` of page ``addr
        [N]`` (no pair twice). ValueError if the pages have scales of channels.
        """
        self._by_token()
        self._k.write_rows(addr, slot, k, layer, self.heads)
        self._v.write_rows(addr, slot, v, layer, self.heads)

    def _by_token(self) -> None:
        if not self.fmt.movable:
            raise ValueError("pages with scales of channels are written and copied whole, not token by token")

    def write_pages(self, addr: Tensor, k: Tensor, v: Tensor, layer: int | None = None) -> None:
        """Store whole pages: ``k [P, S, Dk]``, ``v [P, S, Dv]`` into pages ``addr [P]`` (none twice)."""
        unit = self.unit(layer)
        self._k.write_pages(addr, k, layer, unit)
        self._v.write_pages(addr, v, layer, unit)

    def unit(self, layer: int | None) -> int:
        """Pages after which layers and heads begin anew."""
        return self.heads * (self.layers if layer is None else 1)

    def read_k(self, addr: Tensor) -> Tensor:
        """Keys of pages ``addr [..., P]``: ``[..., P * S, stored Dk]``, contiguous, in the stored basis."""
        return self._k.read(addr, self.read_dtype)

    def read_v(self, addr: Tensor) -> Tensor:
        """Values of pages ``addr [..., P]``: ``[..., P * S, stored Dv]``, contiguous, in the stored basis."""
        return self._v.read(addr, self.read_dtype)

    def decode_pages(self, addr: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Pages ``addr [P]`` in the original basis and the model's dtype: ``k [P, S, Dk]``, ``v [P, S, Dv]``."""
        return self._k.decode(addr, self.dtype, layer), self._v.decode(addr, self.dtype, layer)

    def copy_rows(self, src_addr: Tensor, src_slot: Tensor, dst_addr: Tensor, dst_slot: Tensor) -> None:
        """Copy the stored bytes of tokens (all ``[N]``) from slot to slot, bit for bit; nothing is encoded again.

        All sources are read before anything is written. ValueError if the pages have scales of channels.
        """
        self._by_token()
        self._k.copy_rows((src_addr, src_slot), (dst_addr, dst_slot))
        self._v.copy_rows((src_addr, src_slot), (dst_addr, dst_slot))


def seal(raw: PageStore, raw_addr: Tensor, packed: PageStore, packed_addr: Tensor) -> None:
    """Encode the raw pages ``raw_addr [P]``, whole blocks, into the packed pages ``packed_addr [P]``."""
    _recode(raw, raw_addr, packed, packed_addr)


def unseal(packed: PageStore, packed_addr: Tensor, raw: PageStore, raw_addr: Tensor) -> None:
    """Decode the packed pages ``packed_addr [P]``, whole blocks, into the raw pages ``raw_addr [P]``."""
    _recode(packed, packed_addr, raw, raw_addr)


def _recode(source: PageStore, source_addr: Tensor, target: PageStore, target_addr: Tensor) -> None:
    rows = _work_rows(source.arena.device)
    for part in _parts(source_addr.numel(), rows // source.fmt.block_size, source.unit(None)):
        target.write_pages(target_addr[part], *source.decode_pages(source_addr[part]))


def _rotation(fmt: VectorFormat | BandFormat) -> Rotation:
    if isinstance(fmt, BandFormat):
        raise TypeError("banded pages have a calibrated basis, which must be given")
    return Rotation(fmt)


def copy_blocks(arena: Tensor, src: Tensor, dst: Tensor, block_bytes: int) -> None:
    """Copy blocks of ``block_bytes`` (a multiple of 64) from byte offsets ``src [N]`` to ``dst [N]``, bit for bit.

    All sources are read before anything is written; the targets do not overlap each other.
    """
    windows = _Windows(arena, block_bytes, step=PAGE_ALIGN)
    windows.put(dst, windows.take(src))


def zero_blocks(arena: Tensor, offset: Tensor, block_bytes: int) -> None:
    """Write zeros over the blocks of ``block_bytes`` (a multiple of 64) at byte offsets ``offset [N]``."""
    _Windows(arena, block_bytes, step=PAGE_ALIGN).clear(offset)
