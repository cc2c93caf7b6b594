"""Decode attention on a GPU: pages are walked where they lie, codes become numbers in registers only.

Every (sequence, KV head) is cut into spans of tokens, so that one long sequence also fills the device; a second, small
kernel merges the spans. The kernels are Triton's (:mod:`kvfold.kernels.triton.walk`), compiled when first used for a
format. Without Triton, or for a call they do not know, everything still works, slower.
"""

from __future__ import annotations

import logging
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvfold.errors import UnsupportedError
from kvfold.formats import BandFormat, PageFormat, VectorFormat
from kvfold.kernels.pages import PagesCall

__all__ = ["attend", "refuses"]

_LEAST_CAPABILITY = (8, 0)  # bfloat16 products
_ROWS = (8, 64)  # of queries, that one program takes at least and at most
_WAVES, _MOST_SPANS = 32, 128  # programs for each multiprocessor; spans of a sequence
_LEAST_SPAN = 256  # tokens: less work than that is not worth a merge
_SUMS = 2048  # numbers of the sums of one warp
_DEEP = 16 << 10  # bytes of a tile, up to which two more are fetched ahead
_JOINED = 32  # dims of a row that one program joins


@cache
def _missing() -> str | None:
    """Why there are no kernels; asked for at first use, not at import."""
    try:
        import_module("triton.language")
    except ImportError as error:
        reason = f"Triton is not there ({error})"
        logging.getLogger("kvfold.kernels").warning(
            "the GPU kernel is not available, decode takes the slower way through torch: %s", reason
        )
        return reason
    return None


def _kernels() -> Any:
    return import_module("kvfold.kernels.triton.walk")


def refuses(call: PagesCall) -> str | None:
    """Why the kernel cannot take a call; None if it can."""
    if call.q.device.type != "cuda":
        return f"needs tensors on a GPU, got {call.q.device.type}"
    if call.latent:
        return "does not know latent pages"
    if call.q.requires_grad and torch.is_grad_enabled():
        return "does not know gradients"
    if call.shift % 16 or call.arena.data_ptr() % 16:
        return "needs pages aligned to 16 bytes"
    if (missing := _device(call.q.device)[1]) is not None:
        return missing
    layout = _layout(call.fmt, call.dtype)
    return layout if isinstance(layout, str) else None


def attend(call: PagesCall) -> tuple[Tensor, Tensor]:
    """Runs the kernels on the current stream. Addresses are not checked, they are the caller's word.

    Raises ValueError if a shape is wrong, and UnsupportedError for a call that `refuses` refuses.
    """
    if (reason := refuses(call)) is not None:
        raise UnsupportedError("the GPU kernel cannot take this call", [reason])
    n, heads, rows, dim = call.q.shape
    pages = call.addr.shape[-1]
    if dim != call.fmt.k.dim or call.addr.shape != (n, heads, pages) or call.addr.dtype != torch.int64:
        raise ValueError(
            f"queries {tuple(call.q.shape)} and {call.addr.dtype} addresses {tuple(call.addr.shape)} do not fit"
        )
    if call.bias is not None and call.bias.shape != (n, pages * call.fmt.block_size):
        raise ValueError(f"a bias {tuple(call.bias.shape)} does not fit addresses {tuple(call.addr.shape)}")
    with torch.cuda.device(call.q.device):
        return _launch(call.evened(), n * heads, rows, pages)


