"""What an evaluation ran on and with, for the record."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch

__all__ = ["hardware", "versions"]

_PACKAGES: Final = ("kvfold", "torch", "transformers", "tokenizers")
_CPUINFO: Final = Path("/proc/cpuinfo")


def versions(*packages: str) -> dict[str, str]:
    """Python and the packages that decide the figures, and ``packages``, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, object]:
    """The processor, the cores this process may use, torch's threads, and the GPU if the model lies on one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, object] = {
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    text = _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.is_file() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()
