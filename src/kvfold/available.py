"""What memory a machine has for the cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path
from typing import Final

import numpy as np
import torch

from kvfold.errors import BudgetError
from kvfold.formats import format_bytes

__all__ = ["available_memory", "check_available", "resident_bytes"]

_LOOK_BYTES: Final = 1 << 30
"""Memory looked at in one call of the system: each page of it takes a byte of the answer."""

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUP: Final = Path("/sys/fs/cgroup")


def check_available(asked: int, device: torch.device) -> None:
    """BudgetError if ``asked`` bytes are more than could be allocated on ``device`` now."""
    there = available_memory(device)
    if asked > there:
        raise BudgetError(
            f"a KV cache of {format_bytes(asked)}",
            why=f"{format_bytes(there)} of memory are available on {device}",
            hint=f"give kv_memory at most that, such as {format_bytes(there // 2 >> 20 << 20).replace(' ', '')!r}",
        )


def available_memory(device: torch.device) -> int:
    """Bytes that could be allocated on ``device`` now; for the CPU without swapping, and within the container's
    limit.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_meminfo() or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:  # what is used includes files that were read: they are let go for others
        limits.append(min(limit, max(0, limit - used + _entry(_CGROUP / "memory.stat", "inactive_file"))))
    return min(limits)


def _meminfo() -> int:
    return _entry(_MEMINFO, "MemAvailable:") * 1024


def _entry(file: Path, name: str) -> int:
    """The number behind ``name`` in ``file``; 0 if there is none."""
    if not file.is_file():
        return 0
    for line in file.read_text(encoding="ascii").splitlines():
        if line.split()[:1] == [name]:
            return int(line.split()[1])
    return 0


def _number(file: Path) -> int | None:
    """The number in ``file``; None if there is no such file or number (``max``: no limit)."""
    if not file.is_file():
        return None
    text = file.read_text(encoding="ascii").strip()
    return int(text) if text.isdecimal() else None


def resident_bytes(address: int, size: int) -> int | None:
    """Bytes of the ``size`` bytes of this process's memory from ``address`` on that are backed by real memory, in whole
    pages of the system; None where it does not tell (mincore(2), Linux).
    """
    look = getattr(ctypes.CDLL(None), "mincore", None) if sys.platform == "linux" else None
    if look is None:
        return None
    first, last = address // mmap.PAGESIZE * mmap.PAGESIZE, address + size
    found = 0
    for begin in range(first, last, _LOOK_BYTES):
        count = min(_LOOK_BYTES, last - begin)
        pages = np.zeros(-(-count // mmap.PAGESIZE), np.uint8)
        if look(ctypes.c_void_p(begin), ctypes.c_size_t(count), pages.ctypes.data_as(ctypes.c_void_p)) != 0:
            return None
        found += int((pages & 1).sum())
    return found * mmap.PAGESIZE
