"""The native kernel for decode on a CPU: attention over pages where they lie, nothing gathered or unpacked to memory.

It is a C++ extension (``csrc/``) that holds one build of the kernel for each instruction set and picks the best one the
processor runs. Where it could not be built everything still works, slower; the log says so once.
"""

from __future__ import annotations

import logging
from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from kvfold.errors import UnsupportedError
from kvfold.formats import BandFormat, PageFormat, VectorFormat
from kvfold.kernels.cpu.threads import thread_count
from kvfold.kernels.pages import PagesCall

__all__ = ["attend", "available", "builds", "extension", "features", "refuses", "variants", "wake_seconds"]

# As in csrc/attend_pages.hpp.
_RAW = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CODES = 3
_NONE, _PAIRS, _STRETCH, _CHANNELS = range(4)
_MOST_BANDS = 16


@cache
def _load() -> ModuleType | str:
    """The extension, or why there is none; asked for at first use, not at import."""
    try:
        return import_module("kvfold.kernels.cpu._native")
    except ImportError as error:
        reason = f"the extension is not there or does not load ({error})"
        logging.getLogger("kvfold.kernels").warning(
            "the native kernel is not available, decode takes the slower way through torch: %s; "
            "reinstall kvfold on a machine with a C++20 compiler (GCC or Clang) to build it",
            reason,
        )
        return reason


def available() -> str | None:
    """Why the native kernel cannot be used here; None if it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def extension() -> ModuleType:
    """The extension itself. UnsupportedError if it is not there."""
    loaded = _load()
    if isinstance(loaded, str):
        raise UnsupportedError("the native kernels", [loaded])
    return loaded


def variants() -> tuple[str, ...]:
    """The builds of the kernel that this processor can run, best first (the first is used); none without extension."""
    loaded = _load()
    return () if isinstance(loaded, str) else tuple(loaded.variants())


def builds() -> dict[str, str]:
    """Every build of the kernel, best first, and the features that this processor lacks for it (none: it can run)."""
    loaded = _load()
    return {} if isinstance(loaded, str) else dict(loaded.builds())


def features() -> dict[str, bool]:
    """What a kernel may ask of the processor, and whether it can be used here; nothing without the extension."""
    loaded = _load()
    return {} if isinstance(loaded, str) else dict(loaded.features())


def wake_seconds(threads: int, pause_seconds: float) -> float | None:
    """How long it takes, after a pause, until ``threads`` threads have begun with a job; None without the extension."""
    loaded = _load()
    return None if isinstance(loaded, str) else float(loaded.wake_seconds(threads, pause_seconds))


def refuses(call: PagesCall) -> str | None:
    """Why the native kernel cannot take a call; None if it can."""
    if call.q.device.type != "cpu":
        return f"needs tensors on the CPU, got {call.q.device.type}"
    if call.q.requires_grad and torch.is_grad_enabled():
        return "does not know gradients"
    layout = _layout(call.fmt, call.dtype)
    return layout if isinstance(layout, str) else None


def attend(call: PagesCall, variant: int = 0) -> tuple[Tensor, Tensor]:
    """Runs the kernel on at most `thread_count` threads of its own pool, the GIL released.

    ``variant`` counts in `variants`. Raises ValueError if a page lies outside of the arena or a shape is wrong, and
    UnsupportedError for calls that `refuses` would refuse for their format.
    """
    layout, native = _layout(call.fmt, call.dtype), _load()
    if isinstance(layout, str) or isinstance(native, str):
        raise UnsupportedError("the native kernel cannot take this call", [str(layout)])
    n, heads, rows, dim = call.q.shape
    addr = call.addr.contiguous()
    pages = addr.shape[-1]
    k, v = call.fmt.k, call.fmt.v
    wanted = _width(k) + (_width(v) if call.latent else 0)
    if dim != wanted or addr.shape != (n, heads, pages) or addr.dtype != torch.int64:
        raise ValueError(f"queries {tuple(call.q.shape)} and {addr.dtype} addresses {tuple(addr.shape)} do not fit")
    if not call.arena.is_contiguous() or call.arena.dtype != torch.uint8:
        raise ValueError("an arena is a contiguous tensor of bytes")
    bias = call.bias
    if bias is not None:
        bias = bias.float().contiguous()
        if bias.shape != (n, pages * call.fmt.block_size):
            raise ValueError(f"a bias {tuple(bias.shape)} does not fit addresses {tuple(addr.shape)}")
    q = call.q.float().contiguous()
    o = torch.empty((n, heads, rows, _width(k if call.latent else v)), dtype=torch.float32)
    lse = torch.empty((n, heads, rows), dtype=torch.float32)
    native.attend_pages(
        layout, call.latent, q.data_ptr(), call.arena.data_ptr(), call.arena.numel(), addr.data_ptr(), call.shift,
        0 if bias is None else bias.data_ptr(), o.data_ptr(), lse.data_ptr(), n, heads, rows, pages,
        call.scale, call.softcap or 0.0, thread_count(), variant,
    )  # fmt: skip
    return o, lse


@lru_cache(maxsize=256)
def _layout(fmt: PageFormat, dtype: torch.dtype) -> object:
    """Where the regions of a page lie, in an object of the extension; or, a str, why it cannot read such pages."""
    native = _load()
    if isinstance(native, str):
        return native
    for side in (fmt.k, fmt.v):
        if not side.quantized and dtype not in _RAW:
            return f"does not know {dtype}"
        if side.quantized and len(_bands(side)) > _MOST_BANDS:
            return f"knows {_MOST_BANDS} groups of dims, not {len(_bands(side))}"
    k = _side(fmt.k, dtype, fmt.k_codes_offset, fmt.k_meta_offset)
    v = _side(fmt.v, dtype, fmt.v_codes_offset, fmt.v_meta_offset)
    layout: object = native.make_layout(fmt.block_size, fmt.page_bytes, k, v)
    return layout


_Band = tuple[int, int, int]


def _side(
    fmt: VectorFormat | BandFormat, dtype: torch.dtype, codes: int, meta: int
) -> tuple[int, int, int, int, int, int, int, list[_Band]]:
    if not fmt.quantized:
        return _RAW[dtype], _NONE, fmt.dim, 1, fmt.code_bytes, codes, meta, []
    if isinstance(fmt, BandFormat):
        return _CODES, _STRETCH, fmt.dim, 1, fmt.code_bytes, codes, meta, _bands(fmt)
    kind = _PAIRS if fmt.movable else _CHANNELS
    return _CODES, kind, fmt.dim, fmt.groups, fmt.code_bytes, codes, meta, _bands(fmt)


def _bands(fmt: VectorFormat | BandFormat) -> list[_Band]:
    """Codes of one width side by side, as ``(bits, first byte, bytes)``."""
    if isinstance(fmt, BandFormat):
        bands, byte = [], 0
        for bits, dims in fmt.bands:
            bands.append((bits, byte, dims * bits // 8))
            byte += dims * bits // 8
        return bands
    if fmt.bits == 8:  # groups of whole bytes may lie apart
        return [(8, group * fmt.group_width, fmt.group_width) for group in range(fmt.groups)]
    return [(fmt.bits, 0, fmt.code_bytes)]


def _width(fmt: VectorFormat | BandFormat) -> int:
    """Numbers of a stored row that mean something."""
    return fmt.stored_dim if isinstance(fmt, BandFormat) else fmt.dim