def _launch(call: PagesCall, units: int, rows: int, pages: int) -> tuple[Tensor, Tensor]:
    kernels, device = _kernels(), call.q.device
    layout, tuning = _plan(call.fmt, call.dtype, rows)
    blocks = -(-rows // tuning["M"])
    tokens = pages * call.fmt.block_size
    wanted = min(_MOST_SPANS, -(-_WAVES * _device(device)[0] // (units * blocks * tuning["num_warps"])))
    span = max(_LEAST_SPAN, -(-tokens // (wanted * tuning["N"])) * tuning["N"])
    spans = -(-tokens // span)
    shape = (*call.q.shape[:3], call.fmt.v.dim)
    parts = torch.empty((spans, *shape), dtype=torch.float32, device=device)
    logs = torch.empty((spans, *shape[:3]), dtype=torch.float32, device=device)
    bias = None if call.bias is None else call.bias.float().contiguous()
    kernels.walk_pages[spans, units, blocks](
        call.q.float().contiguous(), call.arena, call.addr.contiguous(), logs if bias is None else bias, parts, logs,
        rows, shape[1], pages, span, call.shift, call.scale, call.softcap or 0.0,
        **layout, BIASED=bias is not None, CAPPED=call.softcap is not None, **tuning,
    )  # fmt: skip
    if spans == 1:
        return parts[0], logs[0]
    out, lse = torch.empty_like(parts[0]), torch.empty_like(logs[0])
    kernels.join_spans[units * rows, -(-shape[3] // _JOINED)](
        parts, logs, out, lse, units * rows, spans, DIM=shape[3], WIDE=_JOINED, SPANS=_power(spans)
    )
    return out, lse


@lru_cache(maxsize=256)
def _plan(fmt: PageFormat, dtype: torch.dtype, rows: int) -> tuple[dict[str, Any], dict[str, int]]:
    """What the kernel is compiled for, and how it is cut up.

    One warp takes one tile of 32 tokens, so that nothing waits for another warp; four share one where the sums of many
    rows would not fit into its registers.
    """
    layout = _layout(fmt, dtype)
    if isinstance(layout, str):
        raise UnsupportedError("the GPU kernel cannot take this call", [layout])
    tile_rows = min(max(_ROWS[0], _power(rows)), _ROWS[1])
    lone = tile_rows * layout["V_WIDE"] * layout["V_PLANES"] <= _SUMS
    tokens = 32 if lone else 64
    deep = tokens * (fmt.k.code_bytes + fmt.v.code_bytes) <= _DEEP
    return layout, {"M": tile_rows, "N": tokens, "num_warps": 1 if lone else 4, "num_stages": 5 if deep else 3}


@cache
def _device(device: torch.device) -> tuple[int, str | None]:
    """Multiprocessors of a device, and why the kernels do not run there."""
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return found.multi_processor_count, "is written for NVIDIA's GPUs"
    if (found.major, found.minor) < _LEAST_CAPABILITY:
        return found.multi_processor_count, f"needs compute capability 8.0, got {found.major}.{found.minor}"
    return found.multi_processor_count, _missing()


@lru_cache(maxsize=256)
def _layout(fmt: PageFormat, dtype: torch.dtype) -> dict[str, Any] | str:
    """What the kernel is compiled for; or, a str, why it cannot read such pages."""
    if isinstance(fmt.k, BandFormat) or isinstance(fmt.v, BandFormat):
        return "does not know banded codes"
    if not fmt.movable:
        return "does not know scales of channels"
    for side in (fmt.k, fmt.v):
        if side.groups > 1:
            return f"knows one scale a token, not {side.groups} groups of dims"
        if not side.quantized and dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"does not know {dtype}"
    k = _side("K", fmt.k, dtype, fmt.k_codes_offset, fmt.k_meta_offset)
    return k | _side("V", fmt.v, dtype, fmt.v_codes_offset, fmt.v_meta_offset) | {"SIZE": fmt.block_size}


def _side(name: str, fmt: VectorFormat, dtype: torch.dtype, codes: int, meta: int) -> dict[str, Any]:
    language = import_module("triton.language")
    bits = fmt.bits if fmt.quantized else 0
    unit = (1 if fmt.code_bytes % 2 else 2) if bits else dtype.itemsize
    kind = {1: "uint8", 2: "int16"}[unit] if bits else str(dtype).removeprefix("torch.")
    found = {
        "TYPE": getattr(language, kind),
        "BITS": bits,
        "DIM": fmt.dim,
        "ROW": fmt.code_bytes,
        "CODES": codes,
        "META": meta,
        "UNIT": unit,
        "WIDE": max(16, _power(fmt.code_bytes // unit)),
        "PLANES": unit * 8 // bits if bits else 1,
    }
    return {f"{name}_{key}": value for key, value in found.items()}


def _power(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()
