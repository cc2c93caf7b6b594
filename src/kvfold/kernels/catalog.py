"""All operations with all their implementations."""

from __future__ import annotations

from kvfold.kernels import cpu, triton
from kvfold.kernels.dense import dense_registry
from kvfold.kernels.pages import PagesCall, unpack_with
from kvfold.kernels.reference import paged_attend
from kvfold.kernels.registry import OpRegistry

__all__ = ["full_registry"]


def full_registry() -> OpRegistry:
    """A registry that knows ``attend_dense`` and ``attend_pages``."""
    registry = dense_registry()
    registry.register_reference("attend_pages", paged_attend)
    registry.register("attend_pages", "native", cpu.refuses, cpu.attend, priority=10)
    registry.register("attend_pages", "triton", triton.refuses, triton.attend, priority=10)
    registry.register("attend_pages", "unpack", _runs_anywhere, unpack_with(registry), priority=0)
    return registry


def _runs_anywhere(call: PagesCall) -> str | None:
    return None
