"""Pages in the arena: writing rows and whole pages, reading them for attention, moving them.

Every address is an int64 byte offset of a page in the arena, a multiple of 64. Natively where the extension can
(:mod:`kvfold.kernels.cpu.rows`), else in plain torch (:mod:`kvfold.codecs.plain`).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from kvfold.available import resident_bytes
from kvfold.codecs.plain import PlainPages, Windows, parts, work_rows
from kvfold.codecs.rotation import Basis, Rotation
from kvfold.formats import PAGE_ALIGN, BandFormat, PageFormat, VectorFormat
from kvfold.kernels.cpu import rows
from kvfold.kernels.cpu.rows import NativePages
from kvfold.kernels.runs import TokenRuns

__all__ = ["ArenaMemory", "PageStore", "copy_blocks", "seal", "unseal", "zero_blocks"]


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
        self.native: NativePages | None = None
        self.rebind(arena)

    def rebind(self, arena: Tensor) -> None:
        """Look at another arena: the owner has moved the pages to a larger one, at the same addresses."""
        if arena.dtype != torch.uint8 or arena.dim() != 1 or not arena.is_contiguous() or arena.storage_offset() % 16:
            raise ValueError("an arena is a contiguous one-dimensional uint8 tensor aligned to 16 bytes")
        self.arena = arena
        dtypes, bases = (self.dtype, self.read_dtype), (self.k_basis, self.v_basis)
        self.plain = PlainPages(arena, self.fmt, dtypes, bases, self.heads, self.layers)
        if self.native is None and NativePages.refuses(arena, self.dtype) is None:
            sides = (self.plain.k.code(), self.plain.v.code())
            self.native = NativePages(self.fmt, dtypes, sides, self.heads, self.layers)
        if self.native is not None:
            self.native.bind(arena)
        self._pages: NativePages | PlainPages = self.native or self.plain

    def write_runs(self, runs: TokenRuns, k: Tensor, v: Tensor, layer: int = 0) -> None:
        """Store the tokens of a step that ``runs`` name: ``k [N, Hkv, Dk]``, ``v [N, Hkv, Dv]`` of all its tokens."""
        self._pages.write_runs(runs, k, v, layer)

    def write_rows(self, addr: Tensor, slot: Tensor, k: Tensor, v: Tensor, layer: int = 0) -> None:
        """Store tokens of a layer: ``k [N, Dk]``, ``v [N, Dv]``, heads fastest, into slot ``slot [N]`` of page ``addr
        [N]`` (no pair twice). ValueError if the pages have scales of channels.
        """
        self._by_token()
        self._pages.write_rows(addr, slot, k, v, layer)

    def _by_token(self) -> None:
        if not self.fmt.movable:
            raise ValueError("pages with scales of channels are written and copied whole, not token by token")

    def write_pages(self, addr: Tensor, k: Tensor, v: Tensor, layer: int | None = None) -> None:
        """Store whole pages: ``k [P, S, Dk]``, ``v [P, S, Dv]`` into pages ``addr [P]`` (none twice)."""
        self._pages.write_pages(addr, k, v, layer)

    def read_k(self, addr: Tensor) -> Tensor:
        """Keys of pages ``addr [..., P]``: ``[..., P * S, stored Dk]``, contiguous, in the stored basis."""
        return self._pages.read_k(addr)

    def read_v(self, addr: Tensor) -> Tensor:
        """Values of pages ``addr [..., P]``: ``[..., P * S, stored Dv]``, contiguous, in the stored basis."""
        return self._pages.read_v(addr)

    def decode_pages(self, addr: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """Pages ``addr [P]`` in the original basis and the model's dtype: ``k [P, S, Dk]``, ``v [P, S, Dv]``."""
        return self._pages.decode_pages(addr, layer)

    def decode_keys(self, addr: Tensor, layer: int | None = None, *, values: bool = False) -> Tensor:
        """Keys of pages ``addr [P]`` in the original basis, float32 ``[P, S, Dk]``; with ``values`` these stand behind
        them, ``[P, S, Dk + Dv]``.
        """
        return self._pages.decode_keys(addr, layer, values=values)

    def copy_rows(self, src_addr: Tensor, src_slot: Tensor, dst_addr: Tensor, dst_slot: Tensor) -> None:
        """Copy the stored bytes of tokens (all ``[N]``) from slot to slot, bit for bit; nothing is encoded again.

        All sources are read before anything is written. ValueError if the pages have scales of channels.
        """
        self._by_token()
        self._pages.copy_rows(src_addr, src_slot, dst_addr, dst_slot)


