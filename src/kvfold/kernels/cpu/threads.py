"""How many threads the native kernels use, and where that number comes from.

One rule: ``KVFOLD_THREADS`` if it is set; otherwise what torch uses (``torch.get_num_threads()``), but never more than
the processors that this process may run on. The environment, the affinity mask and the quota are read once, at first
use; torch is asked at every call.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from kvfold.telemetry import Settings

__all__ = ["cgroup_cpus", "explain_threads", "thread_count", "usable_cpus"]


def thread_count() -> int:
    """Threads for a call of a native kernel. Raises KVFoldError if ``KVFOLD_THREADS`` makes no sense."""
    asked = _asked()
    return min(usable_cpus(), torch.get_num_threads()) if asked is None else asked


def explain_threads() -> str:
    """Which part of the rule gave `thread_count` its number."""
    if _asked() is not None:
        return "KVFOLD_THREADS"
    torch_threads, cpus = torch.get_num_threads(), usable_cpus()
    if torch_threads <= cpus:
        return "as torch has (KVFOLD_THREADS is not set)"
    return f"the processors that may be used; torch has {torch_threads} (KVFOLD_THREADS is not set)"


@cache
def _asked() -> int | None:
    return Settings.from_env().threads


@cache
def usable_cpus() -> int:
    """Processors in this process's affinity mask, or what its control group grants if that is less; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = cgroup_cpus(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return allowed if granted is None else max(1, min(allowed, round(granted)))


def cgroup_cpus(mounted: Path, membership: Path) -> float | None:
    """The least CPU quota, in processors, of the control groups (version 2) around this process; None if there is none.

    Inside of a container the group's own path may not be visible; then that of the container is its root.
    """
    lines = _read(membership).splitlines()
    inner = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/").strip().lstrip("/")
    group = mounted / inner
    quotas = [_quota(_read(folder / "cpu.max")) for folder in (group, *group.parents) if folder.is_relative_to(mounted)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(text: str) -> float | None:
    match text.split():
        case [used, period] if used.isdecimal() and period.isdecimal() and int(used) and int(period):
            return int(used) / int(period)
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):  # not Linux, or not for us to read
        return ""
