"""Rows of keys and values into pages, out of them and between them, natively: one call, whatever it is made of.

What is encoded has the bits that `kvfold.codecs` gives it; only sums over a row (rotations, projections, matrices) run
in another order. Every address and slot is checked before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvfold.formats import BandFormat, PageFormat, VectorFormat
from kvfold.kernels import cpu
from kvfold.kernels.cpu.threads import thread_count
from kvfold.kernels.runs import TokenRuns

__all__ = ["NativePages", "SideCode", "Turn", "copy_blocks", "hadamard", "refuses", "row_variants", "zero_blocks"]

# As in csrc/store.hpp.
_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_RAW, _TOKEN, _CHANNEL, _BANDED = range(4)
_BEHIND = 16  # floats that a kernel may read behind a matrix: up to a vector of them

_Dense = tuple[int, int, int, int]
_NOTHING: _Dense = (0, 0, 0, 0)


@dataclass(frozen=True)
class Turn:
    """How vectors are taken to their stored basis: by a fast Hadamard transform in blocks of ``block`` dims (1: not at
    all), or by matrices ``encode [M, D, r]``, ``decode [M, r, D]`` and ``mean [M, D]`` of each layer and head.
    """

    block: int = 1
    encode: Tensor | None = None
    decode: Tensor | None = None
    mean: Tensor | None = None


@dataclass(frozen=True)
class SideCode:
    """How the keys or the values of a page are encoded. ``stretch [3, 256]``: the tables of the banded code."""

    fmt: VectorFormat | BandFormat
    turn: Turn
    inner: bool
    projected: bool
    stretch: Tensor | None


def _native() -> ModuleType | None:
    return None if cpu.available() else cpu.extension()


def row_variants() -> tuple[str, ...]:
    """The builds of the write path that this processor can run, best first (the first is used)."""
    native = _native()
    return () if native is None else tuple(native.store_variants())


def refuses(arena: Tensor) -> str | None:
    """Why memory in this arena cannot be moved natively; None if it can."""
    return f"needs an arena on the CPU, got {arena.device.type}" if not arena.is_cpu else cpu.available()


def copy_blocks(arena: Tensor, src: Tensor, dst: Tensor, block_bytes: int) -> None:
    """See `kvfold.codecs.pages.copy_blocks`."""
    native = cpu.extension()
    src, dst = _table(src), _table(dst)
    if src.shape != dst.shape:
        raise ValueError(f"{src.numel()} blocks cannot be copied to {dst.numel()}")
    native.copy_blocks(
        arena.data_ptr(), arena.numel(), src.data_ptr(), dst.data_ptr(), src.numel(), block_bytes,
        thread_count(),
    )  # fmt: skip


def zero_blocks(arena: Tensor, offset: Tensor, block_bytes: int) -> None:
    """See `kvfold.codecs.pages.zero_blocks`."""
    native = cpu.extension()
    offset = _table(offset)
    native.zero_blocks(arena.data_ptr(), arena.numel(), offset.data_ptr(), offset.numel(), block_bytes, thread_count())


def hadamard(x: Tensor, block: int) -> Tensor:
    """Float32 rows ``x [..., dim]`` on the CPU with their blocks of ``block`` (a power of two that divides ``dim``)
    transformed. On the calling thread: a step's queries are few, and waking others takes longer.
    """
    native = cpu.extension()
    rows = x.contiguous()
    out = torch.empty_like(rows)
    dim = rows.shape[-1]
    native.hadamard(rows.data_ptr(), out.data_ptr(), rows.numel() // dim, dim, block, 0)
    return out


class NativePages:
    """The pages of one format in one arena on the CPU, moved by the extension on at most `thread_count`
    threads of its own pool, the GIL released.

    Methods are those of `kvfold.codecs.pages.PageStore` and mean the same. ValueError for what does not fit: addresses
    outside of the arena, slots outside of a block, shapes, dtypes. ``variant`` counts in `row_variants`.
    """

    def __init__(
        self,
        fmt: PageFormat,
        dtypes: tuple[torch.dtype, torch.dtype],
        sides: tuple[SideCode, SideCode],
        heads: int,
        layers: int,
        variant: int = 0,
    ) -> None:
        """``dtypes``: of the model, and of what `read_k` and `read_v` return. Call `bind` next."""
        native = cpu.extension()
        self._dtype, self._read_dtype = dtypes
        self._fmt = fmt
        self._heads, self._layers = heads, layers
        self._variant = variant
        self._alive: list[Tensor] = []  # the extension knows addresses only
        offsets = ((fmt.k_codes_offset, fmt.k_meta_offset), (fmt.v_codes_offset, fmt.v_meta_offset))
        self._sides = [self._side(native, side, *at) for side, at in zip(sides, offsets, strict=True)]

    def bind(self, arena: Tensor) -> None:
        """Move pages in this arena from now on."""
        native = cpu.extension()
        fmt = self._fmt
        self._arena = arena
        self._store = native.make_store(fmt.block_size, fmt.page_bytes, *self._sides, arena.data_ptr(), arena.numel())

    @staticmethod
    def refuses(arena: Tensor, dtype: torch.dtype) -> str | None:
        """Why pages in this arena, of a model of this dtype, cannot be moved natively; None if they can."""
        if dtype not in _NUMBERS:
            return f"does not know {dtype}"
        return refuses(arena)

    def _side(self, native: ModuleType, side: SideCode, codes_offset: int, meta_offset: int) -> Any:
        fmt = side.fmt
        if isinstance(fmt, BandFormat):
            code, bands, groups = _BANDED, list(fmt.bands), 1
        elif not fmt.quantized:
            code, bands, groups = _RAW, [], 1
        else:
            code, bands, groups = _TOKEN if fmt.movable else _CHANNEL, [(fmt.bits, fmt.stored_dim)], fmt.groups
        turn = side.turn
        return native.make_side(
            code=code,
            number=_NUMBERS[self._dtype],
            number_bytes=self._dtype.itemsize,
            dim=fmt.dim,
            stored_dim=fmt.stored_dim,
            groups=groups,
            bands=bands,
            inner=side.inner,
            projected=side.projected,
            codes_offset=codes_offset,
            meta_offset=meta_offset,
            block=turn.block,
            encode=self._kept(turn.encode),
            decode=self._kept(turn.decode),
            mean=self._kept(turn.mean),
            matrices=0 if turn.encode is None else turn.encode.shape[0],
            stretch=self._kept(side.stretch),
        )

    def _kept(self, x: Tensor | None) -> int:
        """The address of a float32 copy that lives as long as this object; 0 of nothing."""
        if x is None:
            return 0
        flat = torch.nn.functional.pad(x.detach().float().flatten(), (0, _BEHIND))
        self._alive.append(flat)
        return flat.data_ptr()

    def write_runs(self, runs: TokenRuns, k: Tensor, v: Tensor, layer: int) -> None:
        """``k [N, Hkv, Dk]`` and ``v [N, Hkv, Dv]`` of a step's tokens into the slots of ``runs``."""
        k, v = self._fit(k, v, (runs.tokens, runs.heads))
        if runs.page_bytes != self._fmt.page_bytes or runs.heads != self._heads:
            raise ValueError("these runs are of other pages")
        self._store.write_runs(
            runs.table.data_ptr(), runs.table.shape[0], runs.heads, layer, layer * runs.layer_bytes, runs.tokens,
            _dense(k, 1, 0), _dense(v, 1, 0),
            thread_count(), self._variant,
        )  # fmt: skip

    def write_rows(self, addr: Tensor, slot: Tensor, k: Tensor, v: Tensor, layer: int) -> None:
        """See `PageStore`."""
        k, v = self._fit(k, v, (addr.numel(),))
        addr, slot = _table(addr), _table(slot)
        if slot.shape != addr.shape:
            raise ValueError(f"slots {tuple(slot.shape)} do not fit addresses {tuple(addr.shape)}")
        self._store.write_pages(
            addr.data_ptr(), slot.data_ptr(), addr.numel(), *self._turns(layer),
            _dense(k, 0, 0), _dense(v, 0, 0),
            thread_count(), self._variant,
        )  # fmt: skip

    def write_pages(self, addr: Tensor, k: Tensor, v: Tensor, layer: int | None) -> None:
        """See `PageStore`."""
        k, v = self._fit(k, v, (addr.numel(), self._fmt.block_size))
        addr = _table(addr)
        self._store.write_pages(
            addr.data_ptr(), 0, addr.numel(), *self._turns(layer),
            _dense(k, 0, 1), _dense(v, 0, 1),
            thread_count(), self._variant,
        )  # fmt: skip

    def read_k(self, addr: Tensor) -> Tensor:
        """See `PageStore`."""
        out = self._room(addr, self._fmt.k)
        self._read(addr, _pages(out, self._fmt), _NOTHING, 0, turned=False)
        return out

    def read_v(self, addr: Tensor) -> Tensor:
        """See `PageStore`."""
        out = self._room(addr, self._fmt.v)
        self._read(addr, _NOTHING, _pages(out, self._fmt), 0, turned=False)
        return out

    def decode_pages(self, addr: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        """See `PageStore`."""
        shape = (addr.numel(), self._fmt.block_size)
        k, v = (torch.empty((*shape, side.dim), dtype=self._dtype) for side in (self._fmt.k, self._fmt.v))
        self._read(addr, _dense(k, 0, 1), _dense(v, 0, 1), layer)
        return k, v

    def decode_keys(self, addr: Tensor, layer: int | None, *, values: bool) -> Tensor:
        """See `PageStore`."""
        shape = (addr.numel(), self._fmt.block_size)
        # A raw side is read as the numbers it holds.
        k, v = (
            torch.empty((*shape, side.dim), dtype=torch.float32 if side.quantized else self._dtype)
            for side in (self._fmt.k, self._fmt.v)
        )
        self._read(addr, _dense(k, 0, 1), _dense(v, 0, 1) if values else _NOTHING, layer)
        return torch.cat((k.float(), v.float()), dim=-1) if values else k.float()

    def recode(self, addr: Tensor, target: NativePages, target_addr: Tensor) -> None:
        """Whole blocks into the pages ``target_addr`` of ``target``; of each side, one end is raw."""
        source, goal = _table(addr), _table(target_addr)
        if source.shape != goal.shape:
            raise ValueError(f"{source.numel()} pages cannot become {goal.numel()}")
        self._store.recode(
            source.data_ptr(), target._store, goal.data_ptr(), source.numel(), self._heads * self._layers,
            thread_count(), target._variant,
        )  # fmt: skip

    def copy_rows(self, src_addr: Tensor, src_slot: Tensor, dst_addr: Tensor, dst_slot: Tensor) -> None:
        """See `PageStore`."""
        tables = [_table(x) for x in (src_addr, src_slot, dst_addr, dst_slot)]
        if any(x.shape != tables[0].shape for x in tables):
            raise ValueError("addresses and slots of rows to copy do not fit together")
        self._store.copy_rows(*(x.data_ptr() for x in tables), tables[0].numel())

    def _turns(self, layer: int | None) -> tuple[int, int]:
        """The first matrix of a layer (None: of whole blocks), and after how many pages they begin anew."""
        return (0, self._heads * self._layers) if layer is None else (layer * self._heads, self._heads)

    def _read(self, addr: Tensor, k: _Dense, v: _Dense, layer: int | None, *, turned: bool = True) -> None:
        flat = _table(addr)
        self._store.read_pages(
            flat.data_ptr(), flat.numel(), *self._turns(layer), k, v, turned, thread_count(), self._variant
        )

    def _room(self, addr: Tensor, fmt: VectorFormat | BandFormat) -> Tensor:
        """What pages ``addr [..., P]`` are read into, in the stored basis."""
        width = fmt.stored_dim if isinstance(fmt, BandFormat) else fmt.dim
        dtype = self._read_dtype if fmt.quantized else self._dtype
        return torch.empty((*addr.shape[:-1], addr.shape[-1] * self._fmt.block_size, width), dtype=dtype)

    def _fit(self, k: Tensor, v: Tensor, lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Keys and values ``[*lead, dim]`` as the extension takes them: their rows unbroken, of a kind it knows."""
        return self._fit_one(k, self._fmt.k, lead), self._fit_one(v, self._fmt.v, lead)

    def _fit_one(self, x: Tensor, fmt: VectorFormat | BandFormat, lead: tuple[int, ...]) -> Tensor:
        if x.shape != (*lead, fmt.dim) or not x.is_cpu:
            raise ValueError(f"{tuple(x.shape)} on {x.device} is not {(*lead, fmt.dim)} on the CPU")
        if not fmt.quantized and x.dtype != self._dtype:
            raise ValueError(f"raw pages of {self._dtype} cannot hold {x.dtype}")
        if x.dtype not in _NUMBERS:
            x = x.float()
        return x if x.stride(-1) == 1 else x.contiguous()


def _dense(x: Tensor, unit: int, row: int) -> _Dense:
    """A tensor for the extension; ``unit`` and ``row`` name its axes."""
    size, strides = x.itemsize, x.stride()
    return x.data_ptr(), _NUMBERS[x.dtype], strides[unit] * size, strides[row] * size


def _pages(out: Tensor, fmt: PageFormat) -> _Dense:
    """The contiguous room for pages one after the other."""
    row = out.shape[-1] * out.itemsize
    return out.data_ptr(), _NUMBERS[out.dtype], fmt.block_size * row, row


def _table(x: Tensor) -> Tensor:
    if x.dtype != torch.int64 or not x.is_cpu:
        raise ValueError(f"addresses and slots are int64 on the CPU, got {x.dtype} on {x.device}")
    return x.reshape(-1).contiguous()