def seal(raw: PageStore, raw_addr: Tensor, packed: PageStore, packed_addr: Tensor) -> None:
    """Encode the raw pages ``raw_addr [P]``, whole blocks, into the packed pages ``packed_addr [P]``."""
    _recode(raw, raw_addr, packed, packed_addr)


def unseal(packed: PageStore, packed_addr: Tensor, raw: PageStore, raw_addr: Tensor) -> None:
    """Decode the packed pages ``packed_addr [P]``, whole blocks, into the raw pages ``raw_addr [P]``."""
    _recode(packed, packed_addr, raw, raw_addr)


def _recode(source: PageStore, source_addr: Tensor, target: PageStore, target_addr: Tensor) -> None:
    ends = ((source.fmt.k, target.fmt.k), (source.fmt.v, target.fmt.v))
    one_is_raw = not any(old.quantized and fresh.quantized for old, fresh in ends)
    if source.native is not None and target.native is not None and one_is_raw:
        source.native.recode(source_addr, target.native, target_addr)
        return
    size, unit = work_rows(source.arena.device), source.heads * source.layers
    for part in parts(source_addr.numel(), size // source.fmt.block_size, unit):
        target.write_pages(target_addr[part], *source.decode_pages(source_addr[part]))


def _rotation(fmt: VectorFormat | BandFormat) -> Rotation:
    if isinstance(fmt, BandFormat):
        raise TypeError("banded pages have a calibrated basis, which must be given")
    return Rotation(fmt)


class ArenaMemory:
    """The memory of an arena: ``bytes``, uint8 ``[size]``, zeros. On a CPU in large pages where the system gives them:
    blocks lie anywhere in it, and looking up where their memory is takes time of its own.

    Memory becomes real when it is first written, as that of ``torch.zeros``.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        advice = getattr(mmap, "MADV_HUGEPAGE", None)
        self._map: mmap.mmap | None = None
        if device.type != "cpu" or advice is None or size == 0:
            self.bytes = torch.zeros(size, dtype=torch.uint8, device=device)
            return
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a system without large pages
            self._map.madvise(advice)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def resident_bytes(self) -> int | None:
        """Bytes of it that are backed by real memory now; None where the system does not tell. On a GPU all of it."""
        if self.bytes.device.type != "cpu":
            return self.bytes.numel()
        return 0 if not self.bytes.numel() else resident_bytes(self.bytes.data_ptr(), self.bytes.numel())

    def give_back(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Gives the memory of byte ranges ``(first, last)`` back to the system, as far as whole pages of it go; what
        was there is lost. Where that cannot be done it stays.
        """
        if self._map is None:
            return
        for first, last in ranges:
            first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                with suppress(OSError):
                    self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def copy_blocks(arena: Tensor, src: Tensor, dst: Tensor, block_bytes: int) -> None:
    """Copy blocks of ``block_bytes`` (a multiple of 64) from byte offsets ``src [N]`` to ``dst [N]``, bit for bit.

    All sources are read before anything is written; the targets do not overlap each other.
    """
    if rows.refuses(arena) is None:
        rows.copy_blocks(arena, src, dst, block_bytes)
        return
    windows = Windows(arena, block_bytes, step=PAGE_ALIGN)
    windows.put(dst, windows.take(src))


def zero_blocks(arena: Tensor, offset: Tensor, block_bytes: int) -> None:
    """Write zeros over the blocks of ``block_bytes`` (a multiple of 64) at byte offsets ``offset [N]``."""
    if rows.refuses(arena) is None:
        rows.zero_blocks(arena, offset, block_bytes)
    else:
        Windows(arena, block_bytes, step=PAGE_ALIGN).clear(offset)
